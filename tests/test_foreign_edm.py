"""EDM and EDM2: pickles read without executing them, and denoisers that are what their makers' code computes."""

import dataclasses
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers_foreign import KINDS, named, waves, write_edm
from onefold.errors import UserError
from onefold.networks import EDM, EDM2, Network, NetworkConfig, RatioNet, adopt, build
from onefold.networks.edm import Halves
from onefold.networks.unpickled import read_pickle

GOLDEN = {
    "ddpmpp": (
        (0.5857, -0.51035, 0.46996, 0.41342),
        (-0.08009, -0.53057, 0.22876, 0.39499),
        (-0.38276, -0.45925, 0.09208, 0.45144),
    ),
    "ncsnpp": (
        (0.58432, -0.50778, 0.49147, 0.41535),
        (-0.10711, -0.56094, 0.40631, 0.40419),
        (-0.42193, -0.46573, 0.25174, 0.43778),
    ),
    "adm": (
        (0.64198, -0.45471, 0.46038, 0.41863),
        (0.42829, -0.02688, 0.12968, 0.22354),
        (0.20852, 0.1472, -0.06213, 0.1448),
    ),
    "edm2": (
        (0.62546, -0.47176, 0.47439, 0.41766),
        (0.29127, -0.19067, 0.25622, 0.20203),
        (0.08221, -0.06487, 0.07305, 0.10418),
    ),
}
"""Three pixels and the root mean square of D(x; σ) at σ = 0.05, 1 and 20, with the weights `waves` and labels 0 and 3
of 5, computed by the authors' published code (NVlabs/edm and edm2), which is not part of this repository.
"""


def weights_of(name: str, classes: int = 5, channels: int = 3) -> dict[str, Tensor]:
    """Weights by the names that they have in files."""
    _, inner, options = KINDS[name]
    if inner == "UNet":
        net: Halves = EDM2.halves({**options, "img_channels": channels})
    else:
        net = EDM.halves({**options, "img_channels": channels, "kind": inner})
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    if classes:
        label = "emb_label" if inner == "UNet" else "map_label"
        shapes[f"{label}.weight"] = (net.label_width, classes)
        if inner == "SongUNet":
            shapes["map_label.bias"] = (net.label_width,)
    return {key: value for key, value in net.state_dict().items() if key.endswith("resample_filter")} | named(shapes)


def adopted(tmp_path: Path, name: str, classes: int = 5, **more: Any) -> Network:
    return adopt(write_edm(tmp_path / "network.pkl", name, weights_of(name, classes), classes=classes, **more))


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_pickle_becomes_the_network_of_its_makers(name: str, tmp_path: Path):
    network = adopted(tmp_path, name)
    assert not (tmp_path / "executed").exists()
    assert network.config.classes == 5
    x, y = 4 * waves((2, 3, 8, 8), 0), torch.tensor([0, 3])
    for sigma, expected in zip((0.05, 1.0, 20.0), GOLDEN[name], strict=True):
        t = torch.full((2,), 1 / (1 + sigma))
        found = network.decode(network.denoise(network.patchify(x * (1 + sigma) * t[0]), t, y))
        seen = torch.stack([found[0, 0, 0, 0], found[0, 2, 4, 3], found[1, 1, 7, 7], found.square().mean().sqrt()])
        torch.testing.assert_close(seen, torch.tensor(expected), atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])
def test_without_classes_and_of_grey_images(name: str, tmp_path: Path):
    weights = weights_of(name, 0, 1)
    network = adopt(write_edm(tmp_path / "network.pkl", name, weights, classes=0, channels=1))
    assert (network.config.classes, network.config.channels) == (0, 1)
    assert network.sample(2, steps=1).shape == (2, 8, 8, 1)


