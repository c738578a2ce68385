"""The study of initialisation, whose arms begin from arms before them; so small that a training takes a second."""

import csv
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers_runs import differing
from onefold import cli, metrics
from onefold.commands.study import _settings
from onefold.errors import TrainingAborted, UserError
from onefold.files import sha256_of
from onefold.metrics import Record
from onefold.pictures.style import STYLE
from onefold.studies import Study, figures, initialisation, run_study, trials, worker
from onefold.studies.initialisation import ARMS
from onefold.studies.onestep import ARMS as ONESTEP_ARMS
from onefold.studies.onestep import onestep
from onefold.studies.study import KEPT, Arm, Trial, begin, check
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.conversion import one_step_config
from onefold.training.phases import phases_of
from onefold.training.run import Run, load_run

ASKED = ("one-level", "random")
ALL = ["diffusion", "diffusion-one-level", "random", "one-level"]
"""With their teachers, in the study's own order."""
TEACHERS = {"random": "diffusion", "one-level": "diffusion-one-level"}


def tiny(arms: tuple[str, ...] | None = ASKED, **options: Any) -> Study:
    changes: dict[str, Any] = {
        "network": {"width": 32, "depth": 1, "heads": 2},
        "training": {"batch": 16, "warmup": 32, "ema_half_lives": (32,), "precision": "float32", "compile": "no"},
        "sampler": {"steps": 2},
    }
    changes["training"]["device"] = "cpu"
    named = {f"{group}.{name}": value for group, values in changes.items() for name, value in values.items()}
    lengths = {"teacher_budget": 64, "budget": 96}
    return initialisation(**{**lengths, "images": 40, "seeds": 1, "arms": arms, "changes": named, **options})


