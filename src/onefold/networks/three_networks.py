"""ThreeNetworks: the baseline, in which encoder, denoiser and decoder are separate networks.

    encode:   patches → encoder → norm → (· − m)/s       z
    denoise:  latents → denoiser, modulated by t and y   ẑ
    decode:   z·s + m → decoder → patches                x̂

Each is a trunk of the same blocks between a linear entrance and a linear exit. Encoder and decoder are unconditional,
so their modulation is only the learned offset of each block.

m and s are the mean and standard deviation of each latent channel, measured once, when the encoder has been trained and
frozen (`training/latent_diffusion.py`); until then they are 0 and 1. They are stored in the network, so all latents
outside it are normalised.

Sizes, for a configuration of depth L (`depths`): with `equal="parameters"` the width is the same and the L blocks are
divided: L/4 (rounded down, at least 1) each for encoder and decoder, the rest for the denoiser. The total number of
parameters is then that of the single network, up to a linear entrance and exit, and a denoising step costs about half
as much. With `equal="compute"` each has L blocks: every call costs the same as in the single network, with three times
as many blocks.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig, RoleFlops, forward_flops, register
from onefold.networks.jump import Jump, arrival
from onefold.networks.norms import LATENT_NORMS
from onefold.networks.trunk import TIME_FEATURES, Modulation, Trunk, conditioning

__all__ = ["Depths", "ThreeNetworks", "depths"]


class Depths(NamedTuple):
    """Blocks of each network."""

    encoder: int
    denoiser: int
    decoder: int


def depths(config: NetworkConfig) -> Depths:
    """Depth of each of the three networks; see the module's docstring."""
    if config.equal == "compute":
        return Depths(config.depth, config.depth, config.depth)
    quarter = max(1, config.depth // 4)
    return Depths(quarter, config.depth - 2 * quarter, quarter)


class Column(nn.Module):
    """A separate trunk with a linear entrance and a linear exit."""

    def __init__(self, config: NetworkConfig, depth: int, numbers_in: int, numbers_out: int) -> None:
        super().__init__()
        self.entrance = nn.Linear(numbers_in, config.width)
        self.trunk = Trunk(config.width, depth, config.heads, *config.grid)
        self.exit = nn.Linear(config.width, numbers_out)

    def forward(self, tokens: Float[Tensor, "B N in"], modulation: Float[Tensor, "#B 6 W"]) -> Float[Tensor, "B N out"]:
        return self.exit(self.trunk(self.entrance(tokens), modulation))


@register("three_networks")
class ThreeNetworks(Network):
    """Three networks with random weights and `OneFold`'s interface."""

    phases: ClassVar[tuple[str, ...]] = ("autoencoder", "diffusion")

    latent_mean: Tensor
    latent_std: Tensor
    unconditional: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        depth, patch, latent = depths(config), config.patch**2 * config.channels, config.latent_channels
        self.encoder = Column(config, depth.encoder, patch, latent)
        self.denoiser = Column(config, depth.denoiser, latent, latent)
        self.decoder = Column(config, depth.decoder, latent, patch)
        self.time = nn.Linear(TIME_FEATURES, config.width, bias=False)
        self.labels = nn.Embedding(config.classes + 1, config.width)
        self.modulation = Modulation(config.width)
        self.norm = LATENT_NORMS[config.latent_norm](latent)
        self.jump = Jump(self.denoiser.trunk, config.jump_rank)
        self.register_buffer("latent_mean", torch.zeros(latent))
        self.register_buffer("latent_std", torch.ones(latent))
        self.register_buffer("unconditional", torch.zeros(1, 6, config.width), persistent=False)

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        if config.equal == "parameters" and config.depth < 3:
            raise UserError(
                f"network.depth: {config.depth} cannot be split among three networks; give at least 3, or equal=compute"
            )

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        return RoleFlops(*(forward_flops(config, depth) for depth in depths(config)))

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Latents of images in [−1, 1], normalised according to `config.latent_norm` and then per channel."""
        self.check_images(x)
        z = self.norm(self.encoder(self.patchify(x), self.unconditional).float())
        return (z - self.latent_mean) / self.latent_std

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean latents ẑ predicted from noised latents at times t in [0, 1], given labels y (None: no class)."""
        self.check_noised(z_t, t, y)
        modulation = self.modulation(conditioning(self.time, self.labels, t, y))
        return self._clean(self.denoiser(z_t, modulation), z_t, t)

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
        modulation = self.modulation(conditioning(self.time, self.labels, t, y, jump.condition(arrival(t, r))))
        h = jump(self.denoiser.trunk, self.denoiser.entrance(z_t), modulation)
        return self._clean(self.denoiser.exit(h), z_t, t)

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Images decoded from latents; in [−1, 1] up to the network's error (not clamped)."""
        self.check_latents(z)
        return self.unpatchify(self.decoder(z * self.latent_std + self.latent_mean, self.unconditional).float())

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The encoder's hidden tokens after each block: a perceptual space that needs no other network."""
        return self.encoder.trunk.hidden(self.encoder.entrance(self.patchify(x)), self.unconditional)

    def denoising_parts(self) -> dict[str, nn.Module]:
        own = {"time": self.time, "labels": self.labels, "modulation": self.modulation}
        return {"entrance": self.denoiser.entrance, "trunk": self.denoiser.trunk, **own}

    @torch.no_grad()
    def normalise(self, mean: Float[Tensor, " D"], std: Float[Tensor, " D"]) -> None:
        """From now on, subtract `mean` from each channel of the latents and divide it by `std`."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
