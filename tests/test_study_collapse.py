"""The study of collapse, with networks so small that a training takes a second."""

import csv
import errno
import json
import math
import os
import signal
import statistics
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from PIL import Image

from onefold import cli
from onefold.errors import Interrupted, TrainingAborted, UserError
from onefold.files import locked
from onefold.metrics import Record
from onefold.networks.base import NetworkConfig
from onefold.pictures.style import STYLE, log_axis
from onefold.studies import Study, collapse, figures, run_study, table, trials
from onefold.studies.collapse import ARMS, COLUMNS, FURTHER_ARMS
from onefold.studies.figures import DPI, ONESTEP_PANELS, PANELS, WIDTH
from onefold.studies.study import Trial, begin, check
from onefold.training import loop
from onefold.training.log import RunLog
from onefold.training.run import load_run

TWO = ("naive", "ema")
FILES = {"table.json", "table.csv", "table.md", "curves.png", "spectrum.png", "samples.png", "reconstructions.png"}


def tiny(arms: tuple[str, ...] = TWO, seeds: int = 1, **options: Any) -> Study:
    changes = {
        "network": {"width": 32, "depth": 1, "heads": 2},
        "training": {"batch": 16, "warmup": 32, "ema_half_lives": (32,), "precision": "float32", "compile": "no"},
        "sampler": {"steps": 2},
    }
    changes["training"]["device"] = "cpu"
    return collapse(**{"budget": 128, "images": 40, "seeds": seeds, "arms": arms, "changes": changes, **options})


def without_times(out: Path) -> Any:
    """The table without the speeds of training and sampling."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if not key.endswith("images_per_second")}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return cleaned(json.loads((out / "table.json").read_text()))


def bytes_and_times(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def model(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def _no_curves_of_single_runs() -> Generator[None]:
    """They take longer than the training here, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.curves, "write", lambda *arguments: None)
        yield


class Done(NamedTuple):
    """A whole study of two arms and two seeds, and what it said."""

    out: Path
    study: Study
    trials: list[Trial]
    said: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out, said = tmp_path_factory.mktemp("study") / "out", list[str]()
    study = tiny(seeds=2)
    return Done(out, study, run_study(study, out, say=said.append), said)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_everything_is_written_and_every_run_is_an_ordinary_one(done: Done):
    out, trials, said = done.out, done.trials, done.said
    assert {path.name for path in out.iterdir()} == FILES | {"study.json", "runs"}
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "ema-seed0",
        "ema-seed1",
        "naive-seed0",
        "naive-seed1",
    ]
    for trial in trials:
        for name in ("config.json", "log.jsonl", "model/model.safetensors", "evaluation/study.json"):
            assert (trial.folder / name).stat().st_size > 0
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 1800, path.name
            assert len(image.convert("L").getcolors()) > 20, f"{path.name} shows nothing"
    lines = [line for line in said if line.startswith("arm ")]
    assert [line.split(":")[0] for line in lines] == [
        f"arm {k} of 2, {arm}, seed {seed}" for seed in (0, 1) for k, arm in ((1, "naive"), (2, "ema"))
    ]
    assert all("PSNR" in line for line in lines)


