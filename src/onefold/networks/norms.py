"""Normalisations of latents (B, N, D), by the names of `NetworkConfig.latent_norm`."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["LATENT_NORMS"]


class ImageRMSNorm(nn.Module):
    """Unit RMS over all values of an image's latent (B, N, D) jointly: tokens may differ in size."""

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return z * (z.square().mean((1, 2), keepdim=True) + 1e-6).rsqrt()


LATENT_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": lambda channels: nn.RMSNorm(channels, eps=1e-6, elementwise_affine=False),
    "rms_image": lambda channels: ImageRMSNorm(),
    "layer_norm": lambda channels: nn.LayerNorm(channels, eps=1e-6),
    "none": lambda channels: nn.Identity(),
}
