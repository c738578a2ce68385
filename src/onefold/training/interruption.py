"""The wish to stop: SIGTERM and Ctrl-C become a request, so that a training can save before it ends."""

import signal
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Interrupted", "Interruption"]


class Interrupted(Exception):
    """A signal ended the training; everything is saved. `signal` is its number."""

    def __init__(self, signal: int, line: str) -> None:
        super().__init__(line)
        self.signal = signal


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request, so that the loop can save before it stops; a second one stops at once.

    `signal` is the number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, signal.Handlers | int | None] = {}

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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