def test_numbers_of_the_tables_are_those_of_the_records(done: Done):
    out = done.out
    arms = {arm["name"]: arm for arm in json.loads((out / "table.json").read_text())["arms"]}
    with (out / "table.csv").open() as file:
        rows = {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}
    markdown = (out / "table.md").read_text()
    assert len(rows) == len(done.trials) == 4
    for name in TWO:
        records = [Record.read(out / "runs" / f"{name}-seed{seed}" / "evaluation" / "study.json") for seed in (0, 1)]
        for seed, (record, found) in enumerate(zip(records, arms[name]["seeds"], strict=True)):
            assert found["seed"] == seed
            assert found["protocol"] == record["protocol"]
            assert found["subject"] == record["subject"]
            numbers = record.numbers()
            assert {key: found["numbers"][key] for key in numbers} == numbers
            assert {key: float(rows[name, seed][key]) for key in numbers} == numbers
        for column in COLUMNS[:-1]:
            values = [record.numbers()[column.key] for record in records]
            assert values[0] != values[1], "seeds should differ"
            mean, std = statistics.mean(values), statistics.stdev(values)
            assert arms[name]["mean"][column.key] == pytest.approx(mean)
            assert arms[name]["std"][column.key] == pytest.approx(std)
            assert f"| {mean:,.{column.digits}f} ± {std:,.{column.digits}f} |" in markdown
    assert "| arm | loss | output | target | through | PSNR (dB) |" in markdown
    assert "| naive | velocity | velocity | gradient | yes |" in markdown
    assert "| EMA target (onefold) | clean | clean | ema | no |" in markdown
    assert "onefold study collapse --recipe digits --data digits --change network.width=32 " in markdown
    assert " --images 40 --budget 128 --draws 1 --seeds 2 --arms naive ema" in markdown


def test_the_last_health_of_every_run_is_in_the_table(done: Done):
    """Whose ranks tell a collapse, so that their ratio can be computed from the record alone."""
    arms = {arm["name"]: arm for arm in json.loads((done.out / "table.json").read_text())["arms"]}
    for trial in done.trials:
        log = [json.loads(line) for line in (trial.folder / "log.jsonl").read_text().splitlines()]
        last = [line for line in log if line.get("health")][-1]
        numbers = arms[trial.arm.name]["seeds"][trial.seed]["numbers"]
        assert numbers["health.images"] == last["images"] == 128
        for name in ("prediction_rank", "effective_rank", "velocity_rank", "velocity_target_rank"):
            assert numbers[f"health.{name}"] == last["health"][name]
        assert not any(isinstance(value, list) for value in numbers.values())


def test_an_unmeasured_health_is_no_number():
    assert table._last_health([{"images": 64, "health": None}, {"images": 128}]) == {}
    history = [{"images": 64, "health": {"psnr": 9.0}}, {"images": 96, "health": {"psnr": None, "drift": 0.5}}]
    assert table._last_health([*history, {"images": 128}]) == {"health.images": 96, "health.drift": 0.5}


def test_arms_differ_from_the_configuration_in_what_they_name_alone():
    config = collapse(budget=640).config
    for arm in (*ARMS, *FURTHER_ARMS):
        changed = collapse(budget=640, arms=[arm.name]).arm_config(arm, seed=3)
        restored = changed.with_changes({name: _get(config, name) for name in (*arm.changes, "training.seed")})
        assert restored == config
        assert changed.training.seed == 3
    assert _get(config, "objective.draws") == 1
    assert len({str(arm.changes) for arm in (*ARMS, *FURTHER_ARMS)}) == len(ARMS) + len(FURTHER_ARMS)
    assert ARMS[-2].name == "ema"
    network, objective = NetworkConfig(), config.objective
    default = {
        "network.output": network.output,
        **{f"objective.{n}": getattr(objective, n) for n in ("loss", "target", "through")},
    }
    assert ARMS[-2].changes == default, "the last of the one network's arms is onefold's own"


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_a_panel_may_divide_one_quantity_by_another():
    panel = figures.Panel("", "a", over="b")
    assert panel.value({"images": 1, "health": {"a": 3.0, "b": 2.0}}) == 1.5
    for unknown in ({"a": 3.0}, {"b": 2.0}, {"a": None, "b": 2.0}, {"a": 3.0, "b": None}, {"a": 3.0, "b": 0.0}):
        assert panel.value({"health": unknown}) is None
    assert figures.Panel("", "a").value({"a": 3.0}) == 3.0


