"""Sharding: each rank holds some rows of every weight, gradient, average and moment, by PyTorch's FSDP2.

    forward     before a unit computes, its rows are gathered from all ranks; afterwards each keeps its own
    backward    likewise, and the gradient is added up over ranks, of which each keeps its rows
    step        optimizers and averages act on rows; Muon brings each matrix together in one rank

The units are the parts of a module that say how they are `calls`: blocks, and networks with what is left of them.
Whatever has no such unit, as a module of one's own, is whole in every rank. Gradients are sums over ranks as without
sharding, so the step is the same.

A module begins with the values of the first rank, on its host, and elsewhere as shapes alone (torch's meta device).
Tensors come from there one at a time, and so they return: no device holds more than its rows and one whole tensor.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.training.engine import BUCKET, ranks

if TYPE_CHECKING:  # it takes two seconds to import
    from torch.distributed.tensor import DTensor

__all__ = ["by_matrix", "from_rows", "is_sharded", "local", "origin", "own_rows", "shard", "whole"]


def is_sharded(tensor: Tensor | None) -> "TypeGuard[DTensor]":
    """Whether this rank holds only some rows of a tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def origin() -> AbstractContextManager[object]:
    """Where modules are made that will be sharded: on the host in the first rank, and elsewhere nowhere."""
    return nullcontext() if ranks().first or not ranks().shards else torch.device("meta")


@torch.no_grad()
def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Shard a module in place, onto a device; its values are those of the first rank. Returns its shapes alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import distribute_tensor

    if len({*module.parameters()}) < len([*module.named_parameters(remove_duplicate=False)]):
        name = type(module).__name__
        raise UserError(f"--engine fsdp: {name} has tied weights, which cannot be sharded; leave it out")
    group = ranks()
    mesh = init_device_mesh(device.type, (group.count,))
    values = {name: value.detach() for name, value in _tensors(module)} if group.first else {}
    module.to("meta")
    shapes = copy.deepcopy(module)
    for part in reversed([*module.modules()]):
        if hasattr(part, "calls"):
            unit = fully_shard(part, mesh=mesh, reshard_after_forward=True)
            if not hasattr(unit, "set_force_sum_reduction_for_comms"):
                version = torch.__version__
                raise UserError(f"--engine fsdp: needs a newer PyTorch than {version}; update it, or leave this out")
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            for name in type(part).calls:  # type: ignore[attr-defined]
                register_fsdp_forward_method(part, name)
    module.to_empty(device=device)
    for name, own in _tensors(module):
        value = values.pop(name).to(device) if group.first else torch.empty(own.shape, dtype=own.dtype, device=device)
        if is_sharded(own):
            own.copy_(distribute_tensor(value, mesh, own.placements))
        else:
            group.copy([value])
            own.copy_(value)
    # A role may return a view, which nothing changes in place; and gloo exchanges matrices by gathering them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    return shapes


@torch.no_grad()
def whole(module: nn.Module, shapes: nn.Module, device: torch.device) -> nn.Module:
    """In the first rank, the whole of a sharded module on a device; elsewhere its shapes alone."""
    found = copy.deepcopy(shapes)
    if ranks().first:
        found.to_empty(device=device)
    places = dict(_tensors(found))
    for name, own in _tensors(module):
        value = own.full_tensor() if is_sharded(own) else own
        if ranks().first:
            places[name].copy_(value)
    return found


def own_rows(count: int) -> tuple[int, int]:
    """Start and stop of this rank's rows among `count`, as FSDP2 divides them."""
    size = -(-count // ranks().count)
    return min(ranks().rank * size, count), min((ranks().rank + 1) * size, count)


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """The tensor that is sharded as another one and of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    assert is_sharded(like)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def by_matrix(act: Callable[[Tensor], Tensor], rows: Tensor, like: Tensor) -> Tensor:
    """A function of stacks of whole matrices, of this rank's rows (k, rows, n) of k that are sharded as `like` is.

    Each matrix comes together in one rank, and goes back as rows.
    """
    count = ranks().count
    at_once = max(1, BUCKET // (like.numel() * count)) * count
    found: list[Tensor] = []
    for part in rows.split(at_once):
        whole = _exchanged(part, like, 1, 0, len(part))
        found.append(_exchanged(act(whole), like, 0, 1, len(part)))
    return torch.cat(found)


def _exchanged(stack: Tensor, like: Tensor, before: int, after: int, count: int) -> Tensor:
    """Of a stack of `count` matrices, sharded in one dimension, what a rank has of it when it is sharded in another."""
    from torch.distributed.tensor import DTensor, Shard

    assert is_sharded(like)
    mesh, shape = like.device_mesh, torch.Size((count, *like.shape))
    stride = (like.shape[0] * like.shape[1], like.shape[1], 1)
    spread = DTensor.from_local(stack, mesh, [Shard(before)], run_check=False, shape=shape, stride=stride)
    return spread.redistribute(placements=[Shard(after)]).to_local()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
