"""One-step runs from beginning to end: interrupted and resumed, the best checkpoint, commands, what is refused."""

import functools
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import onefold
from data_images import noise
from helpers_one_step import newest_of, one_step_from
from helpers_runs import differing, log, tiny
from onefold import cli, metrics
from onefold.errors import Interrupted, TrainingAborted, UserError
from onefold.files import write_tensors
from onefold.metrics import Record
from onefold.networks import RatioNet
from onefold.networks.jump import RANK
from onefold.objectives import one_step
from onefold.training import generator_monitor, loop, one_step_monitor
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.conversion import converted
from onefold.training.one_step_monitor import OneStepMonitor
from onefold.training.run import Run, load_run
from onefold.training.state import Counters, TrainingState
from onefold.training.step import training_step

DISTANCES = {32: 5.0, 64: 3.0, 96: 4.0, 128: 2.0, 160: 2.5}
"""Made up, by the images seen, to the images that select: the best is measured between two checkpoints, twice."""
LONGEST = 10.0
"""Less that distance, the one to all training images: selecting by it would find the others."""
CHANGES = {
    "training__health_every": 32,
    "onestep__renoised": 0.2,
    "onestep__ratio__level_normalised": True,
    "training__keep_last": 9,
}
METHODS = {"ratio": {}, "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5}}


@pytest.fixture(scope="module", autouse=True)
def _set_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up distances on digits; classifiers of other data that are hardly trained, in a cache of their own."""
    look, distance = OneStepMonitor.look, metrics.frechet_from_moments
    looking: list[tuple[OneStepMonitor, int]] = []

    def looked(self: OneStepMonitor, state: TrainingState, *rest: Any) -> dict[str, Any]:
        looking.append((self, state.counters.images))
        try:
            return look(self, state, *rest)
        finally:
            looking.pop()

    def measured(reference: metrics.Moments, made: metrics.Moments) -> float:
        honest = distance(reference, made)
        if not looking:
            return honest
        monitor, at = looking[-1]
        found = DISTANCES.get(at, honest)
        return found if reference is monitor.selection else LONGEST - found

    jaxtyping.config.update("jaxtyping_disable", True)  # a third of the time, and other tests check shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneStepMonitor, "look", looked)
        patch.setattr(metrics, "frechet_from_moments", measured)
        patch.setattr(generator_monitor, "PROBE", 48)
        patch.setattr(one_step_monitor, "PROBE", 48)
        patch.setattr(one_step_monitor, "LEVELS", (0.5,))
        patch.setattr(loop.curves, "write", lambda *arguments: None)
        patch.setenv("ONEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))
        yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return onefold.train(tiny(training__images=32), tmp_path_factory.mktemp("teacher") / "run", quiet=True)


@pytest.fixture(scope="module")
def wholes(teacher: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The runs that nothing stopped, by their method."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def whole(method: str) -> Run:
        return onefold.train(one_step_from(teacher.folder, **CHANGES, **METHODS[method]), folder / method, quiet=True)

    return whole


@pytest.fixture
def whole(wholes: Callable[[str], Run]) -> Run:
    return wholes("ratio")


@pytest.fixture
def given(teacher: Run, tmp_path: Path) -> Path:
    """A copy of the teacher, to be spoilt."""
    shutil.copytree(teacher.folder, tmp_path / "given")
    return tmp_path / "given"


def counters(folder: Path) -> dict[str, Any]:
    return json.loads((checkpoints(folder)[-1] / "state.json").read_text())["counters"]


def same(run: Run, folder: Path) -> None:
    """To the bit, but for the times in the log."""
    assert differing(newest_of(run.folder), newest_of(folder)) == []
    assert counters(run.folder) == counters(folder)
    assert log(run.folder) == log(folder)
    for path in (run.folder / "samples").iterdir():
        assert path.read_bytes() == (folder / "samples" / path.name).read_bytes()
    assert not list(folder.rglob(".*"))


# --- resume -----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped(config: Config, folder: Path, at: int) -> None:
    """A run whose process dies when it has seen `at` images."""

    def dies(state: TrainingState, *rest: Any) -> dict[str, Tensor]:
        if state.counters.images == at:
            raise Stop
        return training_step(state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", dies)
        with pytest.raises(Stop):
            onefold.train(config, folder, quiet=True)


@pytest.mark.parametrize(
    ("method", "at", "saved"),
    [("ratio", 16, 0), ("ratio", 80, 48), ("ratio", 128, 96), ("adversarial", 144, 144)],
)
def test_a_resumed_run_is_the_same_to_the_bit_without_its_teacher_s_folder(
    wholes: Callable[[str], Run], given: Path, tmp_path: Path, method: str, at: int, saved: int
):
    """Best at 64 and again at 128 images, checkpoints at 0, 48, 96 and 144, the generator moves from 32 on."""
    folder = tmp_path / "run"
    stopped(one_step_from(given, **CHANGES, **METHODS[method]), folder, at)
    assert int(checkpoints(folder)[-1].name) == saved
    shutil.rmtree(given)
    onefold.train(None, folder, resume=True, quiet=True)
    same(wholes(method), folder)


def test_a_run_stopped_by_signals_is_the_same_to_the_bit(whole: Run, given: Path, tmp_path: Path):
    """Amid the warm-up, amid a log line, and just where the best has been measured."""
    folder = tmp_path / "run"
    for place in (16, 80, 128):

        def signalled(state: TrainingState, *rest: Any, place: int = place) -> dict[str, Tensor]:
            values = training_step(state, *rest)
            if state.counters.images == place:
                signal.raise_signal(signal.SIGTERM)
            return values

        resume = (folder / "config.json").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "training_step", signalled)
            with pytest.raises(Interrupted, match=rf"stopped at {place} of 160 images, saved; go on with --resume"):
                onefold.train(one_step_from(given, **CHANGES), folder, resume=resume, quiet=True)
        assert checkpoints(folder)[-1].name == f"{place:09d}"
    onefold.train(None, folder, resume=True, quiet=True)
    same(whole, folder)


def test_a_finished_run_stays_as_it_is(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert cli.run(["train", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_kill_before_the_model_was_published_changes_nothing(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "ratio")
    onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    same(whole, tmp_path / "run")


# --- the teacher's copy, which every checkpoint has -------------------------------------------------------------------


def dying(monkeypatch: pytest.MonkeyPatch, config: Config, folder: Path) -> None:
    """A run whose process dies while it writes the teacher into its first checkpoint."""

    def dies(values: dict[str, Tensor], path: Path) -> None:
        if Path(path).stem == "teacher":
            Path(path).write_bytes(b"half")
            raise Stop
        write_tensors(values, path)

    with monkeypatch.context() as patch:
        patch.setattr("onefold.training.pieces.write_tensors", dies)
        with pytest.raises(Stop):
            onefold.train(config, folder, quiet=True)
    assert checkpoints(folder) == []
    assert list((folder / "checkpoints").glob(".writing-*"))


def test_a_half_written_copy_of_the_teacher_is_written_anew(
    whole: Run, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    dying(monkeypatch, one_step_from(given, **CHANGES), folder)
    onefold.train(None, folder, resume=True, quiet=True)
    assert checkpoints(folder)[0].name == "000000000"
    same(whole, folder)


def test_without_a_whole_copy_the_teacher_is_asked_for_by_its_name(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    dying(monkeypatch, one_step_from(given, **CHANGES), tmp_path / "run")
    shutil.rmtree(given)
    assert cli.run(["train", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(given) in said


def test_a_checkpoint_without_the_teacher_is_none(whole: Run, given: Path, tmp_path: Path):
    stopped(one_step_from(given, **CHANGES), tmp_path / "run", 64)
    (checkpoints(tmp_path / "run")[-1] / "teacher.safetensors").unlink()
    assert checkpoints(tmp_path / "run")[-1].name == "000000000", "so it goes on from the one before"
    onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    same(whole, tmp_path / "run")


def test_a_damaged_copy_is_one_line(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stopped(one_step_from(given, **CHANGES), tmp_path / "run", 64)
    path = checkpoints(tmp_path / "run")[-1] / "teacher.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert cli.run(["train", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run/checkpoints/000000048: teacher.safetensors is damaged" in said


def test_the_teacher_stays_as_it_is(teacher: Run, whole: Run):
    theirs = load_file(teacher.folder / "model" / "model.safetensors")
    for path in checkpoints(whole.folder):
        assert differing(load_file(path / "teacher.safetensors"), theirs) == []
    assert len(differing(load_file(whole.folder / "model" / "model.safetensors"), theirs)) > 10
    assert not (teacher.folder / "ratio").exists()


# --- the best checkpoint ----------------------------------------------------------------------------------------------


def test_the_published_model_is_the_one_of_the_least_distance(whole: Run, given: Path, tmp_path: Path):
    """With a checkpoint at each measurement, to see them all; what is measured does not depend on them."""
    run = onefold.train(one_step_from(given, **CHANGES, training__checkpoint_every=32), tmp_path / "run", quiet=True)
    assert [line["onestep"]["frechet"] for line in run.history] == [LONGEST - d for d in DISTANCES.values()]
    found = counters(run.folder)
    assert (found["best"], found["best_images"]) == (2.0, 128)
    kept = {int(path.name): path for path in checkpoints(run.folder)}
    best = load_file(kept[128] / "average-1.safetensors")
    assert differing(load_file(run.folder / "model" / "model.safetensors"), best) == []
    assert differing(load_file(kept[160] / "best.safetensors"), best) == []
    assert differing(load_file(kept[160] / "average-1.safetensors"), best)
    earlier = load_file(kept[64] / "average-1.safetensors")
    assert differing(load_file(kept[96] / "best.safetensors"), earlier) == [], "the best so far"
    ratio = load_file(run.folder / "ratio" / "model.safetensors")
    last = load_file(kept[160] / "critic.safetensors")
    assert differing(ratio, {name.removeprefix("ratio."): last[name] for name in last if name[:6] == "ratio."}) == []
    assert differing(load_file(whole.folder / "model" / "model.safetensors"), best) == []
    assert differing(run.network.state_dict(), best) == []


def test_without_a_selection_the_last_average_is_published(teacher: Run, tmp_path: Path):
    changes = {**CHANGES, "onestep__selects": False, "training__images": 64}
    run = onefold.train(one_step_from(teacher.folder, **changes), tmp_path / "run", quiet=True)
    assert (counters(run.folder)["best"], counters(run.folder)["best_images"]) == (None, 0)
    newest = checkpoints(run.folder)[-1]
    assert not (newest / "best.safetensors").exists()
    last = load_file(newest / "average-1.safetensors")
    assert differing(load_file(run.folder / "model" / "model.safetensors"), last) == []
    assert [line["onestep"]["frechet"] for line in run.history] == [LONGEST - 5.0, LONGEST - 3.0]
    last = load_file(newest / "critic.safetensors")
    ratio = load_file(run.folder / "ratio" / "model.safetensors")
    assert differing(ratio, {name.removeprefix("ratio."): last[name] for name in last if name[:6] == "ratio."}) == []


def test_lengths_follow_from_what_is_wanted(teacher: Run, monkeypatch: pytest.MonkeyPatch):
    """The warm-up is a sixteenth of the images; average and measurements count updates. What is given stays."""
    seen: list[Config] = []
    monkeypatch.setattr(loop, "train", lambda config, *rest, **named: seen.append(config))
    command = ["onestep", str(teacher.folder), "--quiet", "--images", "1600"]
    assert cli.run(command) == 0
    assert cli.run([*command, "--training.batch", "32"]) == 0
    assert cli.run([*command, "--training.batch", "32", "--onestep.critic-warmup", "64"]) == 0
    lengths = [(c.onestep.critic_warmup, c.training.ema_half_lives, c.training.health_every) for c in seen]  # type: ignore[union-attr]
    assert lengths == [(96, (1120,), 800), (96, (2240,), 1600), (64, (2240,), 1600)]
    assert {config.training.images for config in seen} == {1600}


def test_the_device_decides_anew(teacher: Run):
    """A teacher trained on another machine has decided for that one."""
    assert (teacher.config.training.precision, teacher.config.training.compile) == ("float32", "no")
    config = converted(teacher.folder)
    assert (config.training.precision, config.training.compile) == ("auto", "auto")


# --- gradients that are not finite ------------------------------------------------------------------------------------


class Poison:
    """The ratio network's loss, but for calls (1, 2, …) of which `when` says true: it is no number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
        self.calls: list[Tensor] = []
        honest = one_step.ratio_loss

        def loss(ratio: RatioNet, real: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self.calls.append(real.clone())
            total, parts = honest(ratio, real, *rest, **named)
            return (total * torch.nan if when(len(self.calls)) else total), parts

        monkeypatch.setattr(one_step, "ratio_loss", loss)


def test_ten_in_a_row_go_back_to_a_checkpoint_once(teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps fail from the fifth on; at 96 images, in their midst, a checkpoint is due. The last good one is at 48."""
    seen = Poison(monkeypatch, lambda call: 5 <= call <= 14)
    config = one_step_from(teacher.folder, **CHANGES, training__images=320)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert len(seen.calls) == 14 + (320 - 48) / 16
    assert torch.equal(seen.calls[14], seen.calls[3]), "the same images again"
    expected = Counters(320, skipped=10, rollbacks=1, best=2.0, best_images=128)
    assert counters(run.folder) == asdict(expected)
    assert [line["images"] for line in run.history] == list(range(32, 321, 32))
    assert all(value.isfinite().all() for value in newest_of(run.folder).values())


def test_ten_in_a_row_again_end_the_training(teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = Poison(monkeypatch, lambda call: call > 4)
    config = one_step_from(teacher.folder, **CHANGES, training__images=480)
    with pytest.raises(TrainingAborted, match=r"11 steps in a row had no finite gradient at 224 images"):
        onefold.train(config, tmp_path / "run", quiet=True)
    assert len(seen.calls) == 4 + 10 + 11, "it goes back by one step and looks after every second"
    assert counters(tmp_path / "run")["images"] == 48
    onefold.OneFold.from_pretrained(tmp_path / "run")


# --- a run like others ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(whole: Run, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a teacher, `given`, and a one-step run, `run`."""
    shutil.copytree(whole.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ["--images", "48", "--onestep.critic-warmup", "16", "--onestep.measured", "20", "--onestep.selects"]
SHORT += ["--training.learning-rate", "0.001", "--quiet"]


def test_a_run_has_these_files(whole: Run):
    found = {path.name for path in whole.folder.iterdir()}
    assert found == {"config.json", "data.json", "log.jsonl", "samples", "checkpoints", "model", "ratio"}
    assert {path.name for path in checkpoints(whole.folder)[-1].iterdir()} == {
        *("network.safetensors", "average-0.safetensors", "average-1.safetensors", "best.safetensors"),
        *(
            "teacher.safetensors",
            "critic.safetensors",
            "optimizer.safetensors",
            "state.json",
            "checksums.json",
            "COMPLETE",
        ),
    }
    assert load_run(whole.folder).config == whole.config
    for line in (whole.folder / "log.jsonl").read_text().splitlines():
        assert "NaN" not in line
        assert "Infinity" not in line


def test_it_is_sampled_in_one_step_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["sample", "run", "--n", "12", "--out", "grid.png"]) == 0
    assert capsys.readouterr().out == "grid.png: 12 images, 1 step\n"
    with Image.open("grid.png") as image:
        about = dict(image.text)
        found = image.tobytes()
    assert about == {
        "network": "run",
        "seeds": "0…11",
        "labels": str([k % 10 for k in range(12)]),
        "steps": "1",
        "guidance": "1.0",
        "solver": "refine",
    }
    assert cli.run(["sample", "run", "--n", "12", "--steps", "3", "--out", "grid.png"]) == 0
    with Image.open("grid.png") as image:
        assert image.text["steps"] == "3"
        assert image.tobytes() != found
    with Image.open(sorted(Path("run/samples").glob("*160.png"))[0]) as image:
        assert image.text["steps"] == "1"


def test_its_network_samples_reconstructs_and_is_measured(here: Path, whole: Run, capsys: pytest.CaptureFixture[str]):
    assert whole.network.sample(5, steps=1).shape == (5, 8, 8, 1)
    assert cli.run(["evaluate", "run", "--images", "20", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["protocol"]["steps"], record["protocol"]["sampler"]) == (1, "refine from t = 0.3")
    assert record["protocol"]["ema"] == whole.config.training.ema_half_lives[-1]
    (path,) = Path("run/evaluation").iterdir()
    assert path.name == "refine-1-guidance-1-shift-1-seed-0.json"
    assert Record.read(path)["reconstruction"]["psnr"] > 5
    assert cli.run(["evaluate", "run", "--images", "20"]) == 0
    assert "1 step " in capsys.readouterr().out
    assert cli.run(["reconstruct", "run", "digits:test"]) == 0


@pytest.mark.parametrize(("words", "folder"), [([], "given-onestep"), (["--method", "ratio"], "given-ratio")])
def test_the_command_is_the_library_s_conversion(
    here: Path, words: list[str], folder: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(["onestep", "given", *words, *SHORT, "--training.precision", "float32"]) == 0
    assert capsys.readouterr().out == ""
    changes = {"training__images": 48, "onestep__critic_warmup": 16, "onestep__measured": 20, "onestep__selects": True}
    changes["training__ema_half_lives"] = load_run(folder).config.training.ema_half_lives
    changes |= {"onestep__critic_rate": 3e-4, "onestep__method": words[1] if words else "score"}
    rank = 0 if words else RANK
    run = onefold.train(one_step_from(Path("given"), rank, **changes), here / "library", quiet=True)
    assert load_run(folder).config == run.config
    assert differing(newest_of(Path(folder)), newest_of(run.folder)) == []


def test_a_run_of_another_teacher_is_not_resumed(here: Path, whole: Run, capsys: pytest.CaptureFixture[str]):
    onefold.train(tiny(training__images=32, training__seed=7), here / "other", quiet=True)
    assert cli.run(["onestep", "other", "--resume", "--out", "run", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "run: was made of" in said
    assert "not of other" in said


def test_a_teacher_that_was_trained_on_does_not_stand_in_the_way(
    here: Path, whole: Run, capsys: pytest.CaptureFixture[str]
):
    """Its folder is the one that the run was made of, though it holds other weights now."""
    described = json.loads((here / "run" / "config.json").read_text())
    described["config"]["start"] = str(here / "given")
    (here / "run" / "config.json").write_text(json.dumps(described))
    weights = {name: value + 1 for name, value in load_file("given/model/model.safetensors").items()}
    write_tensors(weights, here / "given" / "model" / "model.safetensors")
    assert cli.run(["onestep", "given", "--resume", "--out", "run"]) == 0
    assert "given: holds another network than the one that this run began with" in capsys.readouterr().out


def test_the_command_resumes(here: Path, whole: Run):
    for path in checkpoints(Path("run"))[2:]:
        shutil.rmtree(path)
    assert cli.run(["onestep", "given", "--resume", "--out", "run", "--quiet"]) == 0
    same(whole, Path("run"))


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("given", "given-onestep"),
        ("given/ --method score", "given-onestep"),
        ("given --method ratio", "given-ratio"),
        ("given --method dmd", "given-dmd"),
        ("given --method dmd --out new/place", "new/place"),
    ],
)
def test_the_new_run_lies_beside_the_old_one(here: Path, words: str, folder: str):
    assert cli.run(["onestep", *words.split(), *SHORT]) == 0
    config = load_run(folder).config
    assert config.phases == ("one_step",)
    method = words.split()[2] if "--method" in words else "score"
    assert config.onestep.method == method
    assert config.start == str(here / "given")
    assert (Path(folder) / "ratio").is_dir() == (method == "ratio")


def test_also_from_within_the_old_one(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("given")
    assert cli.run(["onestep", ".", *SHORT]) == 0
    assert load_run(here / "given-onestep").history[-1]["images"] == 48


@pytest.mark.parametrize("option", ["--images", "--training.images"])
def test_the_length_may_be_given_either_way(here: Path, option: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["onestep", "given", option, "32", *SHORT[2:-1]]) == 0
    assert load_run("given-onestep").config.training.images == 32
    shown = capsys.readouterr().out
    assert re.search(r"\n32 images; (\w+ [\d.e-]+  )*student \d", shown)
    assert "run: given-onestep" in shown


# --- other teachers ---------------------------------------------------------------------------------------------------


def colours(grey: bool = False, count: int = 60) -> dict[str, np.ndarray]:
    images = noise(count, 6, 4, 3)
    return {"images": images[..., :1].repeat(3, 3) if grey else images, "labels": np.arange(count) % 3}


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        (None, {"network__architecture": "three_networks", "network__depth": 3}),
        (None, {"network__classes": 0}),
        (None, {"network__architecture": "pixels"}),
        (colours(), {}),
        (colours(grey=True), {}),
        (colours(count=20), {}),
    ],
    ids=["three networks", "unconditional", "pixels", "colours", "grey in three channels", "few images"],
)
def test_other_teachers_become_one_step_generators_too(
    images: dict[str, np.ndarray] | None, changes: dict[str, Any], tmp_path: Path
):
    if images is not None:
        np.savez(tmp_path / "images.npz", **images)
        changes = {**changes, "data__source": str(tmp_path / "images.npz"), "data__test": None}
    teacher = onefold.train(tiny(training__images=16, **changes), tmp_path / "teacher", quiet=True)
    short = {"training__images": 48, "onestep__critic_warmup": 16, "onestep__measured": 20, "onestep__selects": True}
    run = onefold.train(one_step_from(teacher.folder, **short), tmp_path / "run", quiet=True)
    classes = run.config.network.classes
    assert run.config.network == teacher.config.network
    theirs = teacher.network.state_dict()
    newest = checkpoints(run.folder)[-1]
    assert differing(load_file(newest / "teacher.safetensors"), theirs) == []
    assert differing(load_file(newest / "network.safetensors"), theirs)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    last = [json.loads(line, parse_constant=refuse) for line in (run.folder / "log.jsonl").read_text().splitlines()][-1]
    found = last["onestep"]
    assert ("class_accuracy" in found) == bool(classes)
    assert ("saturation" in found) == (images is not None and (images["images"].std(3) > 0).any())
    assert "diversity" in found
    assert run.network.sample(3, steps=1).shape == (3, *run.config.network.image_size, run.config.network.channels)


# --- what is refused --------------------------------------------------------------------------------------------------


def unfinished(here: Path) -> None:
    text = (here / "given" / "config.json").read_text()
    (here / "given" / "config.json").write_text(text.replace('"images": 32', '"images": 320', 1))


def without_a_model(here: Path) -> None:
    shutil.rmtree(here / "given" / "model")


def other_images(here: Path) -> None:
    taught(here)
    np.savez(here / "images.npz", images=noise(60, 6, 4, 1), labels=np.arange(60) % 3)


def other_classes(here: Path) -> None:
    taught(here)
    np.savez(here / "images.npz", images=noise(60, 4, 4, 1), labels=np.arange(60) % 4)


def taught(here: Path) -> None:
    shutil.rmtree(here / "given")
    np.savez(here / "images.npz", images=noise(60, 4, 4, 1), labels=np.arange(60) % 3)
    changes = {"data__source": str(here / "images.npz"), "data__test": None, "training__images": 16}
    onefold.train(tiny(**changes), here / "given", quiet=True)


def in_pixels(here: Path) -> None:
    shutil.rmtree(here / "given")
    onefold.train(tiny(network__architecture="pixels", training__images=16), here / "given", quiet=True)


def nothing(here: Path) -> None:
    pass


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("given", unfinished, "given: its diffusion model is not finished (32 of 320 images); continue with"),
    ("given", without_a_model, "given: no model yet"),
    ("given", other_images, "given: its network is for (4, 4, 1), 3 classes, this run's for (6, 4, 1), 3 classes"),
    ("given", other_classes, "given: its network is for (4, 4, 1), 3 classes, this run's for (4, 4, 1), 4 classes"),
    ("given/samples", nothing, "given/samples: not a run (no config.json)"),
    ("given/model", nothing, "--data: given/model is a network, not a run; give the images to learn from"),
    ("missing", nothing, "missing: not a run (no config.json)"),
    ("run", nothing, "run: is already a one-step generator; give the run that it came from"),
    ("given --method distillation", nothing, "distillation"),
    ("given --onestep.generator random", nothing, "onestep.generator: with weights other"),
    ("given --rank 0 --onestep.generator random", nothing, "onestep.generator: with weights other"),
    ("given --rank 0 --onestep.generator-trains norms", nothing, "onestep.generator: with weights other"),
    ("given --method ratio --onestep.critic-blocks 2", nothing, "onestep.critic_blocks: 2 is not within 1 to 1"),
    ("given --method ratio --onestep.critic-blocks 0", in_pixels, "onestep.critic_blocks: 0 is not within 1 to 1"),
    ("given --onestep.critic-warmup 48", nothing, "onestep.critic_warmup: 48 images leave none of 48 for"),
    ("given --onestep.measured 1", nothing, "onestep.measured: 1 sample has no distance"),
    ("given --onestep.measured -1", nothing, "onestep.measured: -1 is not positive"),
    ("given --onestep.upkeep-share 2", nothing, "onestep.upkeep_share: 2.0 is not between 0 and 1"),
    ("given --onestep.upkeep -1", nothing, "onestep.upkeep: -1.0 is not 0 or more"),
    ("given --onestep.start 1", nothing, "onestep.start: 1.0 must be at least 0 (noise) and below 1 (data)"),
    ("given --onestep.scale-rate 0", nothing, "onestep.scale_rate: 0.0 is not positive"),
    ("given --onestep.ratio.divergence kl", nothing, "onestep given: ratio.divergence: 'kl' is not one of reverse_kl"),
    ("given --onestep.critic-updates 0", nothing, "onestep.critic_updates: 0 is not positive"),
    ("given --images 0", nothing, "training.images: 0 is not positive"),
    ("given --out run", nothing, "run: holds a run already; continue it with --resume or choose another --out"),
    ("given --resume --out missing", nothing, "missing: no one-step run there yet"),
    ("--out new", nothing, "onestep: give the folder of a trained run first"),
]


@pytest.mark.parametrize(("words", "change", "told"), REFUSED, ids=[f"{w}-{c.__name__}" for w, c, _ in REFUSED])
def test_what_cannot_be_is_one_line_and_nothing_is_begun(
    here: Path, words: str, change: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
):
    change(here)
    capsys.readouterr()
    before = set(here.rglob("*"))
    short = [] if "--images" in words else ["--images", "48"]
    short += [] if "warmup" in words else ["--onestep.critic-warmup", "16"]
    assert cli.run(["onestep", *words.split(), *([] if "--resume" in words else short)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("onefold: ")
    assert told in captured.err
    assert captured.out == ""
    assert set(here.rglob("*")) == before


def test_in_pixels_random_generators_are_begun(here: Path):
    in_pixels(here)
    assert cli.run(["onestep", "given", *SHORT, "--rank", "0", "--onestep.generator", "random"]) == 0


def test_a_teacher_that_has_gone_before_it_was_copied_is_one_line(here: Path):
    config = one_step_from(Path("given"))
    shutil.rmtree("given")
    with pytest.raises(UserError, match=r"/given: no config\.json there; give the folder of a run"):
        onefold.train(config, here / "new", quiet=True)
    assert not (here / "new").exists()
