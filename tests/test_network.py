"""The network: three roles of one trunk, patches, norms, sampling and files."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import randomised
from onefold.errors import UserError
from onefold.networks import NetworkConfig, OneFold, parameter_shares
from onefold.paths import Linear, velocity
from onefold.pixels import to_uint8
from onefold.sampling import Sampler

TINY = NetworkConfig(width=32, depth=2, heads=2)
RECTANGLE = NetworkConfig(image_size=(6, 4), channels=3, classes=0, latent_channels=5, width=16, depth=1, heads=1)
WIDE = NetworkConfig(image_size=(3, 12), channels=6, classes=2, patch=3, width=24, depth=1, heads=3)
SHAPES = pytest.mark.parametrize("config", [TINY, RECTANGLE, WIDE], ids=["square", "unconditional", "wide"])


def network(config: NetworkConfig = TINY, seed: int = 0, **changes: object) -> OneFold:
    return randomised(OneFold(dataclasses.replace(config, **changes)), seed).eval()


def pictures(config: NetworkConfig, n: int) -> Tensor:
    return torch.rand(n, config.channels, *config.image_size) * 2 - 1


def latents(config: NetworkConfig, n: int) -> Tensor:
    return torch.randn(n, config.tokens, config.latent_channels)


def test_shapes_are_checked_in_tests():
    net = network()
    for call in (
        lambda: net.encode(torch.zeros(1, 8, 8)),
        lambda: net.encode(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
        lambda: net.denoise(latents(TINY, 3), torch.zeros(2)),
        lambda: net.denoise(latents(TINY, 3), torch.zeros(3), torch.zeros(3)),
        lambda: net.decode(torch.zeros(1, 64)),
    ):
        with pytest.raises(TypeCheckError):
            call()


# --- patches ---


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_patchify_is_row_major_and_has_an_inverse(p: int, channels: int, rows: int, columns: int, n: int):
    config = dataclasses.replace(TINY, image_size=(rows * p, columns * p), channels=channels, patch=p)
    net, x = OneFold(config), pictures(config, n)
    patches = net.patchify(x)
    assert patches.shape == (n, rows * columns, p * p * channels)
    for k in range(rows * columns):
        top, left = k // columns * p, k % columns * p
        assert torch.equal(patches[:, k], x[:, :, top : top + p, left : left + p].flatten(1))
    assert torch.equal(net.unpatchify(patches), x)
    assert torch.equal(net.patchify(net.unpatchify(patches)), patches)


# --- roles ---


@SHAPES
def test_roles_have_the_shapes_of_the_design(config: NetworkConfig):
    net, x = network(config), pictures(config, 2)
    z = net.encode(x)
    height, width = config.image_size
    assert z.shape == (2, height * width // config.patch**2, config.latent_channels)
    assert net.decode(z).shape == x.shape
    assert net.denoise(z, torch.tensor([0.0, 0.5])).shape == z.shape
    features = net.features(x)
    assert [h.shape for h in features] == [(2, config.tokens, config.width)] * config.depth
    torch.testing.assert_close(net.norm(net.latents_out(net.trunk.norm(features[-1]))), z)
    images = net.sample(3, steps=2)
    assert images.shape == (3, height, width, config.channels)
    assert images.dtype == np.uint8
    assert images.std() > 0


def gradients(net: OneFold, out: Tensor) -> dict[str, Tensor]:
    names = dict(net.named_parameters())
    found = torch.autograd.grad(out.square().sum(), list(names.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(names.items(), found, strict=True)}


def test_each_role_reads_its_own_conditioning_and_no_other():
    net, x, z = network(), pictures(TINY, 2), latents(TINY, 2)
    t, y = torch.tensor([0.2, 0.7]), torch.tensor([3, 10])
    entrances = {"patches_in", "latents_in", "latents_out", "patches_out"}
    roles = {
        "encode": (net.encode(x).tanh(), 0, {"patches_in", "latents_out"}, set()),
        "denoise": (net.denoise(z, t, y), 1, {"latents_in", "latents_out"}, {3, 10}),
        "decode": (net.decode(z), 2, {"latents_in", "patches_out"}, set()),
    }
    for role, (out, row, used, classes) in roles.items():
        found = gradients(net, out)
        assert [g.abs().max() > 1e-6 for g in found["roles.weight"]] == [k == row for k in range(3)], role
        assert {k for k, g in enumerate(found["labels.weight"]) if g.abs().max() > 1e-6} == classes, role
        assert (found["time.weight"].abs().max() > 1e-6) == (role == "denoise"), role
        assert {name for name in entrances if found[f"{name}.weight"].abs().max() > 1e-6} == used, role
        for name, g in found.items():
            if name.startswith(("trunk", "modulation")):
                assert g.abs().max() > 0, (role, name)


def test_time_and_class_reach_the_prediction():
    net, z = network(), latents(TINY, 1).expand(3, -1, -1)
    t, y = torch.full((3,), 0.5), torch.tensor([0, 1, 10])
    by_time, by_class = net.denoise(z, torch.tensor([0.0, 0.5, 1.0])), net.denoise(z, t, y)
    for out in (by_time, by_class):
        assert torch.pdist(out.flatten(1)).min() > 0.01
    torch.testing.assert_close(net.denoise(z, t), net.denoise(z, t, torch.full((3,), 10)), rtol=0, atol=0)


def test_roles_differ_on_the_same_tokens():
    """With equal entrances and exits, only the role's vector tells encoding, denoising and decoding apart."""
    net = network(patch=2, latent_channels=4, latent_norm="none")
    net.patches_in, net.patches_out = net.latents_in, net.latents_out
    nn.init.zeros_(net.time.weight)
    nn.init.zeros_(net.labels.weight)
    x = pictures(TINY, 2)
    z = net.patchify(x)
    outs = [net.encode(x), net.denoise(z, torch.zeros(2)), net.patchify(net.decode(z))]
    assert torch.pdist(torch.stack(outs).flatten(1)).min() > 0.01
    nn.init.zeros_(net.roles.weight)
    outs = [net.encode(x), net.denoise(z, torch.zeros(2)), net.patchify(net.decode(z))]
    torch.testing.assert_close(outs[1:], outs[:1] * 2)


