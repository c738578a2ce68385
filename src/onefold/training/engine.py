"""What a training runs on: device, precision, and the wish to stop.

One process, one device. `precision="auto"` measures before it chooses: bf16 matrix products can be several times
faster than float32 ones on a CPU with matrix units, and slower on one without.
"""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Literal, Self

import torch

from onefold.architecture import Network
from onefold.errors import UserError
from onefold.flops import sampling_flops, training_flops
from onefold.sampling import Sampler
from onefold.training.config import Config, TrainingConfig

__all__ = [
    "Choice",
    "Interruption",
    "Precision",
    "autocast",
    "compiles",
    "computing",
    "eager",
    "preferred",
    "resolve_device",
    "resolved",
    "speed_up",
    "try_compiled",
]

Precision = Literal["auto", "float32", "bfloat16"]
Choice = Literal["auto", "yes", "no"]

LONG_RUN = 5e12
"""Operations of a whole training, or of all samples, from which the half minute of compilation pays."""


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


def resolved(config: Config, device: torch.device, say: Callable[[str], None] = lambda line: None) -> Config:
    """The settings with every "auto" decided, by measurement where it takes one; a resumed run has decided already.

    `say` is told, in a line, what was chosen and why.

    Raises:
        UserError: `compile="yes"` where nothing can be compiled.
    """
    training = config.training
    work = training.images * training_flops(config.network, config.objective, config.stages)
    compiled = "yes" if compiles(training.compile, work, device) else "no"
    precision, why = training.precision, "as wanted"
    if precision == "auto":
        times = speed_up(device)
        precision, why = preferred(times), f"bfloat16 products are {times:.1f} times as fast here as float32 ones"
    about = "compiled" if compiled == "yes" else "not compiled"
    say(f"{device.type}, {precision} ({why}), {about}, {torch.get_num_threads()} threads")
    return replace(config, training=replace(training, precision=precision, compile=compiled))


@contextmanager
def computing(
    network: Network, device: torch.device, *, precision: Precision, compiled: Choice, images: int, sampler: Sampler
) -> Generator[str]:
    """The context in which a network, moved to the device, makes `images` samples; gives the precision chosen.

    Its trunk is compiled for any batch size if that pays or is wanted, and runs uncompiled again afterwards.

    Raises:
        UserError: `compiled="yes"` where nothing can be compiled.
    """
    work = images * sampling_flops(network.config, sampler.evaluations)
    trunks = network.to(device).trunks if compiles(compiled, work, device) else []
    chosen = preferred(speed_up(device)) if precision == "auto" else precision
    for trunk in trunks:
        trunk.compile(dynamic=True)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bfloat16"):
            yield chosen
    finally:
        for trunk in trunks:
            trunk._compiled_call_impl = None


def compiles(wish: Choice, work: float, device: torch.device) -> bool:
    """Whether to compile what takes so many operations in all.

    Raises:
        UserError: it is wanted, where nothing can be compiled.
    """
    if wish == "auto":
        return work >= LONG_RUN and try_compiled(device)
    if wish == "yes" and not try_compiled(device):
        raise UserError(
            "compile: torch.compile does not work here (on a CPU it needs a C++ compiler and Python's headers); "
            "install them or choose no"
        )
    return wish == "yes"


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


def preferred(times: float) -> Literal["float32", "bfloat16"]:
    """bf16 where its matrix products are at least twice as fast as float32's."""
    return "bfloat16" if times >= 2 else "float32"


def speed_up(device: torch.device) -> float:
    """How many times as fast bf16 matrix products are as float32 ones, by some 50 ms of measurement; 0: there are none.

    Matrix products alone: attention on a CPU stays in float32 (see `trunk.Attention`).
    """
    a = torch.randn(512, 512, device=device)
    try:
        return _seconds_of_product(a) / _seconds_of_product(a.bfloat16())
    except RuntimeError:
        return 0.0


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
