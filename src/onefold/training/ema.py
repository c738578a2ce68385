"""Exponential moving averages of the network's weights, with half-lives counted in images.

    θ̄ ← θ̄ + (1 − ½^(batch / h)) · (θ − θ̄),     h = min(half-life, ramp · images seen)

The ramp keeps a young average young (Karras et al., 2022): without it the random initial weights would weigh on the
average for several half-lives, and on the target of the self-distillation with it.
"""

import copy

import torch

from onefold.networks.base import Network

__all__ = ["average_of", "decay", "update"]


def average_of(network: Network) -> Network:
    """A copy of the network that takes no gradient, to become its average."""
    return copy.deepcopy(network).requires_grad_(False).eval()


def decay(half_life: int, ramp: float, images: int, batch: int) -> float:
    """The share of the old average that survives a step of `batch` images that ends at `images` images seen."""
    effective = min(float(half_life), ramp * images)
    return 0.5 ** (batch / effective) if effective > 0 else 0.0


@torch.no_grad()
def update(average: Network, network: Network, survival: float) -> None:
    """Move the average towards the network in place; `survival` is `decay(…)`."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - survival)
