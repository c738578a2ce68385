"""Monitors: they measure a run from time to time, write the results to the log, and raise an alarm.

An alarm depends only on the log, so a resumed run raises the same alarms as an uninterrupted one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from onefold.training.run import Run
from onefold.training.state import TrainingState

__all__ = ["Line", "Monitor", "Values"]

Values = dict[str, Any]
Line = Mapping[str, Any]
"""A line of the log."""


class Monitor(ABC):
    """Monitors a phase of a run."""

    key: ClassVar[str]
    """Name of its measurements in the log."""
    alarm: ClassVar[str]
    """What its alarm means, to be followed by " at 6,400 images: …"."""
    cure: ClassVar[str]
    """What may help."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @abstractmethod
    def measure(self, state: TrainingState, before: Values | None) -> Values:
        """Measure everything; `before` is the last measurement. The weights do not change."""

    @abstractmethod
    def judge(self, log: Sequence[Line]) -> str | None:
        """Describe what is wrong at the last line of the log; None if nothing is."""

    def look(self, state: TrainingState, line: Line, say: Callable[[str], None]) -> Values:
        """Measure and judge; returns the entries of a log line. A new alarm is reported, if so configured."""
        history = self.run.history
        measured = [seen for seen in history if seen.get(self.key)]
        last = measured[-1] if measured else {}
        values: Values = {self.key: self.measure(state, last.get(self.key))}
        reason = self.judge([*history, {**line, **values}])
        if reason is None:
            return values
        if self.run.config.training.on_collapse == "warn" and self.judge(history) is None:
            say(f"{self.run.folder}: {self.alarm} at {line['images']:,} images: {reason}; {self.cure}")
        return {**values, "alarm": reason}
