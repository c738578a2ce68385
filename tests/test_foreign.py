"""Models of diffusers, made on the spot: a DDPM as a teacher, and autoencoders for the two stages of the baseline."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onefold
from conftest import randomised
from helpers_one_step import begun, critic_of, teacher_of
from helpers_runs import batch, differing, tiny
from onefold import cli
from onefold.errors import UserError
from onefold.networks import FrozenCodec, Network, RatioNet, UNet, adopt, build
from onefold.networks.unet import level_table, position
from onefold.training.conversion import converted, of_network
from onefold.training.phases import phases_of

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LEVELS = (0, 1, 50, 500, 900, 999)


def small_unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": 11,
        "dropout": 0.1,
    }
    return diffusers.UNet2DModel(**(options | changes)).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers has saved. Its U-Net has vectors of ten classes and of none."""
    folder = tmp_path_factory.mktemp("foreign") / "ddpm"
    diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(pipeline: Path) -> UNet:
    network = adopt(pipeline, classes=10)
    assert isinstance(network, UNet)
    return network


def scheduled(teacher: UNet, **changes: Any) -> tuple[UNet, Any]:
    """The same network by another scheduler, and that."""
    scheduler = diffusers.DDPMScheduler(**changes)
    parts = {**json.loads(teacher.config.foreign), "scheduler": dict(scheduler.config)}
    network = build(dataclasses.replace(teacher.config, foreign=json.dumps(parts)))
    network.load_state_dict(teacher.state_dict())
    assert isinstance(network, UNet)
    return network.eval(), scheduler


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("predicts", PREDICTIONS)
@torch.no_grad()
def test_at_its_levels_a_teacher_predicts_what_the_scheduler_makes_of_it(predicts: str, clip: bool, teacher: UNet):
    network, scheduler = scheduled(teacher, prediction_type=predicts, clip_sample=clip, beta_schedule="linear")
    unet, x, y = small_unet(), torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    for s in LEVELS:
        expected = scheduler.step(unet(x, s, y).sample, s, x).pred_original_sample
        survival = scheduler.alphas_cumprod[s].double()
        t = (survival.sqrt() / (survival.sqrt() + (1 - survival).sqrt())).float()
        z_t = network.patchify(x * torch.hypot(t, 1 - t))
        found = network.decode(network.denoise(z_t, t.expand(2), y))
        assert (found - expected).abs().max() < 5e-5 * max(1, float(expected.abs().max())), s


class Exact(nn.Module):
    """ε̂ of pixels that are normal with this mean and variance, at each level of a scheduler and between."""

    def __init__(self, mean: float, variance: float, scheduler: Any) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance
        survival = scheduler.alphas_cumprod.double().numpy()
        self.table = np.log(survival / (1 - survival))

    def forward(self, x: Tensor, s: Tensor, class_labels: Tensor) -> Any:
        log_snr = np.interp(s.double().numpy(), np.arange(len(self.table)), self.table)
        a, b = (torch.tensor(1 / (1 + np.exp(-sign * log_snr)))[:, None, None, None].sqrt() for sign in (1, -1))
        noise = b * (x - a * self.mean) / (a**2 * self.variance + b**2)
        return SimpleNamespace(sample=noise.float())


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_on_our_path_the_denoiser_of_a_gaussian_is_exact(betas: str, teacher: UNet):
    network, scheduler = scheduled(teacher, clip_sample=False, beta_schedule=betas)
    mean, variance = 0.3, 0.16
    network.body = Exact(mean, variance, scheduler)
    t = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.98])
    z_t = torch.randn(6, 64, 1)
    at = t[:, None, None]
    expected = mean + at * variance / (at**2 * variance + (1 - at) ** 2) * (z_t - at * mean)
    torch.testing.assert_close(network.denoise(z_t, t), expected, atol=2e-3, rtol=0)
    ends = network.denoise(z_t[:2], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends[1], z_t[1])
    assert (ends[0] - mean).abs().max() < 0.1, "the table ends where there is a little signal"


