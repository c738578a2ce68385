"""A run of two phases in one folder: a diffusion model, and then a one-step generator of it."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import onefold
from helpers_one_step import newest_of
from helpers_runs import differing, log, tiny
from onefold import cli, metrics
from onefold.errors import Interrupted
from onefold.objectives import one_step
from onefold.objectives.one_step import OneStep
from onefold.sampling import Sampler
from onefold.schedule import Schedule
from onefold.training import generator_monitor, loop, one_step_monitor
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.run import Run
from onefold.training.state import TrainingState
from onefold.training.step import training_step

FIRST, SECOND = 96, 112
SCHEDULE = Schedule(
    images=SECOND,
    learning_rate=5e-4,
    betas=(0.0, 0.99),
    weight_decay=0.0,
    warmup=0,
    decay=0.3,
    ema_half_lives=(32,),
    ema_ramp=1.0,
)


def two_phases(**changes: Any) -> Config:
    """Six steps of the first phase and seven of the second, in two of which the critic learns alone."""
    intervals = {"training__health_every": 32, "training__checkpoint_every": 48, "training__keep_last": 99}
    config = tiny(training__images=FIRST, **{**intervals, **changes})
    options = OneStep(method="ratio", critic_warmup=32, critic_rate=1e-3, measured=40, selects=True, schedule=SCHEDULE)
    phases = ("self_distillation", "one_step")
    return replace(config, phases=phases, onestep=options, sampler=Sampler(steps=1, solver="renoise"))


@pytest.fixture(scope="module", autouse=True)
def _set_up() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)  # other tests check shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_monitor, "PROBE", 48)
        patch.setattr(one_step_monitor, "PROBE", 48)
        patch.setattr(one_step_monitor, "LEVELS", (0.5,))
        patch.setattr(loop.curves, "write", lambda *arguments: None)
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


SELECTING: list[float] = []
"""Distances to a fifth of the training images, in the order of their measurement in the run that nothing stopped."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing stopped."""
    honest = metrics.frechet_from_moments

    def distance(reference: metrics.Moments, made: metrics.Moments) -> float:
        found = honest(reference, made)
        SELECTING.extend([found] if reference.n == 288 else [])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "frechet_from_moments", distance)
        return onefold.train(two_phases(), tmp_path_factory.mktemp("whole") / "run", quiet=True)


def saved(run: Run, images: int) -> dict[str, dict[str, Tensor]]:
    path = run.folder / "checkpoints" / f"{images:09d}"
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}


def same(run: Run, folder: Path) -> None:
    """To the bit, but for the times in the log."""
    assert differing(newest_of(run.folder), newest_of(folder)) == []
    states = [(checkpoints(each)[-1] / "state.json").read_text() for each in (run.folder, folder)]
    assert states[0] == states[1]
    assert log(run.folder) == log(folder)
    for path in (run.folder / "samples").iterdir():
        assert path.read_bytes() == (folder / "samples" / path.name).read_bytes()


def act_at(monkeypatch: pytest.MonkeyPatch, images: int, act: Callable[[], None], *, after: bool = False) -> None:
    """Do something before the step that begins after so many images, or after the one that ends there."""

    def acts(state: TrainingState, *rest: Any) -> dict[str, Tensor]:
        if state.counters.images == images and not after:
            act()
        values = training_step(state, *rest)
        if state.counters.images == images and after:
            act()
        return values

    monkeypatch.setattr(loop, "training_step", acts)


class Stop(Exception):
    pass


def die() -> None:
    raise Stop


# --- what it trains ---------------------------------------------------------------------------------------------------


def test_it_trains_one_after_the_other(whole: Run):
    assert (whole.length, whole.images) == (FIRST + SECOND, FIRST + SECOND)
    lines = {line["images"]: line for line in whole.history}
    assert list(lines) == [32, 64, 96, 128, 160, 192, 208]
    for images, line in lines.items():
        first = images <= FIRST
        kept = {"decoding", "encoding", "denoiser", "upkeep_norm", "upkeep_weight"}
        assert ({"health", "denoising", *kept} & line.keys()) == ({"health", "denoising"} if first else
            (kept if images > FIRST + 32 else set()))  # fmt: skip
        assert ("onestep" in line) == ("ratio" in line) == ("critic_norm" in line) == (not first)
        assert line["skipped"] == 0
    # Each has its own schedule: that of the first falls to 0 over its last half, that of the second over its last 30 %.
    rates = [line["rate_factor"] for line in lines.values()]
    assert rates == pytest.approx([1, (96 - 64) / 48, 0, 1, 1, 16 / (0.3 * SECOND), 0])


