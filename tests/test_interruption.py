import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers_runs import differing, log, newest, tiny
from onefold.cli import run as command
from onefold.errors import Interrupted
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.loop import train
from onefold.training.run import Run, load_run

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM, times: int = 1) -> None:
    """Raise a signal within the step that reaches `at` images."""
    honest = loop.training_step

    def step(state, x, y, config):
        values = honest(state, x, y, config)
        if state.counters.images == at:
            for _ in range(times):
                signal.raise_signal(number)
        return values

    monkeypatch.setattr(loop, "training_step", step)


def interrupted(config: Config, folder: Path, *places: int) -> Run:
    """A run stopped at each of `places`, and gone on with."""
    for place in places:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, place)
            with pytest.raises(Interrupted):
                train(config, folder, resume=(folder / "config.json").exists(), quiet=True)
        assert checkpoints(folder)[-1].name == f"{place:09d}"
    return train(None, folder, resume=True, quiet=True)


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    changes = {"training__optimizer": request.param, "objective__draws": 2, "objective__decoder_noise": 0.5}
    changes["training__keep_last"] = 9
    return train(tiny(**changes), tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.mark.parametrize("places", [(96,), (64,), (80,), (16, 48, 144)], ids=str)
def test_an_interrupted_run_is_a_whole_one(whole: Run, tmp_path: Path, places: tuple[int, ...]):
    """96 is due for a log line and a checkpoint, 64 for a line, 80 for neither: there a line is half told."""
    resumed = interrupted(whole.config, tmp_path / "run", *places)
    assert differing(newest(whole.folder), newest(resumed.folder)) == []
    for name in ("000000160.png", "000000160-reconstructions.png"):
        assert (whole.folder / "samples" / name).read_bytes() == (resumed.folder / "samples" / name).read_bytes()
    assert log(resumed.folder) == log(whole.folder)


def test_the_log_beyond_the_checkpoint_is_cut_off(whole: Run, tmp_path: Path):
    """As after a kill: the log is at 128 images and half a line further, the newest checkpoint at 96."""
    shutil.copytree(whole.folder, tmp_path / "run")
    for path in checkpoints(tmp_path / "run")[-2:]:
        shutil.rmtree(path)
    lines = (whole.folder / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    assert checkpoints(tmp_path / "run")[-1].name == "000000096"
    train(None, tmp_path / "run", resume=True, quiet=True)
    assert log(tmp_path / "run") == log(whole.folder)


def test_a_finished_run_stays_as_it_is(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(None, tmp_path / "run", resume=True, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_killed_before_its_model_was_published_publishes_it(whole: Run, tmp_path: Path):
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    train(None, tmp_path / "run", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(tmp_path / "run")) == []


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    run = train(tiny(training__images=48), tmp_path / "run", quiet=True)
    text = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(text.replace('"images": 48', '"images": 320', 1))
    with monkeypatch.context() as patch:
        interrupt(patch, 80, number)
        assert command(["train", "--resume", "--quiet", "--out", str(run.folder)]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{run.folder}: stopped at 80 of 320 images, saved; go on with --resume" in captured.err
    assert checkpoints(run.folder)[-1].name == "000000080"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert command(["train", "--resume", "--quiet", "--out", str(run.folder)]) == 0
    assert checkpoints(run.folder)[-1].name == "000000320"


def test_a_signal_within_the_last_step_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(monkeypatch, 160)
    assert train(tiny(), tmp_path / "run", quiet=True).history[-1]["images"] == 160


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 80, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run", quiet=True)
    assert checkpoints(tmp_path / "run")[-1].name == "000000048"
    train(None, tmp_path / "run", resume=True, quiet=True)


# --- processes --------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from onefold.cli import main; main()", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)


def wait_for(folder: Path, images: int, process: subprocess.Popen[str]) -> None:
    """Until the log is beyond `images`."""
    log_file = folder / "log.jsonl"
    while process.poll() is None:
        if log_file.exists() and any(line["images"] > images for line in load_run(folder).history):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


def test_signals_to_a_real_process(tmp_path: Path):
    sizes = {"network.width": 32, "network.depth": 1, "network.heads": 2, "training.batch": 8}
    sizes |= {"training.images": 3992, "training.log-every": 8, "training.precision": "float32"}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    run, reached = tmp_path / "run", 0
    for first, number, code in ((["digits", *options], signal.SIGTERM, 143), (["--resume"], signal.SIGINT, 130)):
        process = start("train", *first, "--out", str(run))
        wait_for(run, reached, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert out.startswith("digits: 1,437 images to train on, 360 to test on"), out
        assert out.count("\n") == 1
        *before, last = err.splitlines()
        assert "saved; go on with --resume" in last
        assert all(line.startswith(("cpu, ", "training ")) for line in before), err
        now = int(checkpoints(run)[-1].name)
        assert now > reached
        reached = now