class Exact(Halves):
    """F of the exact denoiser for pixels that are normal with this mean and variance, in the preconditioning of EDM."""

    width = label_width = coarse_width = 4

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance

    def condition(self, c_noise: Tensor, label: Tensor | None, role: Tensor | None) -> Tensor:
        return (4 * c_noise).exp()[:, None]

    def descend(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, []

    def ascend(self, h: Tensor, skips: list[Tensor], condition: Tensor) -> Tensor:
        sigma = condition[:, :, None, None]
        total = (sigma**2 + 0.25).sqrt()
        x = h * total
        clean = self.mean + self.variance / (self.variance + sigma**2) * (x - self.mean)
        return (clean - 0.25 / total**2 * x) * total / (0.5 * sigma)


def test_on_our_path_the_denoiser_of_a_gaussian_is_exact(tmp_path: Path):
    network, mean, variance = adopted(tmp_path, "ddpmpp"), 0.3, 0.16
    network.body = Exact(mean, variance)
    t = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.99])
    z_t = torch.randn(6, 64, 3)
    at = t[:, None, None]
    expected = mean + at * variance / (at**2 * variance + (1 - at) ** 2) * (z_t - at * mean)
    torch.testing.assert_close(network.denoise(z_t, t), expected, atol=2e-5, rtol=0)
    ends = network.denoise(z_t[:2], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends[1], z_t[1], atol=1e-6, rtol=0)
    assert (ends[0] - mean).abs().max() < 0.02, "at σ = 80, noise is all but nothing"


@pytest.mark.parametrize("name", KINDS)
def test_generating_begins_as_denoising_and_knows_its_arrival(name: str, tmp_path: Path):
    network = adopted(tmp_path, name)
    z, t, y = torch.randn(2, 64, 3), torch.tensor([0.1, 0.5]), torch.tensor([1, 5])
    assert torch.equal(network.generate(z, t, y), network.denoise(z, t, y))
    nn.init.normal_(network.jump.arrival)
    ends = [network.generate(z, t, y, torch.full((2,), r)) for r in (0.6, 1.0)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3
    assert (network.denoise(z, t, y) - network.denoise(z, t)).abs().max() > 1e-3, "of the first, which has a class"


@pytest.mark.parametrize("name", KINDS)
def test_saved_as_one_of_ours_with_half_of_it_as_a_ratio_network(name: str, tmp_path: Path):
    network = adopted(tmp_path, name)
    network.save_pretrained(tmp_path / "saved")
    again = Network.from_pretrained(tmp_path / "saved")
    z, t, y = torch.randn(2, 64, 3), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    assert torch.equal(again.denoise(z, t, y), network.denoise(z, t, y))
    ratio = RatioNet.of(network)
    theirs, own = network.state_dict(), ratio.backbone.state_dict()
    assert all(torch.equal(value, theirs[key.removeprefix("network.")]) for key, value in own.items())
    assert any(key.startswith("network.body.enc.4x4_block0") for key in own)
    assert not any(".dec." in key or "out_" in key or "jump" in key for key in own)
    ratio.save_pretrained(tmp_path / "ratio")
    assert torch.equal(RatioNet.from_pretrained(tmp_path / "ratio")(z, t, y), ratio(z, t, y))


def test_operations_are_those_of_its_convolutions_maps_and_attention(tmp_path: Path):
    """Counted by hand from what modules put out: 2 for each product; resampling is a convolution of each channel."""
    network = adopted(tmp_path, "ddpmpp")
    counted: list[int] = []

    def convolution(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if module.size:
            inside = (out.shape[2] * 2 if module.change == "down" and module.late else out.shape[2]) ** 2
            counted.append(2 * inside * module.weight.numel())
        if module.change != "keep":
            side = max(out.shape[2], given[0].shape[2]) if module.change == "up" else out.shape[2]
            positions = given[0].shape[2] ** 2 if module.change == "up" else side**2
            counted.append(2 * positions * given[0].shape[1] * module.resample_filter.numel())

    def linear(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        counted.append(2 * module.weight.numel())

    def attention(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if module.heads:
            counted.append(4 * (out.shape[2] * out.shape[3]) ** 2 * out.shape[1])

    hooks = {"Convolution": convolution, "Linear": linear, "ResidualBlock": attention}
    for module in network.modules():
        if type(module).__name__ in hooks:
            module.register_forward_hook(hooks[type(module).__name__])
    network.denoise(torch.randn(1, 64, 3), torch.tensor([0.5]))
    assert network.config.kind.role_flops(network.config) == (0, sum(counted), 0)


# --- what is refused --------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (__import__, "builtins.__import__"),
    ],
    ids=["system", "eval", "exec", "getattr", "load", "import"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_call_something_is_refused_before_it_does(
    call: Any, name: str, protocol: int, tmp_path: Path
):
    there = tmp_path / "executed"
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"ema": [Malicious(call, f"touch {there}")]}, protocol=protocol))
    with pytest.raises(UserError) as error:
        adopt(path)
    said = str(error.value).replace("__builtin__", "builtins")
    assert said.startswith(f"{path}: names {name}, which loading it would execute")
    assert "\n" not in str(error.value)
    assert not there.exists()


def test_nor_are_numbers_that_hide_a_call(tmp_path: Path):
    """Tensors are bytes that torch reads, and these bytes are a pickle of their own."""
    there, path = tmp_path / "executed", tmp_path / "network.pkl"
    inner = pickle.dumps(Malicious(os.system, f"touch {there}"), protocol=2)
    path.write_bytes(pickle.dumps({"ema": Malicious(torch.storage._load_from_bytes, inner)}))
    with pytest.raises(UserError, match="is no pickle of EDM that can be read"):
        adopt(path)
    assert not there.exists()


def test_a_tensor_is_not_larger_than_its_numbers(tmp_path: Path):
    path = tmp_path / "network.pkl"
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(1).untyped_storage(), dtype=torch.float32, _internal=True
    )
    arguments = (storage, 0, (10**5, 10**6), (0, 0), False, {})
    path.write_bytes(pickle.dumps({"ema": Malicious(torch._utils._rebuild_tensor_v2, *arguments)}))
    with pytest.raises(UserError, match="a tensor larger than what it consists of"):
        read_pickle(path)


