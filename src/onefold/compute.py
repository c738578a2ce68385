"""What a network computes on: the device, the precision of matrix products, compilation.

bf16 matrix products can be several times as fast as float32 ones on a CPU with matrix units, and slower on one
without: so "auto" measures before it chooses. Norms, losses, parameters and averages are float32 in any case, and so
is attention on a CPU (see `trunk.Attention`).

TF32 is a third choice, of NVIDIA GPUs from 2020 on: factors of float32 products are rounded to 10 bits after the first,
as many as float16 has, over the whole range of float32; all sums and all else are float32.
"""

import importlib
import os
import signal
import statistics
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, TypeAlias

import torch
from torch import nn

from onefold.errors import UserError
from onefold.networks.base import Network
from onefold.networks.trunk import Block
from onefold.settings import Precision

__all__ = [
    "can_compile",
    "check_precision",
    "compile_blocks",
    "eager",
    "precision_for_speed_up",
    "products",
    "require_compiler",
    "resolve_device",
    "resolve_precision",
    "sampling_context",
    "speed_up",
]


Computed: TypeAlias = Literal["float32", "tf32", "bfloat16"]
"""A precision, decided."""

TURNS = 9
"""Measurements of each precision that `speed_up` takes the median of."""


def resolve_device(name: str) -> torch.device:
    """The device of a name, or for "auto" a CUDA GPU if there is one, else the CPU.

    Of several processes that a launcher started on a machine, each has the GPU of its number there (LOCAL_RANK). A
    Mac's GPU ("mps") has to be asked for by name: onefold has not been run on one yet.

    Raises:
        UserError: a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["auto", "cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))])
        raise UserError(f"device: {name!r} cannot be used here; choose one of {there}") from error
    return device


@contextmanager
def sampling_context(
    network: Network, device: torch.device, *, precision: Precision = "float32", compiled: bool = False
) -> Generator[str]:
    """The context in which a network samples on a device, to which it is moved; gives the resolved precision.

    With `compiled` its blocks are compiled, once for all batch sizes, and run uncompiled again afterwards.

    Raises:
        UserError: nothing can be compiled here, or TF32 on a device without it.
    """
    network.to(device)
    if compiled:
        require_compiler("--compile", device)
        compile_blocks(network, dynamic=True)
    taken = resolve_precision(precision, device)
    try:
        with products(taken, device), torch.autocast(device.type, torch.bfloat16, enabled=taken == "bfloat16"):
            yield taken
    finally:
        for block in _blocks(network) if compiled else ():
            block._compiled_call_impl = None


# --- precision --------------------------------------------------------------------------------------------------------


def resolve_precision(precision: Precision, device: torch.device) -> Computed:
    """A precision, "auto" decided.

    Raises:
        UserError: TF32 on a device without it.
    """
    check_precision("precision", precision, device)
    return precision_for_speed_up(speed_up(device)) if precision == "auto" else precision


def check_precision(option: str, precision: Precision, device: torch.device) -> None:
    """Refuse TF32 where no GPU has it.

    Raises:
        UserError: naming the option.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"{option}: tf32 is a format of NVIDIA GPUs, not of {device.type}; choose float32 or bfloat16")


@contextmanager
def products(precision: Precision, device: torch.device) -> Generator[None]:
    """The context in which float32 matrix products on a GPU are rounded to TF32, if that is the precision.

    Backward passes have to be in it, too: unlike autocast, it leaves no trace in the graph.

    Raises:
        UserError: TF32 on a device without it.
    """
    check_precision("precision", precision, device)
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precision_for_speed_up(times: float) -> Literal["float32", "bfloat16"]:
    """bf16 where its matrix products are at least twice as fast as float32's."""
    return "bfloat16" if times >= 2 else "float32"


def speed_up(device: torch.device) -> float:
    """How many times as fast bf16 matrix products are as float32 ones, measured in some 50 ms; 0: there are none.

    The two are measured in turns, and the median of each counts: other work on the machine, which comes and goes, slows
    both down alike. The products are large enough for a GPU to take longer than starting them does.
    """
    size = 512 if device.type == "cpu" else 4096
    rng = torch.Generator(device).manual_seed(0)  # the caller's random numbers go on as if nothing had happened
    a = torch.randn(size, size, generator=rng, device=device)
    try:
        b = a.bfloat16()
        both = [(_seconds_of_products(a), _seconds_of_products(b)) for _ in range(TURNS)]
    except RuntimeError:
        return 0.0
    single, half = (statistics.median(times) for times in zip(*both, strict=True))
    return single / half


def _seconds_of_products(a: torch.Tensor) -> float:
    start = time.perf_counter()
    product = a
    for _ in range(4):
        product = a @ a
    product[0, 0].item()  # wait for the device
    return time.perf_counter() - start


# --- compilation ------------------------------------------------------------------------------------------------------


def require_compiler(option: str, device: torch.device) -> None:
    """Refuse an option that wants compilation where torch.compile does not work.

    Raises:
        UserError: naming the option.
    """
    if not can_compile(device):
        raise UserError(
            f"{option}: torch.compile does not work here (on a CPU it needs a C++ compiler and Python's headers); "
            "install them, or do without"
        )


def compile_blocks(module: nn.Module, *, dynamic: bool) -> None:
    """Compile all blocks of all trunks in a module, in place; names stay as they are.

    Blocks of the same width share what is compiled, so that the time it takes does not grow with depth or with the
    number of networks. With `dynamic` that is one for all numbers of images and tokens; else one for each, which is
    faster.
    """
    _start_compiler()
    torch._dynamo.config.recompile_limit = 64  # shapes and gradients of all roles share the code of one block
    options = _options()
    for block in _blocks(module):
        block.compile(dynamic=dynamic, options=options)


def _options() -> dict[str, bool] | None:
    """Without a fusion that gives wrong gradients on a GPU in torch 2.10 and some later versions.

    The gradient of a modulation that is the same for all images, as an encoder's is, then holds numbers of the step
    before (pytorch/pytorch#193061); training a network of width 384 diverged within fifteen steps on an H200.
    """
    triton = importlib.import_module("torch._inductor.config").triton
    return {"triton.mix_order_reduction": False} if hasattr(triton, "mix_order_reduction") else None


def _blocks(module: nn.Module) -> list[Block]:
    return [part for part in module.modules() if isinstance(part, Block)]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works on this device: a small function is compiled and run."""
    _start_compiler()
    try:
        doubled = torch.compile(_doubled)(torch.ones(8, device=device))
    except Exception:  # whatever the compiler's tool chain raises, the answer is no
        return False
    return bool((doubled == 2).all())


def _start_compiler() -> None:
    """Start the processes that torch compiles in, so that Ctrl-C in a terminal, which reaches all, is not for them.

    Without this they die of it, each with its traceback, while the training still wants to save. They inherit that the
    signal is blocked; in this process it is not, a moment later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        module = importlib.import_module("torch._inductor.async_compile")  # before torch 2.8, the import starts them
        getattr(module, "maybe_warm_pool", lambda: None)()
    except ImportError:  # another build of torch: then there is nothing to start
        pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def eager() -> AbstractContextManager[None]:
    """The context in which compiled networks run uncompiled: pictures have other shapes than training."""
    return torch.compiler.set_stance("force_eager")