def written(out: Path) -> dict[str, int]:
    """When each file of the study's runs was written."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}


def table(out: Path) -> dict[str, Any]:
    return {arm["name"]: arm for arm in json.loads((out / "table.json").read_text())["arms"]}


class Done(NamedTuple):
    """A whole study, and what it said."""

    out: Path
    study: Study
    trials: list[Trial]
    said: list[str]


@pytest.fixture(scope="module", autouse=True)
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.curves, "write", lambda *arguments: None)
        out, said = tmp_path_factory.mktemp("study") / "out", list[str]()
        study = tiny()
        return Done(out, study, run_study(study, out, say=said.append), said)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_tables_and_pictures_are_written(done: Done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {
        *("study.json", "runs"),
        *("table.json", "table.csv", "table.md", "curves.png", "samples.png"),
    }
    for path in done.out.glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors()) > 20, f"{path.name} shows nothing"
    lines = [line.split(":")[0] for line in done.said if line.startswith("arm ")]
    assert lines == [f"arm {k} of 4, {name}, seed 0" for k, name in enumerate(ALL, 1)]


def test_the_numbers_are_those_of_the_records(done: Done):
    arms = table(done.out)
    assert list(arms) == ALL
    with (done.out / "table.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    markdown = (done.out / "table.md").read_text()
    for trial in done.trials:
        name = trial.arm.name
        record = Record.read(done.out / "runs" / f"{name}-seed0" / "evaluation" / "study.json")
        for key, value in record.numbers().items():
            assert arms[name]["seeds"][0]["numbers"][key] == arms[name]["mean"][key] == value
            assert float(rows[name][key]) == value
        assert record["protocol"]["steps"] == (1 if trial.arm.teacher else 2)
        assert f"| {trial.arm.title} | " in markdown
        assert f" {record['frechet_distance']:,.2f} |" in markdown
    assert len({arms[name]["mean"]["frechet_distance"] for name in ALL}) == 4
    assert "not comparable" not in markdown
    assert "trained on 64 images of digits in batches of 16" in markdown
    assert "onefold study initialisation --recipe digits --data digits --change " in markdown
    assert f" --images 40 --teacher-budget 64 --budget 96 --seeds 1 --arms {' '.join(ALL)}" in markdown


def test_each_generator_begins_from_its_own_teacher(done: Done):
    for trial in done.trials:
        name, config = trial.arm.name, load_run(trial.folder).config
        assert config.network.architecture == "pixels"
        if name not in TEACHERS:
            assert config.phases == ("self_distillation",)
            assert config.start == ""
            assert trial.teacher is None
            continue
        assert config.phases == ("one_step",)
        teacher = done.out / "runs" / f"{TEACHERS[name]}-seed0"
        assert config.start == str(teacher) == str(trial.teacher)
        theirs = load_file(teacher / "model" / "model.safetensors")
        kept = load_file(checkpoints(trial.folder)[-1] / "teacher.safetensors")
        assert differing(theirs, kept) == []
        assert (config.training.images, config.onestep.critic_warmup) == (96, 12)


def test_the_curves_are_those_of_the_generators(done: Done):
    begun = [trial for trial in done.trials if trial.arm.teacher]
    with mpl.rc_context(STYLE):
        figure = figures._curves(done.study, begun, figures.ONESTEP_PANELS)
    by_title = {ax.get_title("left"): ax for ax in figure.axes}
    (ax,) = [ax for title, ax in by_title.items() if title.startswith("Fréchet distance")]
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {trial.arm.title for trial in begun}
    for trial in begun:
        measured = [line for line in load_run(trial.folder).history if "onestep" in line]
        line = lines[trial.arm.title]
        assert line.get_xdata() == pytest.approx([each["images"] / 1000 for each in measured])
        assert line.get_ydata() == pytest.approx([each["onestep"]["frechet"] for each in measured])


def test_finished_arms_are_not_trained_again(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(done.out, tmp_path / "out")
    for path in (tmp_path / "out").glob("table.*"):
        path.unlink()
    before = written(tmp_path / "out")
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    said: list[str] = []
    run_study(tiny(), tmp_path / "out", say=said.append)
    assert written(tmp_path / "out") == before
    assert said == [f"{tmp_path / 'out'}: 4 arms × 1 seed, 4 finished before"]
    assert (tmp_path / "out" / "table.md").read_text() == (done.out / "table.md").read_text()


# --- arms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (("trunk",), ["diffusion", "trunk"]),
        (("one-level",), ["diffusion-one-level", "one-level"]),
        (("diffusion",), ["diffusion"]),
        (ASKED, ALL),
        (None, [arm.name for arm in ARMS]),
    ],
)
def test_teachers_are_added_before_what_begins_from_them(
    asked: tuple[str, ...] | None, names: list[str], tmp_path: Path
):
    study = tiny(asked, seeds=2)
    assert [arm.name for arm in study.arms] == names
    found = study.trials(tmp_path)
    assert [(trial.seed, trial.arm.name) for trial in found] == [(seed, name) for seed in (0, 1) for name in names]
    before: set[Path] = set()
    for trial in found:
        assert trial.teacher is None or trial.teacher in before
        if trial.teacher:
            assert trial.teacher.name == f"{trial.arm.teacher}-seed{trial.seed}"
        before.add(trial.folder)


def test_generators_differ_in_what_their_arms_name_alone():
    study = tiny(None)
    given = {name: value for name, value in study.changes.items() if name.partition(".")[0] not in KEPT}
    base = one_step_config(study.config, rank=0).with_changes(given)
    for arm in study.arms:
        config = study.arm_config(arm, 3, Path("there"))
        changed = {*arm.changes, "training.seed", *(["start"] if arm.teacher else [])}
        whole = base if arm.teacher else study.config
        assert config.with_changes({name: value_of(whole, name) for name in changed}) == whole
        assert config.training.seed == 3
    assert len({str(arm.changes) for arm in study.arms}) == len(study.arms) - 1, (
        "but for one-level: its teacher differs"
    )
    assert all(arm.teacher in {other.name for other in ARMS} for arm in ARMS if arm.teacher)


def test_all_generators_are_taught_by_the_ratio_from_0_3_and_keep_nothing_up():
    """The upkeep would teach the teacher's denoiser to a generator that begins from random weights."""
    study = tiny(None)
    for arm in study.arms:
        if arm.teacher:
            options = study.arm_config(arm, 0, Path("there")).onestep
            assert (options.method, options.start, options.upkeep) == ("ratio", 0.3, 0.0), arm.name
            (phase,) = phases_of(study.arm_config(arm, 0, Path("there")))
            assert phase.sampler.start == 0.3