def test_levels_lie_between_those_of_the_table():
    levels = level_table(torch.tensor([0.9, 0.5, 0.1, 0.0]))
    assert levels[1] == 0
    assert levels.isfinite().all()
    asked = torch.tensor([torch.inf, 9.0, levels[0], levels[0] / 2, 0.0, levels[2] / 4, levels[2], -torch.inf])
    torch.testing.assert_close(position(asked, levels), torch.tensor([0, 0, 0, 0.5, 1, 1.25, 2, 3]), atol=1e-5, rtol=0)


def test_towards_noise_weights_learn_as_from_an_error_of_the_noise(teacher: UNet):
    """For ε̂ = w·x, ẑ = (1 − b·w)·x/a, and the gradient in w is −x·b/a times min(1, a²/b²)."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, s: Tensor, class_labels: Tensor) -> Any:
            return SimpleNamespace(sample=self.w * x)

    network, _ = scheduled(teacher, clip_sample=True)
    network.body = Scaled()
    z = torch.full((1, 64, 1), 0.01)
    for t in (0.1, 0.3, 0.7, 0.9):
        (found,) = torch.autograd.grad(network.denoise(z, torch.tensor([t])).sum(), network.body.w)
        x = 64 * 0.01 / (t**2 + (1 - t) ** 2) ** 0.5
        ratio = (1 - t) / t
        torch.testing.assert_close(found.item(), -x * ratio * min(1, ratio**-2), rtol=1e-4, atol=0)


class Tripled(nn.Module):
    def forward(self, x: Tensor, s: Tensor, class_labels: Tensor) -> Any:
        return SimpleNamespace(sample=3 * x)


def test_a_clipped_prediction_has_the_gradient_of_one_that_is_not(teacher: UNet):
    network, _ = scheduled(teacher, prediction_type="sample", clip_sample=True)
    network.body = Tripled()
    z = torch.tensor([0.1, 0.9]).repeat(32).view(1, 64, 1).requires_grad_()
    out = network.denoise(z, torch.tensor([1.0]))
    torch.testing.assert_close(out[0, :2, 0], torch.tensor([0.3, 1.0]))
    out.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.full((1, 64, 1), 3.0))


def test_no_class_is_the_last_vector_or_the_mean_of_all(pipeline: Path, teacher: UNet):
    rows = small_unet().class_embedding.weight
    assert teacher.labels is not None
    assert torch.equal(teacher.labels.weight, rows)
    whole = adopt(pipeline)
    assert isinstance(whole, UNet)
    assert whole.config.classes == 11
    assert whole.labels is not None
    torch.testing.assert_close(whole.labels.weight, torch.cat([rows, rows.mean(0, keepdim=True)]))


def test_generating_begins_as_denoising_and_knows_its_arrival(pipeline: Path):
    network = adopt(pipeline, classes=10)
    z, t, y = torch.randn(2, 64, 1), torch.tensor([0.3, 0.5]), torch.tensor([1, 10])
    assert torch.equal(network.generate(z, t, y), network.denoise(z, t, y))
    nn.init.normal_(network.jump.arrival)
    ends = [network.generate(z, t, y, torch.full((2,), r)) for r in (0.6, 1.0)]
    assert (ends[0] - ends[1]).abs().max() > 1e-3


def test_half_of_it_is_a_ratio_network(teacher: UNet, tmp_path: Path):
    """The same features as those that the whole U-Net's middle gives out."""
    unet, seen = small_unet(), list[Tensor]()
    unet.mid_block.register_forward_hook(lambda module, given, out: seen.append(out))
    ratio = RatioNet.of(teacher)
    scheduler = diffusers.DDPMScheduler()
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    unet(x, 400, y)
    survival = scheduler.alphas_cumprod[400].double()
    t = (survival.sqrt() / (survival.sqrt() + (1 - survival).sqrt())).float()
    z_t = teacher.patchify(x * torch.hypot(t, 1 - t))
    torch.testing.assert_close(ratio.backbone(z_t, t.expand(2), y), seen[0].flatten(2).mT, atol=1e-4, rtol=0)
    ratio.save_pretrained(tmp_path)
    assert torch.equal(RatioNet.from_pretrained(tmp_path)(z_t, t.expand(2), y), ratio(z_t, t.expand(2), y))
    assert torch.isfinite(ratio(z_t, torch.tensor([0.0, 1.0]), y)).all()