def test_the_teacher_is_what_the_first_phase_published(whole: Run):
    before, after = saved(whole, FIRST), saved(whole, FIRST + SECOND)
    assert before.keys() == {"network", "average-0", "average-1", "optimizer"}
    assert after.keys() == {"network", "average-0", "optimizer", "teacher", "critic", "best"}
    teacher = before["average-1"]
    assert differing(before["network"], teacher), "not the weights that it was trained with"
    for images in (144, 192, FIRST + SECOND):
        assert differing(saved(whole, images)["teacher"], teacher) == []
    assert differing(after["network"], teacher)
    assert {key.split("/")[0] for key in after["optimizer"]} == {"network", "critic"}
    assert {key.split("/")[0] for key in before["optimizer"]} == {"network"}


def test_a_one_step_generator_is_published(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured = dict(zip([line["images"] for line in whole.history if "onestep" in line], SELECTING, strict=True))
    state = json.loads((checkpoints(whole.folder)[-1] / "state.json").read_text())["counters"]
    assert state["phase"] == 1
    assert (state["best_images"], state["best"]) == min(measured.items(), key=lambda pair: pair[1])
    published, last = load_file(whole.folder / "model" / "model.safetensors"), saved(whole, FIRST + SECOND)
    assert differing(published, last["best"]) == []
    ratio = load_file(whole.folder / "ratio" / "model.safetensors")
    assert differing(ratio, {k.removeprefix("ratio."): v for k, v in last["critic"].items() if k[:6] == "ratio."}) == []
    assert whole.network.sampler == Sampler(steps=1, solver="renoise", start=whole.config.onestep.start)
    assert (
        cli.run(["sample", str(whole.folder), "--n", "4", "--best-of", "2", "--out", str(tmp_path / "grid.png")]) == 0
    )
    assert "4 images, 1 step" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["solver"] == "renoise"


def test_the_first_phase_is_a_run_of_its_own(whole: Run, tmp_path: Path):
    """To the bit: what comes after it changes nothing in it."""
    config = replace(two_phases(), phases=("self_distillation",))
    alone = onefold.train(config, tmp_path / "run", quiet=True)
    before, found = saved(whole, FIRST), saved(alone, FIRST)
    assert before.keys() == found.keys()
    for name in before:
        assert differing(before[name], found[name]) == []
    assert [line["onestep" if "onestep" in line else "health"] for line in log(whole.folder)[:3]] == [
        line["health"] for line in log(alone.folder)
    ]


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "last"), [(64, 48), (96, 96), (112, 96), (144, 144), (176, 144)])
def test_a_killed_run_goes_on_to_the_bit(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, last: int
):
    """Inside each phase, where the second begins, and one step into it."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        act_at(patch, at, die)
        with pytest.raises(Stop):
            onefold.train(two_phases(), folder, quiet=True)
    assert int(checkpoints(folder)[-1].name) == last
    onefold.train(None, folder, resume=True, quiet=True)
    same(whole, folder)


def test_a_run_stopped_by_signals_goes_on_to_the_bit(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Amid a phase, exactly at its end, and after the first step of the second; always the same folder."""
    folder = tmp_path / "run"
    for place in (80, FIRST, FIRST + 16, 160):
        resume = folder.exists()
        with monkeypatch.context() as patch:
            act_at(patch, place, lambda: signal.raise_signal(signal.SIGTERM), after=True)
            with pytest.raises(Interrupted, match=rf"stopped at {place} of 208 images, saved"):
                onefold.train(None if resume else two_phases(), folder, resume=resume, quiet=True)
        described = json.loads((checkpoints(folder)[-1] / "state.json").read_text())
        assert described["counters"]["images"] == place
        assert described["counters"]["phase"] == (place > FIRST)
    onefold.train(None, folder, resume=True, quiet=True)
    same(whole, folder)


def test_an_earlier_phase_may_be_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten steps fail from the second phase's first on: the newest good checkpoint is one of the first phase."""
    schedule = replace(SCHEDULE, images=320)
    config = two_phases(training__health_every=10_000).with_changes({"onestep.schedule": schedule})
    honest, calls = one_step.ratio_loss, list[Tensor]()

    def loss(ratio: Any, real: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(real.clone())
        total, parts = honest(ratio, real, *rest, **named)
        return (total * torch.nan if len(calls) <= 10 else total), parts

    monkeypatch.setattr(one_step, "ratio_loss", loss)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert torch.equal(calls[10], calls[0]), "the same images again, by the same teacher"
    described = json.loads((checkpoints(run.folder)[-1] / "state.json").read_text())["counters"]
    assert (described["images"], described["phase"]) == (FIRST + 320, 1)
    assert (described["skipped"], described["rollbacks"]) == (10, 1)
    assert [line["images"] for line in run.history] == list(range(32, FIRST + 321, 32))
    assert all(value.isfinite().all() for value in newest_of(run.folder).values())


def test_a_finished_run_stays_as_it_is(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