def test_arms_of_the_one_step_study_name_their_method():
    """The default of the command is another; each differs from all others, and is a run that can begin."""
    study = onestep(seeds=1)
    assert [arm.name for arm in study.arms] == [arm.name for arm in ONESTEP_ARMS]
    names = {arm.name for arm in ONESTEP_ARMS}
    assert {
        "diffusion",
        "ratio",
        "strong-penalty",
        "uncalibrated",
        "start-0",
        "score",
        "dmd",
        "dmd-adversarial",
    } <= names
    assert "no-centring" not in names
    assert len({str(arm.changes) for arm in ONESTEP_ARMS}) == len(ONESTEP_ARMS)
    methods = dict.fromkeys(names - {"diffusion"}, "ratio") | {"score": "score", "dmd": "dmd", "dmd-adversarial": "dmd"}
    methods["low-rank"] = "score"
    for arm in study.arms:
        config = study.arm_config(arm, 0, Path("there"))
        assert phases_of(config)
        if arm.name != "diffusion":
            assert config.onestep.method == methods[arm.name], arm.name
            if arm.name.startswith("start-"):
                assert config.onestep.start == float(arm.name[6:].replace("-", ".")), arm.name


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_an_arm_without_its_teacher_is_refused():
    with pytest.raises(UserError, match=r"^--arms: b starts from a; name it too$"):
        Study("made-up", {}, tiny().config, (Arm("b", "B", {}, teacher="a"),), 1)


# --- several at once --------------------------------------------------------------------------------------------------


class Process:
    """A worker that lives in this process: it does its work the second time that somebody asks whether it has ended."""

    running: list[str]
    started: list[tuple[str, list[str]]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.stdin, self.asked, self.returncode, self.said = io.StringIO(), 0, None, ""

    def poll(self) -> int | None:
        if self.asked == 0:
            name = Path(json.loads(self.stdin.getvalue())["folder"]).name
            Process.started.append((name, list(Process.running)))
            Process.running.append(name)
        self.asked += 1
        if self.asked == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO(self.stdin.getvalue()))
                patch.setattr(sys, "stdout", io.StringIO())
                patch.setattr(worker, "_follow_parent", lambda: None)
                self.returncode = worker.main()
                self.said = sys.stdout.getvalue()
            Process.running.remove(Path(json.loads(self.stdin.getvalue())["folder"]).name)
        return self.returncode

    def communicate(self) -> tuple[str, None]:
        return self.said, None

    def terminate(self) -> None:
        raise AssertionError("nothing is to be stopped here")


