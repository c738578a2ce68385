"""Foreign: what denoisers of images that others have trained have in common with the networks here.

Their latents are the pixels themselves, one token each. They know noise by another path, x = a·z + b·ε, and are asked
about a point of ours, z_t = t·z + (1 − t)·ε, at the level with the same ratio of signal to noise,

    a / b = t / (1 − t),     x = z_t · √(a² + b²) / √(t² + (1 − t)²),

which is a point that holds the same information: E[z | x] = E[z | z_t]. Denoising returns this ẑ, so that sampling,
one-step generation and everything else treat such a network like any other.

Generating adds the vector of a `Jump` to the conditioning. A ratio network starts from the descending half: the tokens
of its coarsest level, as of other networks the tokens of the trunk (Yin et al., 2024, DMD2).
"""

import copy
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig, RoleFlops
from onefold.networks.jump import Jump, arrival

__all__ = ["Foreign", "Half", "counted", "described", "each"]


class Foreign(Network):
    """A denoiser of images; a subclass has a `body` and says how it is asked."""

    learns_codec: ClassVar[bool] = False
    adopted: ClassVar[bool] = True

    coarse_width: int
    """Channels of the coarsest level."""

    @classmethod
    def implied(cls, config: NetworkConfig) -> dict[str, int]:
        return {"patch": 1, "latent_channels": config.channels}

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        described(config)
        if config.jump_rank:
            raise UserError(
                f"network.jump_rank: {config.architecture} has no trunk whose matrices could change by rank; leave it 0"
            )

    @classmethod
    def has_jump(cls) -> bool:
        return False  # it has one, but no matrices that this could change

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        return RoleFlops(encode=0.0, denoise=denoising_flops(config), decode=0.0)

    # --- what a subclass defines ---

    def clean(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None,
        role: Float[Tensor, "B V"] | None,
    ) -> Float[Tensor, "B C H W"]:
        """The clean image predicted from one noised on our path; `role` is added to the conditioning."""
        raise NotImplementedError

    def coarsest(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None
    ) -> Float[Tensor, "B c h w"]:
        """The coarsest level's channels, from which the ascending half would go on."""
        raise NotImplementedError

    def cut(self) -> None:
        """Remove what comes after the coarsest level."""
        raise NotImplementedError

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the network elsewhere, by its own names for them."""
        raise NotImplementedError

    # --- the roles ---

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The pixels, in row-major order."""
        self.check_images(x)
        return self.patchify(x)

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean pixels predicted from noised ones at times t in [0, 1], given labels y (None: no class)."""
        self.check_noised(z_t, t, y)
        return self.patchify(self.clean(self.unpatchify(z_t), t, y, None))

    def generate_with(
        self,
        jump: Jump,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        r: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """See `Network.generate_with`."""
        self.check_noised(z_t, t, y)
        return self.patchify(self.clean(self.unpatchify(z_t), t, y, jump.condition(arrival(t, r))))

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """The image of these pixels (not clamped)."""
        self.check_latents(z)
        return self.unpatchify(z)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The coarsest level's tokens of a clean image."""
        return [self.coarsest(x, torch.ones(len(x), device=x.device), None).flatten(2).mT]

    def backbone(self, blocks: int | None = None) -> "Half":
        """A copy of the descending half.

        Raises:
            UserError: a number of blocks.
        """
        if blocks is not None:
            raise UserError(f"blocks: {type(self).__name__} is halved, not cut after {blocks} blocks; leave it out")
        half = copy.deepcopy(self)
        half.cut()
        del half.jump
        return Half(half)


class Half(nn.Module):
    """The descending half of a network, in the place of a `Backbone`: from noised latents to hidden tokens."""

    def __init__(self, network: Foreign) -> None:
        super().__init__()
        self.network = network
        self.width = network.coarse_width

    def forward(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B n W"]:
        """The coarsest level's tokens of noised latents at times t in [0, 1], given labels y (None: no class)."""
        return self.network.coarsest(self.network.unpatchify(z_t), t, y).flatten(2).mT


def described(config: NetworkConfig) -> dict[str, Any]:
    """What else describes a network from elsewhere. Raises a UserError if nothing does."""
    try:
        found = json.loads(config.foreign)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"network.architecture: {config.architecture} comes from elsewhere; make it of a file or folder with "
            "`onefold adopt`, and begin with it"
        )
    return found


def each(value: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1 1"]:
    """A value for each image, in the shape that broadcasts against images."""
    return value[:, None, None, None]


@functools.lru_cache(maxsize=32)
def denoising_flops(config: NetworkConfig) -> float:
    """Operations of denoising one image, counted on tensors without numbers."""
    z_t = torch.zeros(1, config.tokens, config.latent_channels, device="meta")
    return counted(config, lambda network: network.denoise(z_t, torch.zeros(1, device="meta")))


def counted(config: NetworkConfig, call: Callable[[Network], object]) -> float:
    """Operations of what is called on a network of this configuration, which has no numbers."""
    from torch.utils.flop_counter import FlopCounterMode  # whose import takes longer than the counting

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(config.kind(config))
    return float(counter.get_total_flops())
