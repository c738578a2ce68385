"""Pickles of EDM, read without executing what is in them.

A pickle is a program: loading it as usual calls whatever it names. Those of EDM hold networks as objects with their own
source code, which their loader executes. Here only these names are known, each to a function of this file:

    tensors and parameters of torch, whose numbers torch itself reads by its restricted loader (`weights_only`)
    ordered dictionaries, and dictionaries with attributes (`dnnlib.util.EasyDict`)
    objects with source code (`torch_utils.persistence`): class name and state are kept, the source is left alone
    torch's containers of modules, its dtypes and devices, sets, and scalars and arrays of NumPy: their state is kept

The last are `Record`s of a name, arguments and state, and nothing is called for them. Any other name is refused.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onefold.errors import UserError, printable, reason
from onefold.files import refuse_placeholder

__all__ = ["Record", "read_pickle", "tensors_of"]


class Record:
    """What a pickle says of an object: the name of its class, what it was made from, and its state."""

    name = ""

    arguments: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "Record":
        made = super().__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, Mapping) else {"": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[str(key)] = value


class Attributes(dict[Any, Any]):
    """A dictionary of a pickle, whatever kind it was."""

    def __setstate__(self, state: Any) -> None:
        """Attributes beside its items are left out."""


INERT = ("torch.nn.modules.", "numpy.core.multiarray", "numpy._core.multiarray")
"""Modules whose names become records …"""
INERT_NAMES = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("torch", "Size"),
    ("torch", "device"),
    ("builtins", "set"),
    ("builtins", "slice"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")),
}
"""… and single ones."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BufferedIOBase, where: str) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name stands for here. Made anew for each: a pickle may write into what it gets."""
        name = (module_name, global_name)
        if module_name.startswith(INERT) or name in INERT_NAMES:
            return type(global_name, (Record,), {"name": f"{module_name}.{global_name}"})
        if name in (("collections", "OrderedDict"), ("dnnlib.util", "EasyDict")):
            return type(global_name, (Attributes,), {})
        builders: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): partial(_object),
            ("torch._utils", "_rebuild_tensor_v2"): partial(_tensor),
            ("torch._utils", "_rebuild_parameter"): partial(_parameter),
            ("torch.storage", "_load_from_bytes"): partial(_storage),
        }
        if name not in builders:
            called = printable(f"{module_name}.{global_name}")
            raise UserError(
                f"{self.where}: names {called}, which loading it would execute; only networks of EDM and EDM2 are read"
            )
        return builders[name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise UserError(f"{self.where}: is a file of torch.save, not a pickle of EDM; give another")


def read_pickle(path: Path) -> Any:
    """What a pickle holds, of dictionaries, lists, numbers, texts, tensors and `Record`s.

    Raises:
        UserError: no pickle, a damaged one, or one that names anything else.
    """
    try:
        refuse_placeholder(path)
        with path.open("rb") as file:
            return _Reader(file, str(path)).load()
    except UserError:
        raise
    except Exception as error:  # of a damaged or hostile file, of whichever kind
        raise UserError(f"{path}: is no pickle of EDM that can be read ({reason(error)[:200]})") from error


def tensors_of(module: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters and buffers of a module and of those in it, as in a `state_dict`."""
    state = module.state
    for kind in ("_parameters", "_buffers"):
        for name, value in state.get(kind, {}).items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.float()
    for name, part in state.get("_modules", {}).items():
        if isinstance(part, Record):
            yield from tensors_of(part, f"{prefix}{name}.")


def _object(meta: Mapping[str, Any]) -> Record:
    """An object with source code, without it."""
    made = type(str(meta["class_name"]), (Record,), {"name": str(meta["class_name"])})()
    made.__setstate__(meta["state"])
    return made


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A copy of the part of a storage; one that is too small for it raises a RuntimeError."""
    whole = torch.empty(0, dtype=storage.dtype).set_(storage)
    if math.prod(size) > whole.numel():  # by a stride of 0, a few numbers may stand for any amount of memory
        raise ValueError("a tensor larger than what it consists of")
    return whole.as_strided(size, stride, offset).clone()