def test_the_pictures_show_means_and_spreads(done: Done):
    out = done.out
    with mpl.rc_context(STYLE):
        figure = figures._curves(done.study, done.trials, PANELS)
    by_title = {ax.get_title("left"): ax for ax in figure.axes}
    ax = by_title["reconstruction loss"]
    assert ax.yaxis.get_major_formatter().format_ticks([0.5]) == ["0.5"]
    histories = [load_run(out / "runs" / f"ema-seed{k}").history for k in (0, 1)]
    line = next(line for line in ax.lines if line.get_label() == "EMA target (onefold)")
    assert line.get_xdata() == pytest.approx([entry["images"] / 1000 for entry in histories[0]])
    means = [(a["reconstruction"] + b["reconstruction"]) / 2 for a, b in zip(*histories, strict=True)]
    assert line.get_ydata() == pytest.approx(means)
    assert len(ax.collections) == 2, "a band for each arm"
    for kind, other in (("velocities", "clean latents"), ("clean latents", "velocities")):
        labels = [line.get_label() for line in by_title[f"denoising loss, on {kind}"].lines]
        assert len(labels) == 1
        assert labels != [line.get_label() for line in by_title[f"denoising loss, on {other}"].lines]


def test_a_panel_that_no_arm_has_values_for_is_left_out(done: Done):
    with mpl.rc_context(STYLE):
        figure = figures._curves(done.study, [trial for trial in done.trials if trial.arm.name == "ema"], PANELS)
    titles = [ax.get_title("left") for ax in figure.axes]
    assert "denoising loss, on clean latents" in titles
    assert "denoising loss, on velocities" not in titles
    assert all(ax.lines for ax in figure.axes)


def test_titles_leave_room_for_the_numbers_beside_an_axis(done: Done):
    """They begin at the axis, and the layout heeds them only in height."""
    with mpl.rc_context(STYLE):
        spectra = [ax.get_title("left") for ax in figures._spectra(done.study, done.trials).axes]
        curves = [panel.title for panel in (*PANELS, *ONESTEP_PANELS)]
        for titles, columns in ((spectra, 2), (curves, 3)):
            for title in titles:
                text = Figure(dpi=DPI).text(0, 0, title, fontsize=STYLE["axes.titlesize"])
                assert text.get_window_extent().width / DPI < WIDTH / columns - 0.65, title


@pytest.mark.parametrize(("low", "high"), [(1.12, 1.17), (0.5, 2.4), (0.6, 5.5), (0.003, 1.1), (1e-4, 30.0)])
def test_a_logarithmic_axis_has_several_plain_ticks(low: float, high: float):
    ax = Figure().add_subplot()
    ax.plot([0, 1], [low, high])
    log_axis(ax)
    least, most = ax.get_ylim()
    shown = [tick for tick in ax.get_yticks() if least <= tick <= most]
    assert 3 <= len(shown) <= 8
    assert [float(label) for label in ax.yaxis.get_major_formatter().format_ticks(shown)] == pytest.approx(shown)
    assert not len(ax.get_yticks(minor=True))


def test_spectra_belong_to_the_recorded_effective_rank(done: Done):
    for trial in done.trials:
        spectra = json.loads(trial.spectrum_path.read_text())
        latent = (trial.record or {})["latent"]
        for kind, key in (("token", "effective_rank"), ("whole", "effective_rank_whole")):
            p = [value / sum(spectra[kind]) for value in spectra[kind]]
            entropy = -sum(share * math.log(share) for share in p if share)
            assert math.exp(entropy) == pytest.approx(latent[key], rel=1e-6)


# --- interruptions and failures ---------------------------------------------------------------------------------------


def watched(steps: list[int], until: int | None = None) -> Callable[..., Any]:
    """A training step that notes images seen, and calls for the end when an arm with seed 1 has seen so many."""
    step = loop.training_step

    def stepped(state: Any, x: Any, y: Any, config: Any) -> Any:
        values = step(state, x, y, config)
        steps.append(state.counters.images)
        if config.training.seed == 1 and state.counters.images == until:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    return stepped