def test_what_is_no_network_of_edm_says_what_it_is(tmp_path: Path):
    path = tmp_path / "network.pkl"
    saved = io.BytesIO()
    torch.save({"ema": torch.ones(3)}, saved)
    for content, said in [
        (pickle.dumps({"G_ema": 3}), "holds no network by the name ema; give a pickle of EDM"),
        (pickle.dumps([1, 2]), "holds no network by the name ema"),
        (saved.getvalue(), "is no pickle of EDM that can be read"),
        (b"", "is empty"),
        (b"<!doctype html><html>", "is a web page"),
        (pickle.dumps({"ema": torch.ones(5)})[:-40], "is no pickle of EDM that can be read"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            adopt(path)
        assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(UserError, match="no such file or folder; networks from elsewhere are read from the disk"):
        adopt(tmp_path / "owner" / "name")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"encoder_type": "skip"}, r"has options that EDM's own networks lack"),
        ({"channel_mult": [1, 3]}, r"its weights are not those of its configuration \(.*size mismatch"),
        ({"num_blocks": 2}, r"its weights are not those of its configuration \(.*Missing key"),
    ],
    ids=str,
)
def test_a_network_that_is_not_as_it_says(more: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        adopted(tmp_path, "ddpmpp", **more)


def test_latents_of_another_autoencoder_are_no_images(tmp_path: Path):
    path = write_edm(tmp_path / "network.pkl", "edm2", weights_of("edm2", 0, 4), classes=0, channels=4)
    with pytest.raises(UserError, match="has 4 channels; only denoisers of grey or RGB images are read"):
        adopt(path)


def test_images_are_of_the_size_that_it_knows(tmp_path: Path):
    config = adopted(tmp_path, "edm2").config
    with pytest.raises(
        UserError, match=r"^network\.image_size: the network takes 8×8 with 3 channels, not 16×16 with 3"
    ):
        dataclasses.replace(config, image_size=(16, 16))
    with pytest.raises(UserError, match=r"^network\.jump_rank: edm2 has no trunk"):
        dataclasses.replace(config, jump_rank=4)
    with pytest.raises(UserError, match=r"knows 5 classes, not 4"):
        adopt(tmp_path / "network.pkl", classes=4)
    with pytest.raises(UserError, match=r"has sizes of its own; leave width out"):
        adopt(tmp_path / "network.pkl", width=4)
    for name in ("edm", "edm2", "unet", "frozen_codec"):
        with pytest.raises(UserError, match=rf"^network\.architecture: {name} comes from elsewhere; .*`onefold adopt`"):
            NetworkConfig(architecture=name)
    with pytest.raises(UserError, match=r"^blocks: EDM2 is halved, not cut after 1 blocks"):
        build(config).backbone(1)
