"""The backbone of everything that reads noised latents: a trunk with its entrance and its conditioning on t and y.

    h = trunk(entrance(z_t), modulation(time(t) + label(y)))

A pixel diffusion model is a backbone with a linear exit (`pixel_network.py`), a ratio network one with a pooling head
(`ratio.py`). Every network here can return a copy of its own backbone with the learned weights (`Network.backbone`).
"""

from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.networks.trunk import TIME_FEATURES, Modulation, Trunk, conditioning

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """From noised latents to hidden tokens, with random weights."""

    def __init__(self, numbers: int, width: int, depth: int, heads: int, grid: tuple[int, int], classes: int) -> None:
        """`numbers` channels per latent token; `depth` blocks on a `grid` of tokens; `classes` + 1 label vectors."""
        super().__init__()
        self.entrance = nn.Linear(numbers, width)
        self.time = nn.Linear(TIME_FEATURES, width, bias=False)
        self.labels = nn.Embedding(classes + 1, width)
        self.modulation = Modulation(width)
        self.trunk = Trunk(width, depth, heads, *grid)

    def forward(
        self,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        role: Float[Tensor, "#B W"] | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Hidden tokens of noised latents at times t in [0, 1], given labels y (None: no class); see `condition`."""
        return self.trunk(self.entrance(z_t), self.condition(t, y, role))

    def condition(
        self,
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        role: Float[Tensor, "#B W"] | None = None,
    ) -> Float[Tensor, "B 6 W"]:
        """The trunk's modulation at times t, given labels y (None: no class), in the role of a vector, if any."""
        return self.modulation(conditioning(self.time, self.labels, t, y, role))

    @torch.no_grad()
    def copy_from(self, **parts: nn.Module) -> Self:
        """Copy the weights of a network's parts, by name; from a deeper trunk, those of its first blocks."""
        for name, part in parts.items():
            own, theirs = getattr(self, name), part.state_dict()
            own.load_state_dict({key: theirs[key] for key in own.state_dict()})
        return self
