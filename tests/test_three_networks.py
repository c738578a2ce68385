"""The baseline: three networks of their own, trained in two stages."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import onefold
from conftest import randomised
from helpers_runs import batch, differing, fresh, log, newest, tensors, tiny
from onefold.cli import run as command
from onefold.data import Dataset, open_dataset, read_all
from onefold.errors import UserError
from onefold.networks import Network, NetworkConfig, OneFold, build, parameter_shares
from onefold.networks.base import forward_flops
from onefold.networks.three_networks import Depths, ThreeNetworks, depths
from onefold.objectives.self_distillation import SelfDistillation, draw
from onefold.objectives.two_stages import TwoStages, autoencoder, diffusion
from onefold.pixels import to_float
from onefold.recipes import RECIPES, recipe
from onefold.training import latent_diffusion, loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.interruption import Interruption
from onefold.training.loop import Trainer
from onefold.training.phases import phase_at, phases_of, training_flops
from onefold.training.progress import ImageProgress
from onefold.training.run import Run
from onefold.training.state import TrainingState
from onefold.training.step import training_step

THREE = NetworkConfig(width=32, depth=3, heads=2, architecture="three_networks")
ENCODER, DECODER = ("encoder.", "norm."), ("decoder.",)
DENOISER = ("denoiser.", "time.", "labels.", "modulation.")
GENERATOR = (*DENOISER, "jump.")


def network(seed: int = 0, **changes: object) -> ThreeNetworks:
    net = randomised(ThreeNetworks(dataclasses.replace(THREE, **changes)), seed).eval()
    net.normalise(torch.linspace(-0.5, 0.5, net.config.latent_channels), torch.tensor(0.7).expand(4))
    return net


def three(**changes: object) -> Config:
    """Ten steps of 16 digits, five in each stage."""
    changes = {"network__depth": 3, "network__architecture": "three_networks"} | changes
    return tiny(**changes)


def trainer(state: TrainingState, config: Config, folder: Path) -> Trainer:
    """What takes the steps of a run on the digits from this state."""
    run = Run(folder, config, (open_dataset("digits"), open_dataset("digits:test")))
    return Trainer(run, state, torch.device("cpu"), Interruption(), ImageProgress("", 1, quiet=True))


def step(trainer: Trainer, images: int) -> None:
    """Enter the phase that is due, and take a step on the digits from number `images` on."""
    trainer.enter_phase()
    training_step(trainer.state, *batch(start=images), trainer.config)


def reached(net: Network, loss: Tensor) -> set[str]:
    """First parts of the names of the parameters that have any gradient, be it zero."""
    names, params = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return {name.split(".")[0] for name, g in zip(names, gradients, strict=True) if g is not None}


# --- sizes ---


@pytest.mark.parametrize("name", RECIPES)
def test_three_networks_have_the_parameters_of_the_one(name: str):
    config = recipe(name).network
    with torch.device("meta"):
        one, others = build(config), build(dataclasses.replace(config, architecture="three_networks"))
    assert isinstance(one, OneFold)
    assert isinstance(others, ThreeNetworks)
    sizes = parameter_shares(one), parameter_shares(others)
    assert sizes[1]["parameters"] == pytest.approx(sizes[0]["parameters"], rel=0.01)
    assert sizes[1]["share"] == 0


@pytest.mark.parametrize(("depth", "dealt"), [(3, (1, 1, 1)), (4, (1, 2, 1)), (6, (1, 4, 1)), (16, (4, 8, 4))])
def test_blocks_are_dealt_out(depth: int, dealt: tuple[int, int, int]):
    config = dataclasses.replace(THREE, depth=depth)
    assert depths(config) == Depths(*dealt)
    found = [len(trunk.blocks) for trunk in ThreeNetworks(config).trunks]
    assert found == list(dealt)
    assert sum(found) == depth


def test_or_each_has_the_compute_of_the_one():
    config = dataclasses.replace(THREE, depth=2, equal="compute")
    assert [len(trunk.blocks) for trunk in ThreeNetworks(config).trunks] == [2, 2, 2]
    one = dataclasses.replace(config, architecture="one_network")
    both = [each.kind.role_flops(each).sample(50) for each in (config, one)]
    assert both == [51 * forward_flops(one)] * 2


def test_too_few_blocks_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"^network\.depth: 2 cannot be split among three networks; give at least 3"):
        dataclasses.replace(THREE, depth=2)


def test_arithmetic_of_the_stages():
    deep = dataclasses.replace(THREE, depth=8, equal="compute")
    one = forward_flops(deep)
    config = tiny(network=deep, objective__draws=2, stages__autoencoder=0.25, training__images=320)
    assert training_flops(config) == pytest.approx((0.25 * 6 + 0.75 * 7) * one)
    whole = training_flops(config.with_changes({"network.architecture": "one_network"}))
    assert whole == pytest.approx(13 * one)


# --- roles ---


def test_roles_have_parameters_of_their_own():
    net, x, z = network(latent_norm="layer_norm"), batch(3)[0], torch.randn(3, 16, 4)
    t, y = torch.rand(3), torch.tensor([1, 5, 10])
    roles = {
        "encode": (net.encode(x).tanh(), ENCODER),
        "denoise": (net.denoise(z, t, y), DENOISER),
        "generate": (net.generate(z, t, y), GENERATOR),
        "decode": (net.decode(z), DECODER),
    }
    everything = {name.split(".")[0] + "." for name, _ in net.named_parameters()}
    assert everything == {*ENCODER, *DECODER, *GENERATOR}
    for role, (out, own) in roles.items():
        assert reached(net, out.square().sum()) == {name[:-1] for name in own}, role


def test_shapes_are_those_of_one_network():
    net, x = network(), batch(2)[0]
    z = net.encode(x)
    assert z.shape == (2, 16, 4)
    assert net.decode(z).shape == x.shape
    assert [h.shape for h in net.features(x)] == [(2, 16, 32)]
    t, y = torch.rand(2), torch.tensor([1, 10])
    x_hat, z_hat = net.decode_and_denoise(z[:1], z, t, y)
    torch.testing.assert_close(x_hat, net.decode(z[:1]))
    torch.testing.assert_close(z_hat, net.denoise(z, t, y))
    torch.testing.assert_close(net.denoise(z, t), net.denoise(z, t, torch.tensor([10, 10])))


def test_velocity_exit_is_converted_to_the_clean_latent():
    z_t, t = torch.randn(3, 16, 4), torch.tensor([0.0, 0.5, 1.0])
    v, z_hat = network(output="clean").denoise(z_t, t), network(output="velocity").denoise(z_t, t)
    torch.testing.assert_close(z_hat, z_t + (1 - t[:, None, None]) * v)


def test_the_normaliser_is_shared_by_encoder_and_decoder():
    net, x = network(), batch(8)[0]
    plain = network()
    plain.normalise(torch.zeros(4), torch.ones(4))
    z, raw = net.encode(x), plain.encode(x)
    torch.testing.assert_close(z * net.latent_std + net.latent_mean, raw)
    torch.testing.assert_close(raw.square().mean(2), torch.ones(8, 16), atol=1e-3, rtol=0)
    torch.testing.assert_close(net.decode(z), plain.decode(raw), atol=1e-5, rtol=1e-5)
    assert (net.decode(z) - plain.decode(z)).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "solver": "heun"}], ids=["euler", "heun"])
def test_samples_do_not_depend_on_batch_or_number(options: dict[str, object]):
    net = network()
    whole = net.sample(16, steps=3, seed=5, **options).astype(int)
    assert whole.std() > 0
    assert np.abs(net.sample(16, steps=3, seed=5, batch=5, **options) - whole).max() <= 1
    assert np.abs(net.sample(3, steps=3, seed=9, **options) - whole[4:7]).max() <= 1


# --- files ---


def test_save_and_load_is_bitwise_and_finds_the_architecture(tmp_path: Path):
    net = network()
    net.save_pretrained(tmp_path)
    found = Network.from_pretrained(tmp_path)
    assert isinstance(found, ThreeNetworks)
    assert found.config == net.config
    assert differing(found.state_dict(), net.state_dict()) == []
    assert {"latent_mean", "latent_std"} <= found.state_dict().keys()
    assert np.array_equal(found.sample(2, steps=2), net.sample(2, steps=2))
    with pytest.raises(UserError, match=r"holds ThreeNetworks, not OneFold; load it with ThreeNetworks\.from_pretr"):
        OneFold.from_pretrained(tmp_path)


# --- objectives ---


def test_each_stage_reaches_its_own_networks_alone():
    net, (x, y) = network(), batch(4)
    draws = draw(SelfDistillation(draws=2), 4, (16, 4), torch.Generator().manual_seed(0))
    first = autoencoder(net, net, x, draws, SelfDistillation(), TwoStages())
    second = diffusion(net, x, y, draws, SelfDistillation())
    assert reached(net, first.total) == {"encoder", "decoder"}
    assert reached(net, second.total) == {name[:-1] for name in DENOISER}
    assert first.parts.keys() == {"reconstruction"}
    assert second.parts.keys() == {"denoising"}


def test_the_losses_are_what_they_say():
    net, (x, y) = network(), batch(4)
    objective, settings = SelfDistillation(draws=2, denoising_weight=3.0), TwoStages(latent_noise=0.3)
    draws = draw(objective, 4, (16, 4), torch.Generator().manual_seed(0))
    z = net.encode(x)

    x_hat = net.decode(z + 0.3 * draws.decoder_eps)
    found = autoencoder(net, net, x, draws, objective, settings)
    torch.testing.assert_close(found.total, (x_hat - x).square().mean())

    errors = []
    for k in range(2):
        t = draws.t[:, k, None, None]
        labels = torch.where(draws.unlabelled[:, k], 10, y)
        z_hat = net.denoise(t * z + (1 - t) * draws.eps[:, k], draws.t[:, k], labels)
        errors.append((z_hat - z).square().mean())
    found = diffusion(net, x, y, draws, objective)
    torch.testing.assert_close(found.total, 3 * torch.stack(errors).mean())
    torch.testing.assert_close(found.total, 3 * found.parts["denoising"])


@pytest.mark.parametrize("changes", [{"autoencoder": 0.0}, {"autoencoder": 1.0}, {"latent_noise": -0.1}], ids=str)
def test_impossible_stages_are_refused_in_one_line(changes: dict[str, float]):
    with pytest.raises(UserError, match=rf"^stages\.{next(iter(changes))}: "):
        TwoStages(**changes)


# --- stages ---


def test_stages_are_a_function_of_the_images():
    one, config = tiny(), three(stages__autoencoder=0.25)
    (joint,) = {phase_at(images, one) for images in (0, 80, 160)}
    assert (joint.name, joint.start, joint.schedule) == ("self_distillation", 0, one.training)
    places = [phase_at(images, config) for images in (0, 31, 32, 160)]
    found = [(phase.name, phase.start, phase.schedule.images) for phase in places]
    assert found == [("autoencoder", 0, 32)] * 2 + [("diffusion", 32, 128)] * 2


def test_the_schedule_begins_anew_with_the_stage(tmp_path: Path):
    config = three()
    run, rates = trainer(fresh(config), config, tmp_path), []
    for k in range(10):
        step(run, 16 * k)
        rates.append(run.state.optimizers["network"][0].param_groups[0]["lr"] / config.training.learning_rate)
    half = dataclasses.replace(config.training, images=80)
    assert rates == pytest.approx([half.rate_factor(16 * k, 16) for k in range(5)] * 2)
    # An average of half-life 32 at 16 images: 0.1 · 16 images of ramp, of which a step of 16 leaves 2⁻¹⁰.
    first = fresh(config)
    first.counters.images = 80
    first.enter(phases_of(config)[1])
    before = first.network.time.weight.clone()
    training_step(first, *batch(), config)
    moved = first.network.time.weight - before
    torch.testing.assert_close(first.averages[0].time.weight - before, (1 - 2**-10) * moved, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_a_stage_does_not_train_stays_as_it_is_to_the_bit(optimizer: str, tmp_path: Path):
    config = three(training__optimizer=optimizer)
    state = fresh(config)
    run = trainer(state, config, tmp_path)

    def moved(steps: int) -> set[str]:
        before = {name: p.clone() for name, p in state.network.named_parameters()}
        for k in range(steps):
            training_step(state, *batch(start=16 * k), config)
        assert all(p.grad is None for p in state.network.parameters())
        return {name.split(".")[0] for name in differing(before, dict(state.network.named_parameters()))}

    run.enter_phase()
    assert moved(5) == {"encoder", "decoder"}
    run.enter_phase()
    frozen = {name: value.clone() for name, value in state.network.state_dict().items()}
    assert moved(5) == {name[:-1] for name in DENOISER}
    for net in (state.network, *state.averages):
        kept = [name for name in frozen if name.startswith((*ENCODER, *DECODER, "latent"))]
        assert differing({k: frozen[k] for k in kept}, {k: net.state_dict()[k] for k in kept}) == []


def test_the_change_takes_over_the_average_and_measures_its_latents(tmp_path: Path):
    config, data = three(), open_dataset("digits")
    state = fresh(config)
    run = trainer(state, config, tmp_path)
    for k in range(5):
        step(run, 16 * k)
    published = {name: value.clone() for name, value in state.published.state_dict().items()}
    assert differing(published, state.network.state_dict())
    run.enter_phase()
    assert all(not optimizer.state for optimizer in state.optimizers["network"]), "moments begin anew"
    for net in (state.network, *state.averages):
        assert differing(published, net.state_dict()) == ["latent_mean", "latent_std"]
    with torch.no_grad():
        z = state.network.encode(to_float(read_all(data)[0])).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("images", [0, 64, 96, 160])
def test_elsewhere_nothing_is_entered(images: int, tmp_path: Path):
    for config in (tiny(), three()):
        state = fresh(config)
        state.enter(phase_at(images, config))
        training_step(state, *batch(), config)
        state.counters.images = images
        before = tensors(state)
        trainer(state, config, tmp_path).enter_phase()
        assert differing(before, tensors(state)) == []


# --- runs ---


class Stop(Exception):
    pass


RESUMED = three(training__optimizer="muon", training__log_every=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> onefold.Run:
    """The run that nothing stopped."""
    return onefold.train(RESUMED, tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.mark.parametrize("stop", [64, 80, 96], ids=["before", "at the change", "after"])
def test_a_resumed_run_is_the_same_to_the_bit(
    stop: int, whole: onefold.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stages change at 80 images; the last checkpoint before the process dies is at `stop`."""

    def dies(state: TrainingState, *rest: object) -> dict[str, Tensor]:
        if state.counters.images == stop:
            raise Stop
        return training_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", dies)
        with pytest.raises(Stop):
            onefold.train(RESUMED.with_changes({"training.checkpoint_every": stop}), tmp_path / "cut", quiet=True)
    assert checkpoints(tmp_path / "cut")[-1].name == f"{stop:09d}"
    cut = onefold.train(None, tmp_path / "cut", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(cut.folder)) == []
    assert log(whole.folder) == log(cut.folder)


