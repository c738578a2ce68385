"""What generating has of its own, beside the weights that it shares with denoising.

    conditioning    that of denoising, plus a vector and a linear map of the time r of arrival
    matrices        W + BA with a low-rank change BA of each matrix of the trunk's blocks, if it has a rank
    exit            from the hidden tokens to pixels, beside that to latents, if it is to make an image in one pass

At first none of it changes the latents, so an untrained generator is the denoiser. Without a rank, generating and
denoising share every matrix; with one, a generator can learn while the shared weights stay as they are.

Reference: low-rank changes: Hu et al., 2021 (LoRA).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from onefold.networks.trunk import TIME_FEATURES, Change, Trunk, fourier_features, hidden_width

__all__ = ["RANK", "Exit", "Jump", "arrival", "change_flops", "exit_flops", "fill_with_zeros"]

RANK = 16
"""Rank of what a generator changes in the trunk's matrices, unless it is given."""


class LowRank(nn.Module):
    """A change BA of each matrix W of a trunk's blocks; B is zero at first.

    The trunk is not a part of it: whatever the trunk becomes, the change is on top.
    """

    def __init__(self, trunk: Trunk, rank: int) -> None:
        super().__init__()
        blocks = [_matrices(block) for block in trunk.blocks]
        shapes = [matrix.shape for matrices in blocks for matrix in matrices.values()]
        self.a = nn.ParameterList(torch.randn(rank, inner) / math.sqrt(inner) for _, inner in shapes)
        self.b = nn.ParameterList(torch.zeros(outer, rank) for outer, _ in shapes)

    def forward(self, trunk: Trunk) -> Sequence[Change]:
        """The change of each block. It multiplies the factors itself, when its own matrices are there."""
        each = len(self.a) // len(trunk.blocks)
        return [
            {name: (self.b[i], self.a[i]) for i, name in enumerate(_matrices(block), k * each)}
            for k, block in enumerate(trunk.blocks)
        ]


def _matrices(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of a block that are matrices, by name."""
    return {name: p for name, p in block.named_parameters() if p.ndim == 2 and not name.endswith("offset")}


class Jump(nn.Module):
    """The vector, the map of arrival times and the low-rank changes of a generator.

    Vector and map are zero at first, and no random number is drawn for them (for A, there is). Weights saved before
    there was this role are read as such zeros.
    """

    calls: ClassVar[tuple[str, ...]] = ("condition",)
    """See `Network.calls`."""

    def __init__(self, trunk: Trunk | int, rank: int = 0) -> None:
        """Without changes to the trunk's matrices if the rank is 0, where the conditioning's width will do for it."""
        super().__init__()
        width = trunk if isinstance(trunk, int) else trunk.norm.weight.numel()
        self.vector = nn.Parameter(torch.zeros(width))
        self.arrival = nn.Parameter(torch.zeros(width, TIME_FEATURES))
        self.change = LowRank(trunk, rank) if rank and isinstance(trunk, Trunk) else None
        self.register_load_state_dict_pre_hook(fill_with_zeros)

    def condition(self, r: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """What it adds to the conditioning vector, for times of arrival."""
        return self.vector + F.linear(fourier_features(r, TIME_FEATURES), self.arrival)

    def forward(
        self, trunk: Trunk, h: Float[Tensor, "B N W"], modulation: Float[Tensor, "#B 6 W"]
    ) -> Float[Tensor, "B N W"]:
        """The trunk's tokens, with its changes."""
        return trunk(h, modulation) if self.change is None else trunk(h, modulation, self.change(trunk))


class Exit(nn.Module):
    """From hidden tokens to patches: a linear map, plus a gated layer as wide as the trunk.

    Linear alone it is too weak: latents are normalised, and decoding undoes it. Its random weights leave torch's random
    numbers as they were, so that a network has the same other weights with and without it.
    """

    calls: ClassVar[tuple[str, ...]] = ()
    """See `Network.calls`."""

    def __init__(self, width: int, patch_width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.linear = nn.Linear(width, patch_width)
            self.project_in = nn.Linear(width, 2 * width)
            self.project_out = nn.Linear(width, patch_width, bias=False)

    def forward(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, "B N P"]:
        gate, value = self.project_in(h).chunk(2, dim=-1)
        return self.linear(h) + self.project_out(F.silu(gate) * value)


def change_flops(width: int, depth: int, rank: int) -> float:
    """Operations of the products BA of all matrices of a trunk."""
    return 2 * rank * depth * width * (4 * width + 3 * hidden_width(width))


def exit_flops(tokens: int, width: int, patch_width: int) -> float:
    """Operations of one image through an `Exit`."""
    return 4 * tokens * width * (width + patch_width)


def arrival(t: Float[Tensor, " B"], r: Float[Tensor, " B"] | None) -> Float[Tensor, " B"]:
    """The time at which jumps from t arrive: 1 unless it is given."""
    return torch.ones_like(t) if r is None else r


def fill_with_zeros(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """A hook before loading: the parameters of a module that weights saved earlier lack altogether are zero."""
    if not any(name.startswith(prefix) for name in state_dict):
        state_dict.update({prefix + name: torch.zeros_like(value) for name, value in module.named_parameters()})
