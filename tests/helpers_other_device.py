"""A GPU that is not there: work done on fake tensors, which have a shape, a type and a device but no numbers.

Torch's `FakeTensorMode` refuses to mix devices and to give numbers to the host, on any machine. What a CPU build of
torch cannot do even so is done here in its place:

    where C++ asks       it is told "xla", which autocast treats as CUDA and the backward pass without streams
    device guards        that device has the one of "meta", which does nothing
    Generator("cuda")    is one on the CPU that says to be on the GPU; drawing with one of another device is refused
    module.to("cuda")    changes where the weights are said to be
    pin_memory           marks a tensor, whose copies do not wait if they are asked not to
    autocast, is_cuda    as where there is a GPU
"""

import ctypes
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

__all__ = ["DEVICE", "Copied", "Mixed", "OtherDevice", "other_device"]

DEVICE = torch.device("cuda:0")
INSIDE = torch.device("xla:0")
"""What C++ takes it for."""
XLA, META = 9, 14
"""Numbers of devices in torch's list of guards (`c10/core/DeviceType.h`)."""
aten = torch.ops.aten


class Copied(AssertionError):
    """Numbers were copied between host and device, for which the host would have waited."""


class Mixed(AssertionError):
    """Tensors, or random numbers, of two devices met."""


class OtherDevice(FakeTensorMode):
    """Fake tensors whose operations fail where devices mix and, if `waits` is false, where the host would wait.

    Where a number is asked for and may be, it is 1.
    """

    def __init__(self, *, waits: bool) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_seen, args)), {name: _seen(value) for name, value in (kwargs or {}).items()}
        tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if func.overloadpacket in (aten.index, aten._unsafe_index, aten.index_put, aten.index_put_):
            places = [args[0], *(place for place in args[1] if place is not None)]
            if len({place.device for place in places}) > 1:
                raise Copied(f"{func}: of a tensor on {places[0].device} by places on the other device")
        asked = func is aten._local_scalar_dense.default and args[0].constant is None
        if asked and (self.waits or args[0].device.type == "cpu"):
            return _as_array(args[0], force=True).item()
        found = super().__torch_dispatch__(func, types, args, kwargs)
        copies = func.overloadpacket in (aten._to_copy, aten.copy_, aten.copy)
        if copies and kwargs.get("non_blocking") and getattr(tensors[0], "is_marked", False):
            return found
        if copies and not self.waits and len({x.device for x in [*tensors, found] if x.numel() and x.ndim}) > 1:
            raise Copied(f"{func}: between {tensors[0].device} and {found.device}")
        return found


class OneSource(TorchFunctionMode):
    """Random numbers are drawn by a generator on their own device, which is not drawn from."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        rng = kwargs.pop("generator", None)
        made = func(*args, **kwargs)
        if rng is not None and rng.device.type != made.device.type:
            raise Mixed(f"{func.__name__}: a generator on {rng.device} for numbers on {made.device}")
        return made


def _seen(value: Any) -> Any:
    """The device that a program sees in place of the one that C++ does."""
    return DEVICE if isinstance(value, torch.device) and value.type == INSIDE.type else value


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(tuple(value))


def _told(x: FakeTensor) -> torch.device:
    """The device that C++ is told."""
    if x.fake_mode.in_kernel_invocation:
        return torch.device("meta")
    return INSIDE if x.fake_device.type == DEVICE.type else x.fake_device


class _Rng(torch.Generator):
    """A generator on the CPU that says to be on a device."""

    at: torch.device

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.at = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.at


def _moved(param: Tensor, to: Tensor) -> None:
    """As `torch.utils.swap_tensors`, of two that differ in nothing but their device."""
    assert isinstance(param, FakeTensor)
    assert isinstance(to, FakeTensor)
    assert (param.shape, param.dtype) == (to.shape, to.dtype)
    param.fake_device = to.fake_device


def _marked(x: Tensor) -> Tensor:
    """A copy of a tensor on the host in memory that a GPU reads by itself."""
    assert x.device.type == "cpu"
    found = x.clone()
    found.is_marked = True  # type: ignore[attr-defined]
    return found


def _as_array(x: FakeTensor, *, force: bool = False) -> np.ndarray[Any, Any]:
    if x.device.type != "cpu" and not force:
        raise TypeError(f"can't convert {x.device} device type tensor to numpy. Use Tensor.cpu() first")
    kinds = {torch.bool: np.bool_, torch.uint8: np.uint8, torch.int64: np.int64, torch.float64: np.float64}
    return np.ones(x.shape, kinds.get(x.dtype, np.float32))


@contextmanager
def _guards() -> Generator[None]:
    """The guard of "meta" for the device that C++ is told."""
    name = {"darwin": "libc10.dylib", "win32": "c10.dll"}.get(sys.platform, "libc10.so")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[XLA]
    guards[XLA] = guards[META]
    try:
        yield
    finally:
        guards[XLA] = before


@contextmanager
def other_device(*, waits: bool = False) -> Generator[OtherDevice]:
    """All tensors made in this context are fake; those on `DEVICE` cannot meet those on the CPU.

    Unless `waits`, nor may the host wait for the device.
    """
    of_class = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return _told(args[0])
        return of_class(cls, func, types, args, kwargs or {})

    handlers = fake_tensor._DISPATCH_META_HANDLERS
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copy.deepcopy
        stack.enter_context(_guards())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for place, name, value in (
            (FakeTensor, "__torch_dispatch__", classmethod(dispatch)),
            (FakeTensor, "is_cuda", property(lambda x: x.fake_device.type == "cuda")),
            (FakeTensor, "numpy", _as_array),
            (torch, "Generator", _Rng),
            (torch.utils, "swap_tensors", _moved),
            (torch.Tensor, "pin_memory", _marked),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *a, **k: True),
            (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        ):
            stack.enter_context(patch.object(place, name, value, create=True))
        stack.enter_context(patch.dict(handlers, {torch.ops.prim.device.default: lambda args: _told(args[0])}))
        mode = OtherDevice(waits=waits)
        stack.enter_context(mode)
        stack.enter_context(OneSource())
        yield mode