def test_each_stage_logs_its_own_loss(tmp_path: Path):
    run = onefold.train(three(), tmp_path / "run", quiet=True)
    parts = [{"reconstruction", "denoising"} & line.keys() for line in run.history]
    assert parts == [{"reconstruction"}] * 2 + [{"reconstruction", "denoising"}] + [{"denoising"}] * 2
    assert all(0.05 < value < 20 for line in run.history for name, value in line.items() if name in parts[2])


def test_a_run_ends_with_normalised_latents(whole: onefold.Run):
    assert isinstance(whole.network, ThreeNetworks)
    with torch.no_grad():
        z = whole.network.encode(to_float(read_all(open_dataset("digits"))[0])).flatten(0, 1)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(4), atol=1e-4, rtol=0)


def test_the_measured_images_are_spread_over_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: list[list[int]] = []
    honest, data = latent_diffusion.read_all, open_dataset("digits")

    def read(data: Dataset, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        seen.append(chosen.tolist())
        return honest(data, chosen)

    monkeypatch.setattr(latent_diffusion, "read_all", read)
    monkeypatch.setattr(latent_diffusion, "MEASURED", 10)
    config = three()
    run = trainer(fresh(config), config, tmp_path)
    run.state.counters.images = 80
    run.enter_phase()
    assert seen == [[round(k * (len(data) - 1) / 9 - 0.499) for k in range(10)]]


def test_on_the_command_line(tmp_path: Path):
    run = str(tmp_path / "run")
    options = f"--out {run} --quiet --network.width 32 --network.heads 2 --training.images 320 --training.batch 16"
    assert command(["train", "digits", "--architecture", "three-networks", *options.split()]) == 0
    assert onefold.load_run(run).config.network.architecture == "three_networks"
    assert command(["sample", run, "--n", "4", "--steps", "2", "--out", str(tmp_path / "samples.png")]) == 0
    assert command(["reconstruct", run, "digits:test", "--out", str(tmp_path / "both.png")]) == 0
    assert command(["evaluate", run, "--images", "40", "--steps", "1", "--quiet"]) == 0
    assert len(list((tmp_path / "run" / "evaluation").glob("*.json"))) == 1
