"""Exponential moving averages of the network's weights: θ̄ ← θ̄ + (1 − s) · (θ − θ̄), with s = `Schedule.survival`."""

import copy

import torch
from torch import Tensor, nn

from onefold.networks import Network

__all__ = ["average_of", "trainable_copy", "update"]


def average_of(network: Network) -> Network:
    """A copy of the network without gradients, to become its average."""
    # Not eval(): a network that is ready for use checks the values it is given, which makes the host wait for them.
    return copy.deepcopy(network).requires_grad_(False).train()


def trainable_copy(network: Network) -> Network:
    """A trainable copy of the network, such as an average."""
    return copy.deepcopy(network).requires_grad_(True).train()


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, survival: float | Tensor) -> None:
    """Move the average towards the network in place; `survival`, or a scalar on the device, is what of it stays."""
    own: list[Tensor] = list(average.parameters())
    new: list[Tensor] = list(network.parameters())
    if isinstance(survival, Tensor):  # for which torch has no such function
        torch._foreach_add_(own, torch._foreach_mul(torch._foreach_sub(new, own), 1 - survival))
    else:
        torch._foreach_lerp_(own, new, 1 - survival)
