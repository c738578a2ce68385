"""OneFold: encoder, denoiser, decoder and one-step generator as roles of one trunk.

    encode:   image patches  → trunk → latents out → norm        z  = E(x)
    denoise:  latents in     → trunk → latents out               ẑ  ≈ E[z | z_t, t, y]
    generate: latents in     → trunk → latents out               a sample of z, given z_t
                                     → exit to pixels            and, if it has learned to, its image at once
    decode:   latents in     → trunk → patches out               x̂  = D(z)

A conditioning vector tells the trunk its role: a learned vector per role, to which denoising adds features of the time
t and a learned vector of the class y. Generating is conditioned as denoising is, plus a vector and features of the time
of arrival, and may change the trunk's matrices a little (`jump.Jump`). All roles share the trunk and its modulation;
only the four linear entrances and exits, the maps of times and the class vectors (under 5 % of the parameters) serve
fewer, and what generating changes (of rank 16 and width 128: a seventh of the network without it).
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.networks.base import Network, NetworkConfig, RoleFlops, forward_flops, register
from onefold.networks.jump import Exit, Jump, arrival
from onefold.networks.norms import LATENT_NORMS
from onefold.networks.trunk import TIME_FEATURES, Modulation, Trunk, conditioning

__all__ = ["OneFold"]

ROLES = ("encode", "denoise", "decode")


@register("one_network")
class OneFold(Network):
    """One network with random weights; see the module's docstring. Inputs must be on its device."""

    shares_codec: ClassVar[bool] = True
    paints: ClassVar[bool] = True
    calls: ClassVar[tuple[str, ...]] = (*Network.calls, "decode_and_denoise", "generate_with_image")

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        patch_width = config.patch**2 * config.channels
        self.patches_in = nn.Linear(patch_width, config.width)
        self.latents_in = nn.Linear(config.latent_channels, config.width)
        self.latents_out = nn.Linear(config.width, config.latent_channels)
        self.patches_out = nn.Linear(config.width, patch_width)
        self.roles = nn.Embedding(len(ROLES), config.width)
        self.time = nn.Linear(TIME_FEATURES, config.width, bias=False)
        self.labels = nn.Embedding(config.classes + 1, config.width)
        self.modulation = Modulation(config.width)
        self.trunk = Trunk(config.width, config.depth, config.heads, *config.grid)
        self.jump = Jump(self.trunk, config.jump_rank)
        if config.jump_exit:
            self.jump_exit = Exit(config.width, patch_width)
        self.norm = LATENT_NORMS[config.latent_norm](config.latent_channels)

    # --- the roles ---

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Latents of images in [−1, 1], normalised according to `config.latent_norm`."""
        self.check_images(x)
        h = self.trunk(self.patches_in(self.patchify(x)), self._condition("encode"))
        return self.norm(self.latents_out(h).float())

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean latents ẑ predicted from noised latents at times t in [0, 1], given labels y (None: no class)."""
        self.check_noised(z_t, t, y)
        h = self.trunk(self.latents_in(z_t), self._condition("denoise", t, y))
        return self._clean(self.latents_out(h), z_t, t)

    def generate_with(
        self,
        jump: Jump,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
        r: Float[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """See `Network.generate_with`."""
        return self._clean(self.latents_out(self._generated(jump, z_t, t, y, r)), z_t, t)

    def generate_with_image(
        self,
        jump: Jump,
        exit: nn.Module,
        z_t: Float[Tensor, "B N D"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B C H W"]]:
        """See `Network.generate_with_image`."""
        h = self._generated(jump, z_t, t, y)
        return self._clean(self.latents_out(h), z_t, t), self.unpatchify(exit(h.detach()).float())

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Images decoded from latents; in [−1, 1] up to the network's error (not clamped)."""
        self.check_latents(z)
        return self._image(self.trunk(self.latents_in(z), self._condition("decode")))

    def decode_and_denoise(
        self, z: Tensor, z_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Float[Tensor, "A C H W"], Float[Tensor, "B N D"]]:
        """(decode(z), denoise(z_t, t, y)) in one packed call of the trunk, which is cheaper than two."""
        decoding = self._condition("decode").expand(len(z), -1, -1)
        condition = torch.cat([decoding, self._condition("denoise", t, y)])
        h = self.trunk(self.latents_in(torch.cat([z, z_t])), condition)
        return self._image(h[: len(z)]), self._clean(self.latents_out(h[len(z) :]), z_t, t)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B N width"]]:
        """The encoder's hidden tokens after each block: a perceptual space that needs no other network."""
        return self.trunk.hidden(self.patches_in(self.patchify(x)), self._condition("encode"))

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        one = forward_flops(config)
        return RoleFlops(one, one, one)

    @property
    def shared_parts(self) -> tuple[nn.Module, ...]:
        return self.trunk, self.modulation

    def denoising_parts(self) -> dict[str, nn.Module]:
        # A backbone has one role: its vector is folded into the label vectors, to which it is added anyway.
        role = self.roles.weight[ROLES.index("denoise")]
        labels = nn.Embedding.from_pretrained((self.labels.weight + role).detach())
        own = {"time": self.time, "modulation": self.modulation, "trunk": self.trunk}
        return {"entrance": self.latents_in, "labels": labels, **own}

    # --- ends and conditioning ---

    def _generated(
        self, jump: Jump, z_t: Tensor, t: Tensor, y: Tensor | None, r: Tensor | None = None
    ) -> Float[Tensor, "B N W"]:
        """Hidden tokens, which all exits of generating read."""
        self.check_noised(z_t, t, y)
        modulation = self._condition("denoise", t, y, jump.condition(arrival(t, r)))
        return jump(self.trunk, self.latents_in(z_t), modulation)

    def _image(self, h: Tensor) -> Tensor:
        return self.unpatchify(self.patches_out(h).float())

    def _condition(
        self, role: str, t: Tensor | None = None, y: Tensor | None = None, jump: Tensor | None = None
    ) -> Float[Tensor, "#B 6 W"]:
        vector = self.roles.weight[ROLES.index(role)].unsqueeze(0)
        vector = vector if jump is None else vector + jump
        return self.modulation(vector if t is None else conditioning(self.time, self.labels, t, y, role=vector))
