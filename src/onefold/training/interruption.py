"""The wish to stop: SIGTERM and Ctrl-C become a request, so that a training can save before it ends."""

import contextlib
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interruption"]

PATIENCE = 1.5
"""Seconds after which somebody who wants to stop is told what that waits for."""


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request, so that the loop can save before it stops; a second one stops at once.

    `signal` is the number of the signal that came, or 0. With `launched`, a second one changes nothing: launchers pass
    on what has also reached the processes that they started, and kill those that take too long.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.signal = 0
        self.launched = launched
        self._at_once = False
        self._before: dict[int, signal.Handlers | int | None] = {}
        self._timer = threading.Timer(PATIENCE, _say_what_it_waits_for)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)  # type: ignore[assignment]
        except ValueError:  # not the main thread: nobody sends signals here
            self._before.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self, holds: bool = True) -> Generator[None]:
        """Work during which there is nothing to save, if that `holds`: a signal breaks it off (KeyboardInterrupt)."""
        if holds and self.signal:
            raise KeyboardInterrupt
        self._at_once = holds
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            if self.launched:
                return
            raise KeyboardInterrupt
        self.signal = number
        if self._at_once:
            raise KeyboardInterrupt
        if not self.launched:
            self._timer.start()


def _say_what_it_waits_for() -> None:
    print("onefold: finishing the step, then saving; Ctrl-C again ends at once", file=sys.stderr, flush=True)
