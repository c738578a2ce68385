"""What a training runs with: every "auto" decided, autocast, and the wish to stop. One process, one device."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Self

import torch

from onefold import compute
from onefold.flops import training_flops
from onefold.training.config import Config, TrainingConfig

__all__ = ["Interruption", "autocast", "resolved"]

LONG_RUN = 5e12
"""Operations of a whole training from which the half minute of compilation pays."""


def resolved(config: Config, device: torch.device, say: Callable[[str], None] = lambda line: None) -> Config:
    """The settings with every "auto" decided, by measurement where it takes one; a resumed run has decided already.

    `say` is told, in a line, what was chosen and why.

    Raises:
        UserError: `compile="yes"` where nothing can be compiled.
    """
    training = config.training
    work = training.images * training_flops(config.network, config.objective, config.stages)
    compiled = training.compile
    if compiled == "auto":
        compiled = "yes" if work >= LONG_RUN and compute.can_compile(device) else "no"
    elif compiled == "yes":
        compute.require_compiler("training.compile", device)
    precision, why = training.precision, "as wanted"
    if precision == "auto":
        times = compute.speed_up(device)
        precision = compute.precision_for_speed_up(times)
        why = f"bfloat16 products are {times:.1f} times as fast here as float32 ones"
    about = "compiled" if compiled == "yes" else "not compiled"
    say(f"{device.type}, {precision} ({why}), {about}, {torch.get_num_threads()} threads")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        say(
            f"the machine is busy (load {load:.1f} on {cores} cores): threads that wait for one another crawl; "
            "OMP_NUM_THREADS=1 may be faster"
        )
    return replace(config, training=replace(training, precision=precision, compile=compiled))


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context in which losses are computed. Norms, losses and attention on a CPU stay in float32 inside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16")


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
