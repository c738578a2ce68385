"""The progress of long work, for who watches: a bar in a terminal or a notebook, lines anywhere else.

Into a pipe, a file or the log of a cluster's job goes a line after the first step, and then one whenever `SECONDS` have
passed or `SHARE` of the work is done, so that nobody waits for minutes without a sign. All goes to standard error.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

__all__ = ["ImageProgress", "in_words"]

SECONDS = 15.0
"""Longest time between two lines while work goes on …"""
SHARE = 0.05
"""… or the share of it after which there is one, if that comes first …"""
LEAST = 1.0
"""… but not within so many seconds of the last."""
REDRAWN = 0.5
"""Seconds between two states of a notebook's bar."""
SPEED_OVER = 20.0
"""Seconds over which the shown speed is measured."""
WIDTH = 30
"""Characters of a notebook's bar."""


class Display(Protocol):
    """Where progress is shown."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def show(self, done: int, total: int, note: str) -> None: ...
    def say(self, line: str) -> None: ...


class ImageProgress:
    """Images done, images/s, time left and what the work has told; nothing of it when `quiet`.

    Args:
        title: What is done.
        total: Images in all.
        done: Images done before.
        quiet: Show nothing but what is said by `say`.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.total, self.done, self.note, self.quiet = total, done, "", quiet
        self._display: Display = _Nothing() if quiet else _display(title, done)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def update(self, done: int, note: str | None = None) -> None:
        """So many images are done; `note` is shown until there is a new one."""
        self.done, self.note = done, self.note if note is None else note
        self._display.show(self.done, self.total, self.note)

    def of(self, done: int, total: int) -> None:
        """A callback for work that says (done, total)."""
        self.total = total
        self.update(done)

    def say(self, line: str) -> None:
        """A line that everybody has to know, such as an alarm; a bar stays below it."""
        self._display.say(line)

    def tell(self, line: str) -> None:
        """A line for who watches."""
        if not self.quiet:
            self.say(line)


def in_words(means: Mapping[str, float | None]) -> str:
    """The means of a log line in a few words, without the speed, which the progress measures itself."""
    told = {name: mean for name, mean in means.items() if name != "images_per_second"}
    return "  ".join(f"{name} {mean:.4f}" for name, mean in told.items())


def _display(title: str, done: int) -> Display:
    if _in_notebook():
        return _Notebook(title, done)
    return _Bar(title, done) if sys.stderr.isatty() else _Lines(title, done)


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "ipykernel" in sys.modules


class _Nothing:
    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def show(self, done: int, total: int, note: str) -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _RecentSpeed:
    """Images per second over the last `SPEED_OVER` seconds, from reports of how many are done."""

    def __init__(self, done: int) -> None:
        self._seen = deque([(time.monotonic(), done)])

    def report(self, done: int) -> None:
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > SPEED_OVER:
            self._seen.popleft()

    @property
    def value(self) -> float | None:
        (start, before), (end, done) = self._seen[0], self._seen[-1]
        return (done - before) / (end - start) if end > start and done > before else None


class _TimeLeft:
    """Seconds left at the mean speed of the whole run, so that pauses for pictures and evaluations count too.

    The first step, which may have compiled, counts only until there is another.
    """

    def __init__(self, done: int) -> None:
        self._since, self._is_first = (time.monotonic(), done), True

    def report(self, done: int, total: int) -> float | None:
        now, (start, before) = time.monotonic(), self._since
        if self._is_first and done > before:
            self._since, self._is_first = (now, done), False
        return (total - done) * (now - start) / (done - before) if done > before else None


class _Lines(_Nothing):
    """A line from time to time."""

    def __init__(self, title: str, done: int) -> None:
        self.title = title
        self._speed = _RecentSpeed(done)
        self._left = _TimeLeft(done)
        self._told: tuple[float, int] | None = None
        """When the last line was written, and at how many images."""

    def show(self, done: int, total: int, note: str) -> None:
        self._speed.report(done)
        left = self._left.report(done, total)
        if self._told is not None and not self._due(done, total, *self._told):
            return
        self._told = time.monotonic(), done
        self._write(f"{self.title} {_in_one_line(done, total, self._speed.value, left, note)}")

    def _due(self, done: int, total: int, then: float, before: int) -> bool:
        waited = time.monotonic() - then
        if done == before:
            return False
        return done >= total or waited >= SECONDS or (waited >= LEAST and done - before >= SHARE * total)

    def _write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Notebook(_Lines):
    """A bar in the output of a notebook's cell; needs no widgets."""

    def start(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def _due(self, done: int, total: int, then: float, before: int) -> bool:
        return done >= total or time.monotonic() - then >= REDRAWN

    def show(self, done: int, total: int, note: str) -> None:
        filled = round(WIDTH * done / total) if total else WIDTH
        self._bar = "█" * filled + "░" * (WIDTH - filled)
        super().show(done, total, note)

    def _write(self, line: str) -> None:
        self._handle.update({"text/plain": f"{self._bar} {line}"}, raw=True)

    def say(self, line: str) -> None:
        print(line, flush=True)


def _in_one_line(done: int, total: int, speed: float | None, left: float | None, note: str) -> str:
    """`3,200/64,000 (5 %)  210 images/s  4.8 minutes left  reconstruction 0.0213`."""
    parts = [f"{done:,}/{total:,} ({100 * done // total if total else 100} %)"]
    if speed is not None:
        parts += [f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.1f} images/s"]
    if left is not None and done < total:
        parts += [f"{_duration(left)} left"]
    return "  ".join([*parts, note] if note else parts)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "– images/s")


class _Bar:
    """A bar in a terminal."""

    def __init__(self, title: str, done: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}"),
            _Speed(),
            TextColumn("{task.fields[left]}  {task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=SPEED_OVER)
        self._task = self._progress.add_task(title, total=None, completed=done, left="", note="")
        self._left = _TimeLeft(done)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, done: int, total: int, note: str) -> None:
        seconds = self._left.report(done, total)
        left = "" if seconds is None else f"{_duration(seconds)} left"
        self._progress.update(self._task, completed=done, total=total, left=left, note=note)

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