@pytest.fixture
def copied(done: Done, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings and evaluations give what they gave before, with any seed; the names of those that are made."""
    made: list[str] = []

    def before(name: str) -> Path:
        return done.out / "runs" / f"{name.rpartition('-')[0]}-seed0"

    def train(config: Config, folder: Path, **options: Any) -> Run:
        made.append(folder.name)
        shutil.copytree(before(folder.name), folder)
        (folder / "evaluation" / "study.json").unlink()
        return load_run(folder)

    def evaluate(run: Run, **options: Any) -> Record:
        return Record.read(before(run.folder.name) / "evaluation" / "study.json")

    monkeypatch.setattr(trials, "train", train)
    monkeypatch.setattr(trials, "evaluate", evaluate)
    return made


def failing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    honest = trials.train

    def train(config: Config, folder: Path, **options: Any) -> Run:
        if folder.name in names:
            raise TrainingAborted(f"{folder}: ten steps had no finite gradient")
        return honest(config, folder, **options)

    monkeypatch.setattr(trials, "train", train)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Jobs run in this process; gives what was started, and what was running then."""
    Process.running, Process.started = [], []
    monkeypatch.setattr(trials.subprocess, "Popen", Process)
    monkeypatch.setattr(trials.time, "sleep", lambda seconds: None)
    return Process.started


def test_generators_wait_for_their_teachers(
    done: Done,
    copied: list[str],
    at_once: list[tuple[str, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    found = run_study(tiny(), tmp_path / "out", jobs=2)
    assert all(trial.record for trial in found)
    order = [name for name, _ in at_once]
    assert sorted(order) == sorted(f"{name}-seed0" for name in ALL)
    for name, running in at_once:
        teacher = f"{TEACHERS.get(name.removesuffix('-seed0'))}-seed0"
        assert teacher not in running
        if teacher in order:
            assert order.index(teacher) < order.index(name)
    assert any(running for _, running in at_once), "two at a time"
    assert order[:2] == ["diffusion-seed0", "diffusion-one-level-seed0"]
    assert (tmp_path / "out" / "table.md").read_text() == (done.out / "table.md").read_text()


def test_while_a_teacher_is_trained_another_seed_s_is_too(
    copied: list[str], at_once: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    run_study(tiny(("random",), seeds=2), tmp_path / "out", jobs=2)
    assert at_once[:2] == [("diffusion-seed0", []), ("diffusion-seed1", ["diffusion-seed0"])]
    assert {name for name, _ in at_once} == {f"{name}-seed{k}" for name in ("diffusion", "random") for k in (0, 1)}


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_teacher_fails_what_begins_from_it_and_nothing_else(
    copied: list[str], at_once: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
):
    failing(monkeypatch, "diffusion-seed0")
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    said: list[str] = []
    found = run_study(tiny(), tmp_path / "out", jobs=jobs, say=said.append)
    why = "its teacher failed: ten steps had no finite gradient"
    reasons = {trial.arm.name: trial.failure for trial in found}
    assert reasons == {
        "diffusion": "ten steps had no finite gradient",
        "diffusion-one-level": None,
        "random": why,
        "one-level": None,
    }
    assert [trial.arm.name for trial in found if trial.record] == ["diffusion-one-level", "one-level"]
    assert sum(why in line for line in said) == 1
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert "| both random (0 of 1 seed) |" in markdown
    assert f"- both random, seed 0: {why}" in markdown
    made = list(copied)
    run_study(tiny(), tmp_path / "out", jobs=jobs)
    assert copied == made == ["diffusion-one-level-seed0", "one-level-seed0"], "a failure is not repeated"


def test_a_study_without_generators_has_a_table_all_the_same(
    copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(monkeypatch, "random-seed0")
    found = run_study(tiny(("random",)), tmp_path / "out")
    assert [bool(trial.record) for trial in found] == [True, False]
    assert {path.name for path in (tmp_path / "out").glob("*.*")} == {
        *("study.json", "table.json", "table.csv", "table.md", "samples.png")
    }


def test_without_any_result_the_study_says_so(copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing(monkeypatch, "diffusion-seed0")
    with pytest.raises(TrainingAborted, match=r"no training reached its end; the first: ten steps had no finite gradi"):
        run_study(tiny(("random",)), tmp_path / "out")


def test_an_interrupted_generator_goes_on_from_its_checkpoint(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With its own copy of the teacher."""
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    shutil.copytree(done.out, tmp_path / "out")
    folder = tmp_path / "out" / "runs" / "random-seed0"
    shutil.rmtree(folder / "evaluation")
    shutil.rmtree(checkpoints(folder)[-1])
    before = {path: when for path, when in written(tmp_path / "out").items() if "random-seed0" not in path}
    run_study(tiny(), tmp_path / "out")
    assert {path: when for path, when in written(tmp_path / "out").items() if "random-seed0" not in path} == before
    model = Path("runs/random-seed0/model/model.safetensors")
    assert (tmp_path / "out" / model).read_bytes() == (done.out / model).read_bytes()
    numbers = [arms["random"]["mean"]["frechet_distance"] for arms in (table(done.out), table(tmp_path / "out"))]
    assert numbers[0] == numbers[1]


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--change nonsense=1", "--change: nonsense: no such setting; there are recipe, network.…, phases"),
        ("--arms teacher best", "--arms: 'best' is not known; choose from diffusion, diffusion-one-level, teacher,"),
        ("--seeds 0", "--seeds: 0 is not positive"),
        ("--budget 0", "--budget: 0 is not positive"),
        ("--teacher-budget -5", "--teacher-budget: -5 is not positive"),
        ("--jobs 0", "--jobs: 0 is not positive"),
        ("--budget much", "--budget"),
        ("--data nowhere.zip", "nowhere.zip"),
        ("--recipe cifar11", "recipe: 'cifar11' is not known"),
        ("--draws 2", "--draws"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["study", "initialisation", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert list(tmp_path.iterdir()) == [], "nothing is written for wrong arguments"


OTHERS: list[tuple[Callable[[], Study], str]] = [
    (lambda: tiny(budget=128), "was started with --budget 96, not 128"),
    (lambda: tiny(teacher_budget=128), "was started with --teacher-budget 64, not 128"),
    (lambda: tiny(("random",)), f"was started with --arms {' '.join(ALL)}, not diffusion random"),
]


@pytest.mark.parametrize(("other", "told"), OTHERS, ids=["budget", "teacher budget", "arms"])
def test_a_study_goes_on_as_it_began(other: Callable[[], Study], told: str, tmp_path: Path):
    begin(tiny(), tmp_path)
    with pytest.raises(UserError) as error:
        check(other(), tmp_path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    check(tiny((*ASKED, "norms"), seeds=2), tmp_path)


def test_a_command_s_changes_reach_every_arm_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = {"network.patch": 4, "network.latent_norm": "none", "training.ema_half_lives": [100]}
    words = ["network.patch=4", "network.latent_norm=none", "training.ema_half_lives=[100]"]
    assert _settings(tuple(words)) == given
    study = initialisation(seeds=1, changes=given)
    assert all(study.arm_config(arm).network.patch == 4 for arm in study.arms)
    assert study.config.network.architecture == "pixels"
    told = study.command.partition(" --change ")[2].partition(" --")[0]
    assert _settings(tuple(shlex.split(told))) == given
    assert cli.run(["study", "collapse", "--change", "network.patch", "--out", str(tmp_path / "study")]) == 2
    assert "--change: 'network.patch' is not name=value" in capsys.readouterr().err
    assert cli.run(["study", "collapse", "--change", "network.patch=4", "--change", "network.depth=2"]) == 2
    assert "--change: is given twice; give it once, with all its values" in capsys.readouterr().err
    study = onestep(seeds=1, changes={"training.learning_rate": 0.5, "onestep": {"start": 0.1}, "network.jump_rank": 3})
    for arm in study.arms:
        config = study.arm_config(arm, 0, Path("there"))
        assert config.training.learning_rate == 0.5
        assert config.onestep.start == arm.changes.get("onestep.start", 0.1)
        assert config.network.jump_rank == (3 if not arm.teacher else arm.changes.get("network.jump_rank", 0))
    with pytest.raises(UserError, match=r"--change: training\.images is the study's own; give --budget"):
        onestep(changes={"training": {"images": 64}})
    with pytest.raises(UserError, match="--images: 3 are too few to measure anything; give at least 4"):
        onestep(images=3)


def test_features_of_one_s_own_measure_every_arm(tmp_path: Path):
    """In each process of its own, and in the log of one-step arms."""
    place = tmp_path / "own.safetensors"
    images, labels = torch.zeros((16, 1, 8, 8), dtype=torch.uint8), torch.arange(16) % 10
    metrics.train_classifier(images, labels, classes=10, epochs=1).save(place)
    study = tiny(("teacher",), budget=32, features=str(place))
    assert f"--features {place}" in study.command
    assert "--images 40" in study.command
    assert study.arm_config(study.arms[1]).onestep.features == str(place)
    run_study(study, tmp_path / "study", jobs=2, quiet=True)
    for trial in study.trials(tmp_path / "study"):
        assert Record.read(trial.record_path)["protocol"]["extractor_sha256"] == sha256_of(place)
    with pytest.raises(UserError, match="nowhere"):
        check(replace(study, features="nowhere.safetensors"), tmp_path / "other")
