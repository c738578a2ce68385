"""What who watches is told: lines where there is no terminal, a bar in a notebook, nothing with quiet."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers_runs import tiny
from onefold.commands import tables
from onefold.data.messages import count_text
from onefold.training import progress
from onefold.training.loop import train
from onefold.training.progress import ImageProgress
from onefold.training.run import Run


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_each_15_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]):
    """A step of a second is 1/10,000 of the work: lines come by the clock."""
    with ImageProgress("training", 100_000) as bar:
        for step in range(1, 61):
            clock.now += 1
            bar.update(10 * step, note="loss 0.5" if step == 20 else None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "training 10/100,000 (0 %)  10 images/s  2.8 h left",
        "training 160/100,000 (0 %)  10 images/s  2.8 h left",
        "training 310/100,000 (0 %)  10 images/s  2.8 h left  loss 0.5",
        "training 460/100,000 (0 %)  10 images/s  2.8 h left  loss 0.5",
    ]


def test_a_line_each_twentieth(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ImageProgress("training", 1000) as bar:
        for step in range(1, 101):
            clock.now += 0.25
            bar.update(10 * step)
    shown = [int(line.split()[1].split("/")[0].replace(",", "")) for line in capsys.readouterr().err.splitlines()]
    assert shown == [*range(10, 1000, 50), 1000]


@pytest.mark.parametrize(("images", "trained"), [(10, 16), (17, 32), (32, 32)])
def test_a_budget_ends_with_the_step_that_reaches_it(
    images: int, trained: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of 16 images; the total is what will be trained."""
    run = train(tiny(training__images=images), tmp_path / "run")
    assert run.length == run.images == trained
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("training ")]
    assert shown[-1] == f"{trained}/{trained}"
    assert all(place.endswith(f"/{trained}") for place in shown)


def test_a_fast_run_does_not_flood(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ImageProgress("training", 1000) as bar:
        for step in range(1, 101):
            clock.now += 1 / 32
            bar.update(10 * step)
    shown = [line.split()[1].removesuffix("/1,000") for line in capsys.readouterr().err.splitlines()]
    assert shown == ["10", "330", "650", "970", "1,000"]


def test_a_resumed_run_is_not_that_fast(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ImageProgress("training", 2000, done=1000) as bar:
        clock.now += 20
        bar.update(1100)
    assert "  5.0 images/s  3 min left" in capsys.readouterr().err.replace("180 s left", "3 min left")


def test_quiet_is_quiet_but_for_alarms(capsys: pytest.CaptureFixture[str]):
    with ImageProgress("training", 10, quiet=True) as bar:
        bar.update(5)
        bar.tell("first pictures")
        bar.update(10)
        assert capsys.readouterr() == ("", "")
        bar.say("collapse")
    assert capsys.readouterr() == ("", "collapse\n")


def test_a_notebook_has_a_bar_without_widgets(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            shown.append(data["text/plain"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        return Handle()

    module: Any = types.ModuleType("IPython")
    module.get_ipython = object
    module.display = types.ModuleType("IPython.display")
    module.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", module.display)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with ImageProgress("training", 100) as bar:
        for done in (25, 50, 100):
            clock.now += 1
            bar.update(done)
    assert [line.count("█") for line in shown] == [round(7.5), 15, 30]
    assert shown[-1].endswith("training 100/100 (100 %)  33 images/s")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run and what it told, on standard error."""
    folder = tmp_path_factory.mktemp("told") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
        patch.setattr(progress._Nothing, "say", lambda self, line: lines.append(line))
        run = train(tiny(training__images=320, training__sample_every=320), folder)
    return run, "\n".join(lines)


def test_the_first_pictures_come_after_a_tenth_and_it_is_said(told: tuple[Run, str]):
    run, lines = told
    assert sorted(path.name for path in (run.folder / "samples").glob("?????????.png")) == [
        "000000032.png",
        "000000320.png",
    ]
    assert lines.splitlines() == [
        f"cpu, float32 (as wanted), not compiled, {count_text(torch.get_num_threads(), 'thread')}",
        f"first pictures: {run.folder}/samples/000000032.png",
    ]


def test_the_speed_is_that_of_the_whole_run():
    history = [
        {"images": 100, "images_per_second": 10.0},
        {"images": 150, "images_per_second": None},
        {"images": 250, "images_per_second": 100.0},
    ]
    assert tables._speed_of(history) == pytest.approx(200 / 11)
    assert tables._speed_of([]) is None


def shown_of(run: Run) -> str:
    console = Console(record=True, width=1000)
    tables.show_run(console, run)
    return console.export_text()


def test_a_short_run_says_what_it_cannot_show(tmp_path: Path):
    short = train(tiny(training__images=32, training__log_every=32), tmp_path / "short", quiet=True)
    found = shown_of(short)
    assert "Too short to judge: its 32 images end within the warm-up of 32" in found
    assert "One line of the log: no curves; --training.log-every is 32 images" in found
    once = train(tiny(training__health_every=96), tmp_path / "once", quiet=True)
    assert [bool(line.get("health")) for line in once.history].count(True) == 2
    assert not re.search("Too short|no curves|measured once", shown_of(once))
    once = train(tiny(training__health_every=1000), tmp_path / "at the end", quiet=True)
    assert "Health was measured once" in shown_of(once)
    assert re.search(r"160 images;.* images/s on average", shown_of(once))


def test_a_pause_for_an_evaluation_does_not_multiply_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with ImageProgress("training", 10_000) as bar:
        for done in range(100, 5100, 100):
            clock.now += 60 if done == 5000 else 1
            bar.update(done)
    assert "110 s left" in capsys.readouterr().err.splitlines()[-1], "108 s for the first 4,900"
