"""Phases by name and place, and a phase of one's own, registered from outside the package."""

import inspect
from pathlib import Path

import pytest
from torch import Tensor

import onefold
from helpers_runs import differing, log, newest, tiny
from onefold.cli import run as command
from onefold.errors import UserError
from onefold.networks import Network
from onefold.objectives.losses import Losses
from onefold.objectives.self_distillation import DenoisingDraws
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.phases import PHASES, length, phase_at, phases_of, register
from onefold.training.step import training_step

BUILT_IN = ("self_distillation", "autoencoder", "diffusion", "one_run", "one_step")


class Centred(SelfDistillationPhase):
    """Self-distillation, and the mean of the latents is drawn to 0."""

    def loss(self, network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        losses = super().loss(network, target, x, y, draws)
        centre = draws.span.share * network.encode(x).mean((1, 2)).square().mean()
        return Losses(losses.total + 0.5 * centre, {**losses.parts, "centre": centre.detach()})


pytestmark = pytest.mark.usefixtures("phases_as_before")


# --- of one's own -----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("micro", [None, 5])
def test_a_phase_from_outside_trains_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, micro: int | None):
    register("centred")(Centred)
    assert len(inspect.getsource(Centred).splitlines()) < 50
    config = tiny(phases=("centred",), training__micro_batch=micro)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert run.config.phases == ("centred",)
    assert all(0 <= line["centre"] < 1 for line in run.history)
    plain = onefold.train(config.with_changes({"phases": ()}), tmp_path / "plain", quiet=True)
    assert run.history[-1]["centre"] < run.history[0]["centre"]
    assert "network.safetensors patches_in.weight" in [
        name.split(" ", 1)[1] for name in differing(newest(run.folder), newest(plain.folder))
    ]

    def dies(state, *rest):
        if state.counters.images == 64:
            raise Stop
        return training_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", dies)
        with pytest.raises(Stop):
            onefold.train(config, tmp_path / "cut", quiet=True)
    assert checkpoints(tmp_path / "cut")[-1].name == "000000048"
    del PHASES["centred"]
    phases_of.cache_clear()
    with pytest.raises(UserError, match=r"^phases: 'centred' is not known; choose from self_dist.*, one_step$"):
        onefold.train(None, tmp_path / "cut", resume=True, quiet=True)
    register("centred")(Centred)
    cut = onefold.train(None, tmp_path / "cut", resume=True, quiet=True)
    assert differing(newest(run.folder), newest(cut.folder)) == []
    assert log(run.folder) == log(cut.folder)


def test_the_command_takes_it(tmp_path: Path):
    register("centred")(Centred)
    tiniest = "--steps 1 --network.width 32 --network.depth 1 --network.heads 2 --training.device cpu --quiet"
    out = tmp_path / "run"
    assert command(["train", "digits", "--phases", "centred", "--out", str(out), *tiniest.split()]) == 0
    assert "centre" in onefold.load_run(out).history[0]


def test_after_a_phase_of_the_package(tmp_path: Path):
    """Two phases of ten steps each; the second begins with what the first published, and rates of its own."""
    register("centred")(Centred)
    run = onefold.train(tiny(phases=("self_distillation", "centred")), tmp_path / "run", quiet=True)
    assert run.length == 320
    assert ["centre" in line for line in run.history] == [False] * 5 + [True] * 5
    rates = [line["rate_factor"] for line in run.history]
    assert rates == pytest.approx([1, 1, 0.8, 0.4, 0.0] * 2)


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_phases_of_the_package():
    assert tuple(PHASES) == BUILT_IN
    assert [PHASES[name].name for name in BUILT_IN] == list(BUILT_IN)


def test_an_unknown_phase_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"^phases: 'distillation' is not known; choose from self_distillation, "
    ) as caught:
        onefold.train(tiny(phases=("distillation",)), out, quiet=True)
    assert "\n" not in str(caught.value)
    assert command(["train", "digits", "--phases", "distillation", "--out", str(out), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "phases: 'distillation' is not known" in captured.err
    assert not out.exists()


def test_a_name_is_given_once():
    register("centred")(Centred)
    register("centred")(Centred)  # the same once more, as where a module is imported twice
    with pytest.raises(UserError, match=r"^phase 'centred': is already registered; choose another name$"):
        register("centred")(type("Other", (SelfDistillationPhase,), {}))
    with pytest.raises(UserError, match=r"^phase 'one_step': is already registered"):
        register("one_step")(Centred)
    assert PHASES["centred"] is Centred
    assert Centred.name == "centred"


# --- places -----------------------------------------------------------------------------------------------------------


def test_phases_are_of_whole_batches():
    config = tiny(phases=("self_distillation",) * 3, training__images=100)
    assert [phase.start for phase in phases_of(config)] == [0, 112, 224]
    assert length(config) == 336
    found = [phase_at(images, config).index for images in (0, 96, 112, 223, 224, 1000)]
    assert found == [0, 0, 1, 1, 2, 2]
