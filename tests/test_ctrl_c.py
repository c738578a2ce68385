"""Ctrl-C as a terminal sends it, to all processes of the command's group, at any moment: one line and exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers_runs import tiny
from onefold.compute import can_compile, resolve_device
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import load_run

ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ("--network.width", "32", "--network.depth", "1", "--network.heads", "2", "--training.precision", "float32")
QUIET = ("--quiet", "--training.compile", "no")


class Command:
    """`onefold` in a process group of its own."""

    def __init__(self, *words: object, before: str = "", **environment: str) -> None:
        program = f"from onefold.cli import main\n{before}\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ALONE, **environment},
            start_new_session=True,
        )

    def press(self, *, alone: bool = False) -> None:
        """Ctrl-C, or with `alone` a signal to the command itself and none of the processes that it has started."""
        (os.kill if alone else os.killpg)(self.process.pid, signal.SIGINT)

    def end(self, code: int = 130) -> str:
        """Its last words: a single line."""
        _, err = self.process.communicate(timeout=120)
        assert self.process.returncode == code, err
        assert err.count("\n") == 1, err
        assert err.startswith("onefold: ")
        return err

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.3, 1.8, 2.5])
@pytest.mark.parametrize("words", [("train", "digits"), ("estimate", "digits"), ("study", "bias")], ids=str)
def test_in_the_first_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], seconds: float):
    monkeypatch.chdir(tmp_path)
    command = Command(*words, *((*SMALL, *QUIET) if words[0] == "train" else ()))
    time.sleep(seconds)
    command.press()
    command.end()


def test_while_a_module_loads_that_cannot_bear_it(tmp_path: Path):
    """Some turn an exception amid their import into one of their own."""
    touchy = (
        "import time, pathlib, onefold.cli as cli\n"
        "def load(name):\n"
        f"    pathlib.Path({str(tmp_path / 'loads')!r}).touch()\n"
        "    try: time.sleep(60)\n"
        "    except BaseException: raise ImportError('broken')\n"
        "cli.importlib.import_module = load"
    )
    command = Command("train", "digits", before=touchy)
    command.wait_for(tmp_path / "loads")
    command.press()
    assert command.end() == "onefold: interrupted\n"


def test_while_data_are_read(tmp_path: Path):
    slow = (
        "import time, pathlib, onefold.training.datasets as datasets\n"
        f"def slow(*rest, **named): pathlib.Path({str(tmp_path / 'reads')!r}).touch(); time.sleep(60)\n"
        "datasets.open_dataset = slow"
    )
    command = Command("train", "digits", "--out", tmp_path / "run", "--quiet", before=slow)
    command.wait_for(tmp_path / "reads")
    command.press()
    assert command.end() == "onefold: interrupted\n"
    assert not (tmp_path / "run").exists()


def test_amid_a_destructor_where_python_ignores_exceptions(tmp_path: Path):
    deaf = (
        "import time, pathlib, onefold.training.datasets as datasets\n"
        "class Deaf:\n"
        f"    def __del__(self): pathlib.Path({str(tmp_path / 'dies')!r}).touch(); time.sleep(60)\n"
        "def slow(*rest, **named): Deaf(); time.sleep(60)\n"
        "datasets.open_dataset = slow"
    )
    command = Command("train", "digits", "--out", tmp_path / "run", "--quiet", before=deaf)
    command.wait_for(tmp_path / "dies")
    command.press()
    assert command.end() == "onefold: interrupted\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.parametrize("alone", [False, True])
def test_while_it_compiles(tmp_path: Path, alone: bool):
    """Nothing is trained yet: it ends at once, and the run can be begun again by --resume."""
    if not can_compile(resolve_device("cpu")):
        pytest.skip("nothing can be compiled here")
    words = ("train", "digits", "--out", tmp_path / "run", *SMALL, "--quiet", "--training.compile", "yes")
    command = Command(*words, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    command.wait_for(tmp_path / "run" / "log.jsonl")
    time.sleep(3)
    start = time.perf_counter()
    command.press(alone=alone)
    assert "run: stopped before its first checkpoint; go on with --resume: `onefold train" in command.end()
    assert time.perf_counter() - start < 20  # it takes a second, on a machine that has nothing else to do
    assert not checkpoints(tmp_path / "run")


def test_while_it_trains_all_is_saved(tmp_path: Path):
    words = ("train", "digits", "--out", tmp_path / "run", *SMALL, *QUIET, "--training.log-every", "64")
    command = Command(*words)
    log = tmp_path / "run" / "log.jsonl"
    command.wait_for(log)
    while not log.read_text():
        time.sleep(0.02)
    command.press()
    assert "saved; go on with --resume" in command.end()
    assert int(checkpoints(tmp_path / "run")[-1].name) > 0


def test_a_second_time_ends_at_once(tmp_path: Path):
    stuck = (
        "import time, pathlib, onefold.training.loop as loop\n"
        "def stuck(*rest):\n"
        f"    pathlib.Path({str(tmp_path / 'steps')!r}).touch()\n"
        "    while True: time.sleep(0.1)\n"
        "loop.training_step = stuck"
    )
    command = Command("train", "digits", "--out", tmp_path / "run", *SMALL, *QUIET, before=stuck)
    command.wait_for(tmp_path / "steps")
    command.press()
    time.sleep(0.5)  # it finishes its step, which takes for ever
    assert command.process.poll() is None
    command.press()
    assert command.end() == "onefold: interrupted\n"


def test_what_it_waits_for_is_said(tmp_path: Path):
    slow = (
        "import time, pathlib, onefold.training.loop as loop\n"
        "honest = loop.training_step\n"
        "def slow(*rest):\n"
        f"    pathlib.Path({str(tmp_path / 'steps')!r}).touch()\n"
        "    time.sleep(4)\n"
        "    return honest(*rest)\n"
        "loop.training_step = slow"
    )
    command = Command("train", "digits", "--out", tmp_path / "run", *SMALL, *QUIET, before=slow)
    command.wait_for(tmp_path / "steps")
    command.press()
    _, err = command.process.communicate(timeout=60)
    assert command.process.returncode == 130
    assert err.splitlines()[0] == "onefold: finishing the step, then saving; Ctrl-C again ends at once"
    assert "saved; go on with --resume" in err.splitlines()[1]


@pytest.mark.parametrize("words", [("sample", "-n", "100000", "--steps", "1000"), ("evaluate", "--steps", "1000")])
def test_while_it_samples(tmp_path: Path, words: tuple[str, ...]):
    train(tiny(), tmp_path / "run", quiet=True)
    command = Command(words[0], tmp_path / "run", *words[1:], ONEFOLD_CACHE=str(tmp_path / "cache"))
    time.sleep(6)
    command.press()
    assert command.end() == "onefold: interrupted\n"


def test_pictures_are_broken_off_and_drawn_when_the_run_goes_on(tmp_path: Path):
    """The signal comes while the first pictures are drawn, at a tenth of the run, where nothing has been saved yet."""
    from onefold.errors import Interrupted
    from onefold.training import loop

    def draw(*rest: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("was not broken off")

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_grids", draw)
        with pytest.raises(Interrupted, match=r"stopped at 16 of 160 images, saved; go on with --resume"):
            train(tiny(training__sample_every=160), run, quiet=True)
    assert checkpoints(run)[-1].name == "000000016"
    train(None, run, resume=True, quiet=True)
    assert (run / "samples" / "000000016.png").exists()
    assert load_run(run).images == 160