@SHAPES
def test_packed_call_is_both_calls(config: NetworkConfig):
    net, z, z_t, t = network(config), latents(config, 2), latents(config, 5), torch.rand(5)
    y = torch.randint(0, config.classes + 1, (5,)) if config.classes else None
    x_hat, z_hat = net.decode_and_denoise(z, z_t, t, y)
    torch.testing.assert_close(x_hat, net.decode(z), atol=1e-5, rtol=0)
    torch.testing.assert_close(z_hat, net.denoise(z_t, t, y), atol=1e-5, rtol=0)


def test_velocity_exit_is_converted_to_the_clean_latent():
    t, z_t = torch.tensor([0.0, 0.3, 0.9, 1.0]), latents(TINY, 4)
    v = network(output="clean").denoise(z_t, t)  # the same weights, whose exit is now read as a velocity
    z_hat = network(output="velocity").denoise(z_t, t)
    torch.testing.assert_close(velocity(Linear(), z_hat, z_t, t[:, None, None])[:3], v[:3], atol=1e-4, rtol=1e-4)
    assert torch.equal(z_hat[3], z_t[3])


# --- latent norms ---


def test_latent_norms():
    x = pictures(TINY, 6)
    raw = network(latent_norm="none").encode(x)
    by_token, by_image = network(latent_norm="rms").encode(x), network(latent_norm="rms_image").encode(x)
    torch.testing.assert_close(by_token, raw / raw.square().mean(2, keepdim=True).sqrt(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(by_image, raw / raw.square().mean((1, 2), keepdim=True).sqrt(), atol=1e-4, rtol=1e-4)
    assert (by_image.square().mean(2) - 1).abs().max() > 0.05  # tokens may differ in size
    net = network(latent_norm="layer_norm")
    centred = raw - raw.mean(2, keepdim=True)
    expected = centred / centred.square().mean(2, keepdim=True).sqrt() * net.norm.weight + net.norm.bias
    torch.testing.assert_close(net.encode(x), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=20)
@given(st.floats(0.1, 1000), st.integers(0, 99))
def test_unit_size_whatever_comes_in(scale: float, seed: int):
    z = scale * torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(seed))
    rms, rms_image = (OneFold(dataclasses.replace(TINY, latent_norm=kind)).norm for kind in ("rms", "rms_image"))
    torch.testing.assert_close(rms(z).square().mean(2), torch.ones(3, 16), atol=1e-2, rtol=0)
    torch.testing.assert_close(rms_image(z).square().mean((1, 2)), torch.ones(3), atol=1e-3, rtol=0)
    assert not list(rms.parameters())
    assert not list(rms_image.parameters())


# --- invariance ---


def in_batches(call, *values: Tensor, size: int) -> Tensor:
    return torch.cat([call(*(v[k : k + size] for v in values)) for k in range(0, len(values[0]), size)])


@pytest.mark.parametrize("size", [1, 7])
@torch.no_grad()
def test_roles_do_not_depend_on_the_batch_size(size: int):
    """Latents to 1e-5, pixels to one level of 255."""
    net, x, z, t = network(), pictures(TINY, 64), latents(TINY, 64), torch.rand(64)
    y = torch.arange(64) % 11
    torch.testing.assert_close(in_batches(net.encode, x, size=size), net.encode(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(in_batches(net.denoise, z, t, y, size=size), net.denoise(z, t, y), atol=1e-5, rtol=0)
    one, whole = to_uint8(in_batches(net.decode, z, size=size)), to_uint8(net.decode(z))
    assert (one.int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize(("options"), [{}, {"guidance": 2.0, "solver": "heun", "guidance_interval": (0.2, 0.8)}])
def test_samples_do_not_depend_on_batch_or_number(options: dict[str, object]):
    """To one level of 255."""
    net = network()
    whole = net.sample(64, steps=2, seed=5, **options).astype(int)
    for batch in (1, 7):
        assert np.abs(net.sample(64, steps=2, seed=5, batch=batch, **options) - whole).max() <= 1
    assert np.abs(net.sample(3, steps=2, seed=9, **options) - whole[4:7]).max() <= 1
    labels = [(5 + k) % 10 for k in range(64)]
    assert np.array_equal(net.sample(64, steps=2, seed=5, labels=labels, **options), whole)


def test_samples_differ_by_seed_and_by_label():
    net = network()
    images = net.sample(4, labels=[1, 1, 2, 10], steps=2).reshape(4, -1).astype(float)
    same_seed = np.concatenate([net.sample(1, labels=[k], steps=2) for k in range(11)]).reshape(11, -1).astype(float)
    for group in (images, same_seed):
        distances = np.abs(group[:, None] - group[None]).max(-1)
        assert distances[~np.eye(len(group), dtype=bool)].min() > 2
    assert np.array_equal(net.sample(1, labels=[10], steps=2, guidance=4.0), net.sample(1, labels=[10], steps=2))


def test_one_step_decodes_the_prediction_at_time_zero():
    net = network()
    eps = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(3))
    x = to_uint8(net.decode(net.denoise(eps.view(1, 16, 4), torch.zeros(1), torch.tensor([3]))))
    assert np.array_equal(net.sample(1, steps=1, seed=3), x.permute(0, 2, 3, 1).numpy())


def test_options_reach_the_solver():
    net, options = network(), {"solver": "heun", "guidance": 3.0, "guidance_interval": (0.1, 0.9), "shift": 0.5}
    expected = to_uint8(net.decode(next(net.sample_latents([5, 6], [5, 6], Sampler(4, **options)))))
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(net.sample(2, steps=4, seed=5, **options), expected)
    for change in ({"solver": "euler"}, {"guidance": 1.0}, {"guidance_interval": (0.0, 0.2)}, {"shift": 1.0}):
        assert not np.array_equal(net.sample(2, steps=4, seed=5, **{**options, **change}), expected), change


def test_sampling_keeps_no_graph_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    net, state, graphs = network(), torch.get_rng_state(), list[bool]()

    def decode(z: Tensor) -> Tensor:
        graphs.append(z.requires_grad)
        return OneFold.decode(net, z)

    monkeypatch.setattr(net, "decode", decode)
    net.sample(5, steps=1, batch=2)
    assert graphs == [False, False, False]
    assert not any(z.requires_grad for z in net.sample_latents(range(3), None, Sampler(2), batch=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "n: 0 images"),
        ({"n": 2, "labels": [1]}, "labels: 1 were given for n = 2"),
        ({"n": 1, "labels": [11]}, "labels: 11 is not a class"),
        ({"n": 1, "seed": -1}, "seed: -1 is out of range"),
        ({"n": 1, "steps": 0}, "steps: 0 is not positive"),
    ],
)
def test_sample_refuses_in_one_line(options: dict[str, int], text: str):
    with pytest.raises(UserError) as error:
        network().sample(**options)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_bfloat16_agrees_with_float32():
    """bf16 has 8 bits: latents and images to 3 % of their size on average. What leaves the network is float32."""
    net, x, z, t = network(depth=4), pictures(TINY, 16), latents(TINY, 16), torch.rand(16)
    calls = (
        lambda: net.encode(x),
        lambda: net.denoise(z, t),
        lambda: net.decode(z),
        lambda: net.decode_and_denoise(z, z, t, None)[1],
    )
    for call in calls:
        exact = call()
        with torch.autocast("cpu", torch.bfloat16):
            rough = call()
        assert rough.dtype == torch.float32
        assert 1e-4 < (rough - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 0.03


# --- sizes ---


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (NetworkConfig(), None),
        *(
            (NetworkConfig((256, 256), 3, 1000, 16, 32, width, depth, heads), millions)
            for width, depth, heads, millions in [(512, 12, 8, 42), (768, 16, 12, 118), (1024, 16, 16, 205)]
        ),
    ],
)
def test_nearly_all_parameters_serve_all_roles(config: NetworkConfig, millions: int | None):
    with torch.device("meta"):
        net = OneFold(config)
    shares = parameter_shares(net)
    assert shares["share"] >= 0.95
    assert shares["share"] == shares["shared"] / shares["parameters"]
    assert shares["parameters"] == sum(p.numel() for p in net.parameters())
    own = ("patches_in", "patches_out", "latents_in", "latents_out", "time", "labels", "roles", "jump", "norm.")
    assert shares["parameters"] - shares["shared"] == sum(
        p.numel() for name, p in net.named_parameters() if name.startswith(own)
    )
    if millions:
        assert shares["parameters"] == pytest.approx(millions * 1e6, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"patch": 0}, "network.patch: 0 is not positive"),
        ({"depth": -1}, "network.depth: -1 is not positive"),
        ({"classes": -1}, "network.classes: -1 is not 0 or more"),
        ({"patch": 9}, "network.patch: 9 is larger than the image (8×8)"),
        ({"patch": 3}, "network.image_size: 8×8 is not divisible by patch 3; choose another patch or convert the "),
        ({"image_size": (8, 1)}, "network.patch: 2 is larger than the image (8×1)"),
        (
            {"image_size": (8, 7)},
            "network.image_size: 8×7 is not divisible by patch 2; choose another patch or convert ",
        ),
        (
            {"image_size": (7, 8)},
            "network.image_size: 7×8 is not divisible by patch 2; choose another patch or convert ",
        ),
        ({"image_size": (0, 8)}, "network.image_size: 0 is not positive"),
        ({"heads": 3}, "network.heads: width 32 over 3 heads must give a multiple of 4"),
        ({"heads": 16}, "network.heads: width 32 over 16 heads must give a multiple of 4"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(changes: dict[str, object], text: str):
    with pytest.raises(UserError) as error:
        OneFold(dataclasses.replace(TINY, **changes))
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


# --- files ---


@SHAPES
def test_save_and_load_is_bitwise(config: NetworkConfig, tmp_path: Path):
    net = network(dataclasses.replace(config, latent_norm="layer_norm", output="velocity"))
    net.save_pretrained(tmp_path / "a" / "net")
    found = OneFold.from_pretrained(tmp_path / "a" / "net")
    assert found.config == net.config
    assert not found.training
    state = found.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert np.array_equal(found.sample(2, steps=2), net.sample(2, steps=2))
    stored = load_file(tmp_path / "a" / "net" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert stored.keys() == dict(net.named_parameters()).keys()


def test_a_run_holds_its_network(tmp_path: Path):
    network().save_pretrained(tmp_path / "model")
    assert OneFold.from_pretrained(str(tmp_path)).config == TINY


def write_foreign(folder: Path, kind: str) -> None:
    """Files that are not a network, or not this one."""
    network().save_pretrained(folder)
    config, model = folder / "config.json", folder / "model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "no model":
        model.unlink()
    elif kind == "not safetensors":
        model.write_bytes(b"\x80\x04pickle")
    elif kind == "not JSON":
        config.write_text("{")
    elif kind == "not text":
        config.write_bytes(b"\xff\xfe\x00")
    elif kind == "another library's":
        config.write_text(json.dumps({"model_type": "vit", "hidden_size": 768}))
    elif kind == "another network":
        network(depth=3).save_pretrained(folder / "other")
        (folder / "other" / "model.safetensors").replace(model)
    elif kind == "other names":
        save_file({"weight": torch.zeros(2)}, model)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no config", "no config.json there; give the folder of a run or of a saved network"),
        ("no model", "model.safetensors: does not hold this network"),
        ("not safetensors", "model.safetensors: does not hold this network"),
        ("not JSON", "config.json: not readable as JSON"),
        ("another library's", "config.json: unknown setting 'model_type'"),
        ("another network", "model.safetensors: does not hold this network"),
        ("other names", "model.safetensors: does not hold this network"),
        ("not text", "config.json: cannot be read"),
    ],
)
def test_foreign_files_are_refused_in_one_line(kind: str, text: str, tmp_path: Path):
    write_foreign(tmp_path, kind)
    with pytest.raises(UserError) as error:
        OneFold.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_model_is_refused_with_the_reason(tmp_path: Path):
    write_foreign(tmp_path, "other names")
    with pytest.raises(UserError, match="issing"):
        OneFold.from_pretrained(tmp_path)


def test_a_name_that_is_no_folder_is_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network().save_pretrained(tmp_path)
    asked: list[str] = []

    def download(repository: str, **options: object) -> str:
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert OneFold.from_pretrained("someone/a-network").config == TINY
    assert asked == ["someone/a-network"]
    for path in ("/someone/a-network", "a-network", "a/b/c"):
        with pytest.raises(UserError, match=r"no config\.json there"):
            OneFold.from_pretrained(path)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "failure",
    [
        LocalEntryNotFoundError("offline"),
        HFValidationError("'../no-run' is no name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(failure: Exception, monkeypatch: pytest.MonkeyPatch):
    def download(repository: str, **options: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"^no such folder: \.\./no-run; nor does the hub") as error:
        OneFold.from_pretrained("../no-run")
    assert "\n" not in str(error.value)
