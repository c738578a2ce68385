"""PixelNetwork: an ordinary pixel diffusion model with the interface of the other networks.

Its latents are the raw patches of the image: encoding cuts, decoding joins, and neither is learned. One-step generators
in latent space can thus be compared with the same in pixel space, on the same trunk.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.networks.backbone import Backbone
from onefold.networks.base import Network, NetworkConfig, RoleFlops, forward_flops, register
from onefold.networks.jump import Jump, arrival

__all__ = ["PixelNetwork"]


@register("pixels")
class PixelNetwork(Network):
    """A backbone with a linear exit, with random weights."""

    learns_codec: ClassVar[bool] = False

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        numbers, sizes = config.latent_channels, (config.width, config.depth, config.heads)
        self.body = Backbone(numbers, *sizes, config.grid, config.classes)
        self.exit = nn.Linear(config.width, config.latent_channels)
        self.jump = Jump(self.body.trunk, config.jump_rank)

    @classmethod
    def implied(cls, config: NetworkConfig) -> dict[str, int]:
        return {"latent_channels": config.patch**2 * config.channels}

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        return RoleFlops(encode=0.0, denoise=forward_flops(config), decode=0.0)

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Cut images into patches."""
        self.check_images(x)
        return self.patchify(x)

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean patches predicted from noised ones at times t in [0, 1], given labels y (None: no class)."""
        self.check_noised(z_t, t, y)
        return self._clean(self.exit(self.body(z_t, t, y)), z_t, t)

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
        body = self.body
        h = jump(body.trunk, body.entrance(z_t), body.condition(t, y, jump.condition(arrival(t, r))))
        return self._clean(self.exit(h), z_t, t)

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Join patches into images (not clamped)."""
        self.check_latents(z)
        return self.unpatchify(z)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B N width"]]:
        """The hidden tokens of clean patches after each block."""
        z = self.patchify(x)
        body, t = self.body, torch.ones(len(z), device=z.device)
        return body.trunk.hidden(body.entrance(z), body.condition(t))

    def denoising_parts(self) -> dict[str, nn.Module]:
        body = self.body
        return {name: getattr(body, name) for name in ("entrance", "time", "labels", "modulation", "trunk")}
