"""Backbones of each architecture, and the network of pixels that is nothing but one."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import onefold
from conftest import randomised
from helpers_runs import batch, differing, log, newest, tiny
from onefold import cli
from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig, build
from onefold.networks.one_network import OneFold
from onefold.networks.pixel_network import PixelNetwork
from onefold.networks.three_networks import ThreeNetworks
from onefold.objectives.self_distillation import SelfDistillation, draw, self_distillation
from onefold.training.run import Run

KINDS: dict[str, dict[str, object]] = {
    "one": {},
    "velocity": {"output": "velocity"},
    "three": {"architecture": "three_networks", "equal": "compute"},
    "pixels": {"architecture": "pixels"},
    "unconditional": {"classes": 0},
}
SMALL = NetworkConfig(width=32, depth=2, heads=2)


def network(kind: str, **changes: object) -> Network:
    return randomised(build(dataclasses.replace(SMALL, **(KINDS[kind] | changes)))).eval()


def exit_of(network: Network) -> nn.Module:
    """The linear map that the denoiser's tokens go through at last."""
    if isinstance(network, OneFold):
        return network.latents_out
    return network.denoiser.exit if isinstance(network, ThreeNetworks) else network.exit


def inputs(network: Network) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents at times from 0 to 1 and labels, "no class" among them."""
    z_t = torch.randn(4, network.config.tokens, network.config.latent_channels)
    labels = [1, 5, network.config.classes, 0] if network.config.classes else [0, 0, 0, 0]
    return z_t, torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor(labels)


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_computes_the_tokens_of_the_network_s_denoiser(kind: str):
    net = network(kind)
    z_t, t, y = inputs(net)
    for labels in (y, None):
        out = exit_of(net)(net.backbone()(z_t, t, labels))
        expected = z_t + (1 - t[:, None, None]) * out if kind == "velocity" else out
        torch.testing.assert_close(net.denoise(z_t, t, labels), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_there_is_no_class(kind: str):
    backbone = network(kind).backbone()
    z_t, t, _ = inputs(network(kind))
    none = torch.full((4,), network(kind).config.classes)
    assert torch.equal(backbone(z_t, t), backbone(z_t, t, none))


@pytest.mark.parametrize("kind", KINDS)
def test_its_first_blocks_are_those_of_the_network(kind: str):
    """The tokens before the last norm are those after the denoiser's first block."""
    net = network(kind)
    z_t, t, y = inputs(net)
    short, whole = net.backbone(1), net.backbone()
    assert len(short.trunk.blocks) == 1
    states = whole.trunk.hidden(whole.entrance(z_t), whole.condition(t, y))
    assert len(states) == 2
    torch.testing.assert_close(short(z_t, t, y), whole.trunk.norm(states[0]))
    assert (short(z_t, t, y) - whole(z_t, t, y)).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_is_a_copy(kind: str):
    net = network(kind)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    backbone = net.backbone()
    assert all(p.requires_grad for p in backbone.parameters())
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in backbone.parameters()}
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(1)
    assert differing(before, net.state_dict()) == []


def test_all_of_a_backbone_comes_from_the_network():
    """However it was drawn: what is not taken over would differ from seed to seed."""
    net, states = network("one"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(net.backbone().state_dict())
    assert differing(*states) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [0, -1, 3])
def test_more_blocks_than_there_are_is_one_line(kind: str, blocks: int):
    with pytest.raises(UserError, match=rf"^blocks: {blocks} is not within 1 to 2, the blocks of the network$"):
        network(kind).backbone(blocks)


def test_a_denoiser_of_three_networks_may_be_less_deep_than_the_configuration_says():
    net = network("three", equal="parameters", depth=4)
    assert len(net.backbone().trunk.blocks) == 2
    with pytest.raises(UserError, match=r"^blocks: 3 is not within 1 to 2"):
        net.backbone(3)


@pytest.mark.parametrize(("kind", "shares"), [("one", True), ("three", False), ("pixels", False)])
def test_one_network_alone_shares_its_codec(kind: str, shares: bool):
    """That is: the denoiser's gradient reaches parameters that encode or decode."""
    net = network(kind)
    z_t, t, y = inputs(net)
    params = list(net.parameters())

    def reached(out: Tensor) -> set[int]:
        if not out.requires_grad:
            return set()
        found = torch.autograd.grad(out.square().sum(), params, allow_unused=True)
        return {k for k, gradient in enumerate(found) if gradient is not None}

    codec = reached(net.encode(2 * torch.rand(2, 1, 8, 8) - 1).tanh()) | reached(net.decode(z_t))
    assert bool(codec & reached(net.denoise(z_t, t, y))) == shares == net.shares_codec


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"image_size": (6, 12), "patch": 3, "channels": 3}, {"image_size": (7, 5), "patch": 1}], ids=str
)
def test_pixels_are_encoded_and_decoded_to_the_bit(shape: dict[str, object]):
    net = network("pixels", **shape)
    x = torch.rand(3, net.config.channels, *net.config.image_size) * 2 - 1
    z = net.encode(x)
    assert z.shape == (3, net.config.tokens, net.config.latent_channels)
    assert torch.equal(net.decode(z), x)
    assert sorted(z.flatten().tolist()) == sorted(x.flatten().tolist())


