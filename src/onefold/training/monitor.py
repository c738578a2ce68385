"""Monitors: what looks at a run from time to time, writes what it finds into the log, and sounds an alarm.

An alarm is a function of the log alone, so that a resumed run goes on judging as if it had not been interrupted.
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
    """Watches over a phase of a run."""

    key: ClassVar[str]
    """What it measures stands under this name in the log."""
    alarm: ClassVar[str]
    """What has happened where its alarm sounds, as the end of "… at 6,400 images: "."""
    cure: ClassVar[str]
    """What may help."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @abstractmethod
    def measure(self, state: TrainingState, before: Values | None) -> Values:
        """What there is to be measured; `before` is the last measurement. The weights stay as they are."""

    @abstractmethod
    def judge(self, log: Sequence[Line]) -> str | None:
        """What is wrong at the last line of the log, in words; None if nothing is."""

    def look(self, state: TrainingState, line: Line, say: Callable[[str], None]) -> Values:
        """Measure and judge: what belongs into a line of the log. A new alarm is said, if so configured."""
        history = self.run.history
        measured = [seen for seen in history if seen.get(self.key)]
        last = measured[-1] if measured else {}
        values: Values = {self.key: self.measure(state, last.get(self.key))}
        reason = self.judge([*history, {**line, **values}])
        if reason is None:
            return values
        if self.run.config.training.on_collapse == "warn" and "alarm" not in last:
            say(f"{self.run.folder}: {self.alarm} at {line['images']:,} images: {reason}; {self.cure}")
        return {**values, "alarm": reason}