def test_saved_it_is_one_of_ours(teacher: UNet, tmp_path: Path):
    teacher.save_pretrained(tmp_path)
    again = Network.from_pretrained(tmp_path)
    assert again.config == teacher.config
    assert differing(again.state_dict(), teacher.state_dict()) == []
    assert not any(isinstance(part, nn.Dropout) and part.p for part in again.modules())
    assert str(tmp_path.parent) not in again.config.foreign, "no path of the machine"
    assert "_name_or_path" not in again.config.foreign


# --- one step ---------------------------------------------------------------------------------------------------------

SHORT = {
    "training.batch": 16,
    "training.health_every": 64,
    "training.device": "cpu",
    "training.precision": "float32",
    "onestep.critic_warmup": 32,
    "onestep.measured": 16,
}


@pytest.mark.parametrize("method", ["score", "ratio"])
def test_a_teacher_becomes_a_one_step_generator(method: Any, teacher: UNet, tmp_path: Path):
    teacher.save_pretrained(tmp_path / "teacher")
    run = onefold.onestep(tmp_path / "teacher", data="digits", method=method, images=64, changes=SHORT, quiet=True)
    assert run.folder == tmp_path / f"teacher-{'onestep' if method == 'score' else method}"
    assert run.network.sample(3).shape == (3, 8, 8, 1)
    assert run.network.sampler.jumps
    changed = differing(run.network.state_dict(), teacher.state_dict())
    assert {"jump.vector", "body.conv_in.weight", "body.conv_out.weight", "labels.weight"} <= set(changed)
    assert run.config.start == str(tmp_path / "teacher")
    if method == "ratio":
        assert RatioNet.from_pretrained(run.folder / "ratio").config.half == run.config.network
        command = ["sample", str(run.folder), "-n", "2", "--best-of", "2", "--out", str(tmp_path / "best.png")]
        assert cli.run(command) == 0


def test_generator_student_and_ratio_network_begin_with_the_teacher_s_weights(teacher: UNet, tmp_path: Path):
    teacher.save_pretrained(tmp_path / "teacher")
    changes = {"onestep.method": "dmd", "onestep.score.adversarial": 1.0, **SHORT, "data.source": "digits"}
    config = converted(tmp_path / "teacher", images=64).with_changes(changes)
    assert (config.objective.label_dropout, config.training.images) == (0.0, 64)
    state = begun(config, teacher)
    critic, student = critic_of(state), critic_of(state).student
    assert student is not None
    assert critic.ratio is not None
    for network in (state.network, student, teacher_of(state)):
        assert differing(network.state_dict(), teacher.state_dict()) == []
    theirs = teacher.state_dict()
    own = {key.removeprefix("backbone.network."): value for key, value in critic.ratio.state_dict().items()}
    shared = {key: value for key, value in own.items() if key in theirs}
    assert "body.down_blocks.1.resnets.0.conv1.weight" in shared
    assert all(torch.equal(value, theirs[key]) for key, value in shared.items())


def test_a_network_in_memory_becomes_one_too(teacher: UNet, tmp_path: Path):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = onefold.onestep(teacher, tmp_path / "run", data="digits", images=48, changes=SHORT, quiet=True)
    assert run.network.sample(2).shape == (2, 8, 8, 1)
    assert run.config.start == "a network in memory"
    assert differing(before, teacher.state_dict()) == []


def test_a_teacher_that_knows_no_names_takes_those_of_the_data(teacher: UNet):
    names = tuple(f"class {k}" for k in range(10))
    config = of_network(teacher, images=6400).with_changes({"network.class_names": names})
    begun_from = phases_of(config)[0].begin_from(teacher)
    assert (begun_from.config.class_names, teacher.config.class_names) == (names, ())
    assert differing(begun_from.state_dict(), teacher.state_dict()) == []
    begun_from.config = dataclasses.replace(begun_from.config, class_names=names[::-1])
    with pytest.raises(UserError, match="its network is not this run's"):
        phases_of(config)[0].begin_from(begun_from)


