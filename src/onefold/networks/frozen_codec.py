"""FrozenCodec: the baseline in the latents of an autoencoder that others have trained, which stays as it is.

    encode:   image → encoder → (· − m)/s → tokens   z
    denoise:  tokens → trunk, modulated by t and y    ẑ
    decode:   tokens → · s + m → decoder              x̂

The autoencoder is an `AutoencoderKL` or `AutoencoderDC` of diffusers; of the former's posterior, z is the mean. As for
`ThreeNetworks`, m and s are measured on the data when training begins (`training/latent_diffusion.py`) and stored in
the network; they take the place of the autoencoder's own scaling factor. A token holds the latents of q × q positions,
where q = patch / factor, and a position stands for factor × factor pixels.

The autoencoder's weights are buffers: no optimizer, gradient or average touches them.

Reference: Rombach et al., 2022 (arXiv 2112.10752).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.networks.base import NetworkConfig, RoleFlops, forward_flops, register
from onefold.networks.foreign import counted, described
from onefold.networks.library import diffusers
from onefold.networks.pixel_network import PixelNetwork

__all__ = ["FrozenCodec", "codec_factor"]


@register("frozen_codec")
class FrozenCodec(PixelNetwork):
    """A frozen autoencoder, and a backbone with a linear exit that denoises its latents; all with random weights."""

    phases: ClassVar[tuple[str, ...]] = ("diffusion",)
    adopted: ClassVar[bool] = True

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.codec: Any = frozen(_codec(config))
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    @classmethod
    def implied(cls, config: NetworkConfig) -> dict[str, int]:
        codec = described(config)
        factor = codec_factor(codec)
        if config.patch % factor:
            raise UserError(
                f"network.patch: {config.patch} is not a multiple of {factor}, the pixels of the autoencoder's latents"
            )
        return {"latent_channels": codec["latent_channels"] * (config.patch // factor) ** 2}

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        takes = described(config)["in_channels"]
        if config.channels != takes:
            raise UserError(
                f"network.channels: {config.channels}, but the autoencoder takes {takes}; give other images, or "
                "convert them with `onefold data convert`"
            )

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        image = torch.zeros(1, config.channels, *config.image_size, device="meta")
        latents = torch.zeros(1, config.tokens, config.latent_channels, device="meta")
        encode = counted(config, lambda network: network.encode(image))
        return RoleFlops(encode, forward_flops(config), counted(config, lambda network: network.decode(latents)))

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """The autoencoder's latents, normalised per channel of the tokens."""
        self.check_images(x)
        found = self.codec.encode(x)
        grid = found.latent_dist.mean if hasattr(found, "latent_dist") else found.latent
        return (self.joined(grid.float()) - self.latent_mean) / self.latent_std

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """The autoencoder's image; in [−1, 1] up to its error (not clamped)."""
        self.check_latents(z)
        return self.codec.decode(self.parted(z * self.latent_std + self.latent_mean)).sample.float()

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The latents: the autoencoder shows nothing of what it does between."""
        return [self.encode(x)]

    @torch.no_grad()
    def normalise(self, mean: Float[Tensor, " D"], std: Float[Tensor, " D"]) -> None:
        """From now on, subtract `mean` from each channel of the latents and divide it by `std`."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def joined(self, grid: Float[Tensor, "B c h w"]) -> Float[Tensor, "B N D"]:
        """Tokens of q × q positions, in row-major order."""
        rows, columns = self.config.grid
        q = grid.shape[2] // rows
        parts = grid.unflatten(3, (columns, q)).unflatten(2, (rows, q))
        return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def parted(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B c h w"]:
        """The inverse of `joined`."""
        q = self.config.patch // codec_factor(described(self.config))
        parts = tokens.unflatten(1, self.config.grid).unflatten(3, (-1, q, q))
        return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the autoencoder."""
        self.codec.load_state_dict(weights)


def codec_factor(codec: Mapping[str, Any]) -> int:
    """Pixels of an image, in each direction, that one position of the latents stands for."""
    levels = codec.get("encoder_block_out_channels") or codec["block_out_channels"]
    return 2 ** (len(levels) - 1)


def _codec(config: NetworkConfig) -> nn.Module:
    codec = described(config)
    return getattr(diffusers(), codec["_class_name"]).from_config(codec)


def frozen(module: nn.Module) -> nn.Module:
    """The module, with buffers in the place of its parameters."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, value.data)
    return module
