"""What a training runs on: device, precision, and the wish to stop.

One process, one device. `precision="auto"` measures before it chooses: bf16 matrix products can be several times
faster than float32 ones on a CPU with matrix units, and slower on one without.
"""

import signal
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Literal, Self

import torch

from onefold.errors import UserError
from onefold.flops import training_flops
from onefold.training.config import Config, TrainingConfig

__all__ = ["Interruption", "autocast", "choose_precision", "eager", "resolve_device", "resolved", "try_compiled"]

LONG_RUN = 5e12
"""Operations of a whole training from which the half minute of compilation pays."""


def resolve_device(name: str) -> torch.device:
    """The device of a name, or for "auto" a GPU if there is one, else the CPU.

    Raises:
        UserError: a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used here; choose auto, cpu, cuda or cuda:1") from error
    return device


def resolved(config: Config, device: torch.device) -> Config:
    """The settings with every "auto" decided, by measurement where it takes one; a resumed run has decided already.

    Raises:
        UserError: `compile="yes"` where nothing can be compiled.
    """
    training = config.training
    precision, compiled = training.precision, training.compile
    if precision == "auto":
        precision = choose_precision(device)
    if compiled == "auto":
        work = training.images * training_flops(config.network, config.objective, config.stages)
        compiled = "yes" if work >= LONG_RUN and try_compiled(device) else "no"
    elif compiled == "yes" and not try_compiled(device):
        raise UserError(
            "training.compile: torch.compile does not work here (on a CPU it needs a C++ compiler and Python's "
            "headers); install them or use --training.compile no"
        )
    return replace(config, training=replace(training, precision=precision, compile=compiled))


def try_compiled(device: torch.device) -> bool:
    """Whether torch.compile works on this device: a small function is compiled and run."""
    try:
        doubled = torch.compile(_doubled)(torch.ones(8, device=device))
    except Exception:  # whatever the compiler's tool chain raises, the answer is no
        return False
    return bool((doubled == 2).all())


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def eager() -> AbstractContextManager[None]:
    """The context in which compiled networks run uncompiled: pictures have other shapes than training."""
    return torch.compiler.set_stance("force_eager")


def choose_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bf16 where its matrix products are at least twice as fast as float32's, by a measurement of some 50 ms."""
    a = torch.randn(512, 512, device=device)
    try:
        speed_up = _seconds_of_product(a) / _seconds_of_product(a.bfloat16())
    except RuntimeError:  # no bf16 products on this device
        return "float32"
    return "bfloat16" if speed_up >= 2 else "float32"


def _seconds_of_product(a: torch.Tensor) -> float:
    times: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        product = a
        for _ in range(4):
            product = a @ a
        product[0, 0].item()  # wait for the device
        times.append(time.perf_counter() - start)
    return min(times)


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