def test_a_token_is_a_patch():
    net = network("pixels", channels=2)
    x = (torch.arange(128.0) / 64 - 1).view(1, 2, 8, 8)
    z = net.encode(x)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        patch = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert set(z[0, 4 * row + column].tolist()) == set(patch.flatten().tolist())


def test_the_numbers_of_a_token_follow_from_patch_and_channels():
    config = NetworkConfig(architecture="pixels", image_size=(12, 12), patch=3, channels=3, latent_channels=5)
    assert config.latent_channels == 27
    assert dataclasses.replace(config, patch=4).latent_channels == 48
    assert dataclasses.replace(config, channels=1).latent_channels == 9
    assert dataclasses.replace(config, architecture="one_network", latent_channels=5).latent_channels == 5


def test_it_is_built_saved_and_loaded_as_what_it_is(tmp_path: Path):
    net = network("pixels")
    assert isinstance(net, PixelNetwork)
    net.save_pretrained(tmp_path)
    found = Network.from_pretrained(tmp_path)
    assert isinstance(found, PixelNetwork)
    assert found.config == net.config
    assert differing(found.state_dict(), net.state_dict()) == []
    with pytest.raises(UserError, match=r"holds PixelNetwork, not OneFold; load it with PixelNetwork\.from_pretrained"):
        OneFold.from_pretrained(tmp_path)


def test_its_features_are_the_hidden_tokens_of_clean_patches():
    net, x = network("pixels"), batch(2)[0]
    assert isinstance(net, PixelNetwork)
    found = net.features(x)
    assert [h.shape for h in found] == [(2, 16, 32)] * 2
    torch.testing.assert_close(net.body.trunk.norm(found[-1]), net.body(net.encode(x), torch.ones(2)))


def test_the_objective_of_pixels_is_the_denoising_loss():
    net, (x, y) = network("pixels"), batch(8)
    objective = SelfDistillation(draws=2)
    draws = draw(objective, 8, (16, 4), torch.Generator().manual_seed(0))
    losses = self_distillation(net, net, x, y, draws, objective)
    assert losses.parts["reconstruction"] == 0
    torch.testing.assert_close(losses.total, losses.parts["denoising"])
    losses.total.backward()
    without = {name for name, p in net.named_parameters() if p.grad is None}
    assert without == {"jump.vector", "jump.arrival"}, "which a one-step generator alone has a use for"


# --- a run in pixels --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    changes = {"network__architecture": "pixels", "training__health_every": 80, "training__sample_every": 160}
    return onefold.train(tiny(**changes), tmp_path_factory.mktemp("pixels") / "run", quiet=True)


def strictly(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_in_pixels_trains_and_measures_its_health(run: Run):
    assert isinstance(run.network, PixelNetwork)
    assert (run.folder / "curves.png").stat().st_size > 1000
    for line in (run.folder / "log.jsonl").read_text().splitlines():
        strictly(line)
    lines = log(run.folder)
    assert all(line["reconstruction"] == 0 and 0 < line["denoising"] < 20 for line in lines)
    measured = [line["health"] for line in lines if "health" in line]
    assert len(measured) == 2
    for values in measured:
        assert values["psnr"] == 100, "of identical images"
        assert values["effective_rank_whole"] == values["image_rank_whole"]
        assert not any(name.startswith("gradient") for name in values)
    assert not any("alarm" in line for line in lines)


def test_its_record_is_valid_and_can_be_shown(run: Run, capsys: pytest.CaptureFixture[str]):
    """Reconstructions are exact: their PSNR is infinite but for its cap, their distance nothing."""
    assert cli.run(["evaluate", str(run.folder), "--images", "40", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "100.00 dB" in shown
    (path,) = (run.folder / "evaluation").glob("*.json")
    record = strictly(path.read_text())
    assert isinstance(record, dict)
    assert record["reconstruction"]["psnr"] == 100
    assert record["reconstruction"]["ssim"] == pytest.approx(1)
    assert record["reconstruction"]["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert record["latent"]["numbers_per_pixel_value"] == 1
    assert record["frechet_distance"] > 0


def test_it_samples_and_reconstructs(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["sample", str(run.folder), "--n", "4", "--out", str(tmp_path / "samples.png")]) == 0
    assert cli.run(["reconstruct", str(run.folder), "digits:test", "--out", str(tmp_path / "both.png")]) == 0
    assert "30 images, PSNR 100.00 dB" in capsys.readouterr().out


def test_a_resumed_run_in_pixels_is_the_same_to_the_bit(run: Run, tmp_path: Path):
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000160")
    onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    assert differing(newest(run.folder), newest(tmp_path / "run")) == []
    assert log(run.folder) == log(tmp_path / "run")