def test_what_a_network_needs_to_learn_from_is_said(teacher: UNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    teacher.save_pretrained(tmp_path / "teacher")
    place = str(tmp_path / "teacher")
    assert cli.run(["onestep", place]) == 2
    said = f"onefold: --data: {place} is a network, not a run; give the images to learn from\n"
    assert capsys.readouterr().err == said
    with pytest.raises(UserError, match=r"^data: a network has no images of its own"):
        onefold.onestep(place)
    options = [
        "--training.device",
        "cpu",
        "--training.precision",
        "float32",
        "--images",
        "64",
        "--training.batch",
        "16",
    ]
    for more, words in [
        (["--onestep.critic-blocks", "2", "--method", "ratio"], "onestep.critic_blocks: UNet is halved, not cut"),
        (["--onestep.generator", "trunk"], "onestep.generator: UNet has no trunk; leave it at its default"),
        (["--onestep.critic-trains", "norms"], "onestep.critic_trains: UNet has no trunk"),
    ]:
        assert cli.run(["onestep", place, "--data", "digits", *options, *more]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"], "nothing is written"


# --- autoencoders -----------------------------------------------------------------------------------------------------


def small_codec(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
        return diffusers.AutoencoderKL(in_channels=1, out_channels=1, sample_size=8, **blocks, **sizes).eval()
    both: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        both |= {f"{half}_block_out_channels": (8, 16), f"{half}_layers_per_block": (1, 1)}
        both |= {f"{half}_block_types": ("ResBlock", "ResBlock"), f"{half}_qkv_multiscales": ((), ())}
    return diffusers.AutoencoderDC(in_channels=1, latent_channels=4, downsample_block_type="Conv", **both).eval()


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
@torch.no_grad()
def test_latents_are_those_of_the_autoencoder(kind: str, patch: int, tmp_path: Path):
    codec = small_codec(kind)
    codec.save_pretrained(tmp_path)
    network = adopt(tmp_path, classes=10, image_size=(8, 8), patch=patch, width=32, depth=1, heads=2)
    assert isinstance(network, FrozenCodec)
    assert network.config.latent_channels == 4 * (patch // 2) ** 2
    x, _ = batch(3)
    found = codec.encode(x)
    grid = found.latent_dist.mean if kind == "AutoencoderKL" else found.latent
    z = network.encode(x)
    torch.testing.assert_close(network.parted(z), grid)
    torch.testing.assert_close(network.decode(z), codec.decode(grid).sample)
    q = patch // 2
    torch.testing.assert_close(z[:, 1].unflatten(1, (4, q, q)), grid[:, :, :q, q : 2 * q], msg="the second token")
    mean, std = torch.randn(z.shape[2]), torch.rand(z.shape[2]) + 0.5
    network.normalise(mean, std)
    torch.testing.assert_close(network.encode(x), (z - mean) / std)
    torch.testing.assert_close(network.decode((z - mean) / std), codec.decode(grid).sample, atol=1e-4, rtol=0)


def test_the_baseline_trains_on_frozen_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    codec = small_codec("AutoencoderKL")
    randomised(codec)
    codec.save_pretrained(tmp_path / "vae")
    options = ["--classes", "10", "--size", "8", "--width", "32", "--depth", "1", "--heads", "2"]
    assert cli.run(["adopt", str(tmp_path / "vae"), "--out", str(tmp_path / "codec"), *options]) == 0
    assert "next, `onefold train RECIPE --from" in capsys.readouterr().out
    start = Network.from_pretrained(tmp_path / "codec")
    assert start.config.kind is FrozenCodec
    trained = sum(p.numel() for p in start.parameters())
    assert trained == sum(p.numel() for part in (start.body, start.exit, start.jump) for p in part.parameters())
    run = onefold.train(tiny(), tmp_path / "run", network=start, quiet=True)
    assert run.config.phases == ("diffusion",)
    changed = differing(run.network.state_dict(), start.state_dict())
    assert not [name for name in changed if name.startswith("codec.")]
    assert {"latent_mean", "latent_std", "body.entrance.weight", "exit.weight"} <= set(changed)
    z = run.network.encode(batch(1437)[0]).flatten(0, 1)
    assert z.mean(0).abs().max() < 1e-3
    assert (z.std(0) - 1).abs().max() < 1e-3
    assert run.network.sample(2, steps=2).shape == (2, 8, 8, 1)
    once = onefold.onestep(run, images=48, changes=SHORT, quiet=True)
    assert once.network.sample(2).shape == (2, 8, 8, 1)
    assert not [name for name in differing(once.network.state_dict(), start.state_dict()) if name.startswith("codec.")]


# --- what is refused --------------------------------------------------------------------------------------------------


ATTENDING = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}


def edited(folder: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    """A copy of a folder in which a JSON file says something else."""
    copied = tmp_path / "edited"
    shutil.copytree(folder, copied)
    described = json.loads((copied / file).read_text())
    (copied / file).write_text(json.dumps({**described, **changes}))
    return copied


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKL"]},
            "consists of .*vae; give a pipeline of a UNet2DModel",
        ),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "give a pipeline of a UNet2DModel"),
        ("unet/config.json", {"sample_size": None}, "sample_size is missing"),
        ("unet/config.json", {"in_channels": 4, "out_channels": 4}, "has 4 channels in and 4 out; only denoisers of"),
        ("unet/config.json", {"out_channels": 2}, "has 1 channels in and 2 out"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type and center_input_sample are not"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "its times are fourier, not the positions of DDPM"),
        ("unet/config.json", {"layers_per_block": 2}, "cannot be read .*size mismatch"),
        ("unet/config.json", ATTENDING, r"lacks weights \(down_blocks\.0\.attentions"),
        (
            "scheduler/scheduler_config.json",
            {"thresholding": True},
            "thresholding and prediction_type 'epsilon' are not",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow' are not supported"),
    ],
    ids=str,
)
def test_a_pipeline_that_is_no_ddpm_says_why(
    file: str, changes: dict[str, Any], said: str, pipeline: Path, tmp_path: Path
):
    folder = edited(pipeline, tmp_path, file, **changes)
    with pytest.raises(UserError, match=said) as error:
        adopt(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


def test_parts_and_other_files_say_what_to_give(pipeline: Path, tmp_path: Path):
    with pytest.raises(UserError, match="lacks the schedule that it was trained by; give the folder of the whole"):
        adopt(pipeline / "unet")
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(No such file or directory\)"):
        adopt(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match="holds VQModel; give the folder of a pipeline of a UNet2DModel"):
        adopt(tmp_path)
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    described = {key: value for key, value in json.loads(scheduler.read_text()).items() if "beta" not in key}
    folder = edited(pipeline, tmp_path, "model_index.json")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="DDPMScheduler has no schedule of betas, as DDPM has"):
        adopt(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(scheduler, folder / "scheduler" / "scheduler_config.json")
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match=r"save it anew as safetensors"):
        adopt(folder)


def test_without_the_library_one_line_says_how_to_get_it(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.run(["adopt", str(pipeline), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("onefold: diffusers: cannot be imported (")
    assert said.endswith("; pip install 'onefold[foreign]'\n")
    assert said.count("\n") == 1


def test_sizes_that_do_not_fit(teacher: UNet, tmp_path: Path):
    with pytest.raises(UserError, match=r"^network\.image_size: 8×7 cannot be halved as often as the U-Net does"):
        dataclasses.replace(teacher.config, image_size=(8, 7))
    with pytest.raises(UserError, match=r"^network\.channels: 3, but the U-Net takes 1"):
        dataclasses.replace(teacher.config, channels=3)
    small_codec("AutoencoderKL").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^network\.patch: 3 is not a multiple of 2"):
        adopt(tmp_path, image_size=(6, 6), patch=3)
    config = adopt(tmp_path, image_size=(8, 8)).config
    with pytest.raises(UserError, match=r"^network\.channels: 3, but the autoencoder takes 1"):
        dataclasses.replace(config, channels=3)