def test_an_interrupted_study_continues_to_the_same_table(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference, study = done.out, done.study
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_step", watched([], until=48))
        with pytest.raises(
            Interrupted, match=r"stopped with 2 of 4 trainings finished; the same command continues"
        ) as stop:
            run_study(study, out)
    assert stop.value.signal == signal.SIGTERM
    assert [path.name for path in sorted((out / "runs/naive-seed1/checkpoints").iterdir())] == [
        "000000032",
        "000000048",
    ]
    before = {name: bytes_and_times(out / "runs" / name) for name in ("naive-seed0", "ema-seed0")}
    (out / "runs" / "ema-seed1").mkdir()
    (out / "runs" / "ema-seed1" / "config.json").write_text("{")  # as a process leaves it that is killed just then
    steps: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(loop, "training_step", watched(steps))
        run_study(study, out)
    assert steps == [*range(64, 129, 16), *range(16, 129, 16)], "the interrupted training goes on, the next begins"
    for name, files in before.items():
        assert bytes_and_times(out / "runs" / name) == files, f"{name} was touched"
    assert without_times(out) == without_times(reference)
    for name in ("naive-seed1", "ema-seed1"):
        assert model(out / "runs" / name) == model(reference / "runs" / name)
    for path in FILES - {"table.json", "table.csv", "table.md"}:
        with Image.open(out / path) as ours, Image.open(reference / path) as theirs:
            assert ours.tobytes() == theirs.tobytes(), path
    again = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    run_study(study, out)
    assert again == {path.name: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_several_jobs_train_the_same_arms_and_stop_cleanly(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, study = tmp_path / "out", tiny((*TWO, "stopped"))
    started: list[Any] = []
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    popen = trials.subprocess.Popen
    monkeypatch.setattr(trials.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def stop(line: str) -> None:
        if line.startswith("arm "):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_study(study, out, jobs=2, say=stop)
    assert [process.returncode for process in started if process.returncode not in (0, 143, -15)] == []
    finished = [trial.folder for trial in study.trials(out) if trial.is_settled]
    assert 1 <= len(finished) <= 2
    before = {folder: bytes_and_times(folder) for folder in finished}
    run_study(study, out, jobs=2)
    assert {folder: bytes_and_times(folder) for folder in finished} == before
    ours, theirs = ({arm["name"]: arm for arm in without_times(path)["arms"]} for path in (out, done.out))
    assert list(ours) == [*TWO, "stopped"]
    for name in TWO:  # the number of threads may change the last digits
        for key, value in theirs[name]["seeds"][0]["numbers"].items():
            assert ours[name]["seeds"][0]["numbers"][key] == pytest.approx(value, rel=1e-2, abs=1e-2), key


def test_an_arm_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[str] = []
    train = trials.train

    def failing(config: Any, folder: Path, **options: Any) -> Any:
        trained.append(folder.name)
        if folder.name == "naive-seed0":
            raise TrainingAborted(f"{folder}: the latents have collapsed")
        return train(config, folder, **options)

    monkeypatch.setattr(trials, "train", failing)
    monkeypatch.setattr(figures, "write", lambda *arguments: None)
    said: list[str] = []
    run_study(tiny(), tmp_path, say=said.append)
    assert any("naive, seed 0" in line and "failed: the latents have collapsed" in line for line in said)
    markdown = (tmp_path / "table.md").read_text()
    assert "| naive (0 of 1 seed) | velocity | velocity | gradient | yes | – |" in markdown
    assert "- naive, seed 0: the latents have collapsed" in markdown
    naive, ema = json.loads((tmp_path / "table.json").read_text())["arms"]
    assert naive["seeds"][0]["failed"] == "the latents have collapsed"
    assert ema["mean"]["reconstruction.psnr"] > 0
    run_study(tiny(), tmp_path)
    assert trained == ["naive-seed0", "ema-seed0"], "a failure is a result and is not repeated"


def test_a_full_disk_is_one_line_and_loses_no_finished_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = RunLog.write
    monkeypatch.setattr(figures, "write", lambda *arguments: None)

    def full(self: RunLog, line: dict[str, Any]) -> None:
        if "ema-seed0" in str(self.path) and line["images"] > 32:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        write(self, line)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", full)
        with pytest.raises(UserError, match=r"no space left on the disk.*what is finished is kept") as error:
            run_study(tiny(), tmp_path)
    assert "\n" not in str(error.value)
    before = bytes_and_times(tmp_path / "runs" / "naive-seed0")
    run_study(tiny(), tmp_path)
    assert bytes_and_times(tmp_path / "runs" / "naive-seed0") == before
    assert (tmp_path / "table.md").exists()


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "naive", "best"], "--arms: 'best' is not known; choose from naive-no-norm, naive,"),
        (["--arms", "naive", "naive"], "--arms: naive is given twice"),
        (["--seeds", "0"], "--seeds: 0 is not positive"),
        (["--budget", "0"], "--budget: 0 is not positive"),
        (["--draws", "0"], "--draws: 0 is not positive"),
        (["--jobs", "0"], "--jobs: 0 is not positive"),
        (["--budget", "much"], "--budget"),
        (["--data", "nowhere.zip"], "nowhere.zip"),
        (["--recipe", "cifar11"], "onefold: recipe: 'cifar11' is not known"),
        (["--change", "nonsense=1"], "--change: nonsense: no such setting; there are recipe, network.…, phases"),
        (["--change", "network.patch=abc"], "--change: network.patch: 'abc' is not a whole number"),
        (["--change", "training.seed=4"], "--change: training.seed is the study's own; give --seeds"),
        (["--change", "objective.draws=2"], "--change: objective.draws is decided by the study; leave it out"),
        (
            ["--arms", "naive", "clean", "--change", "objective.loss=clean"],
            "--change: objective.loss is decided by each of the arms; leave it out",
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["study", "collapse", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert list(tmp_path.iterdir()) == [], "nothing is written for wrong arguments"


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(UserError, match="is not an empty folder"):
        run_study(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a study"):
        run_study(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"budget": 256}, "was started with --budget 128, not 256"),
        ({"draws": 2}, "was started with --draws 1, not 2"),
        ({"seeds": 1}, "was started with --seeds 2, not 1"),
        ({"arms": ("ema",)}, "was started with --arms naive ema, not ema"),
        ({"images": 50}, "was started with images 40, not 50"),
        ({"changes": {"network.width": 64}}, "was started with network.width 32, not 64"),
    ],
)
def test_a_study_goes_on_as_it_began(other: dict[str, Any], told: str, tmp_path: Path):
    begin(tiny(seeds=2), tmp_path)
    before = (tmp_path / "study.json").read_bytes()
    if "changes" in other:
        other = {"changes": {**_flat_changes(), **other["changes"]}}
    with pytest.raises(UserError) as error:
        check(tiny(**{"seeds": 2, **other}), tmp_path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "study.json").read_bytes() == before


def _flat_changes() -> dict[str, Any]:
    config = tiny().config
    names = ("network.width", "network.depth", "network.heads", "sampler.steps", "training.batch", "training.warmup")
    names += ("training.ema_half_lives", "training.precision", "training.compile", "training.device")
    return {name: _get(config, name) for name in names}


def test_more_seeds_and_arms_may_be_added(tmp_path: Path):
    begin(tiny(), tmp_path)
    wider = tiny((*TWO, "clean"), seeds=3)
    check(wider, tmp_path)
    begin(wider, tmp_path)
    described = json.loads((tmp_path / "study.json").read_text())
    assert described["seeds"] == 3
    assert list(described["arms"]) == [*TWO, "clean"]


def test_what_was_measured_at_the_beginning_holds_for_the_whole_study(tmp_path: Path):
    automatic = {**_flat_changes(), "training.precision": "auto", "training.compile": "auto"}
    study = begin(tiny(changes=automatic), tmp_path)
    assert study.config.training.precision != "auto"
    described = json.loads((tmp_path / "study.json").read_text())
    described["resolved"]["training.precision"] = "bfloat16"
    (tmp_path / "study.json").write_text(json.dumps(described))
    check(tiny(changes=automatic), tmp_path)
    assert begin(tiny(changes=automatic), tmp_path).config.training.precision == "bfloat16"


def test_two_processes_cannot_work_on_one_study(tmp_path: Path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is working in this folder"):
        run_study(tiny(), tmp_path)
