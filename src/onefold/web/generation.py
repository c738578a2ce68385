"""What a network is asked for: images of seeds, images between two seeds, and an image noised and denoised.

Between seeds a and b, noise is ε_s = cos(πs/2)·ε_a + sin(πs/2)·ε_b, s in [0, 1], which is standard normal for every s;
the same holds for what a solver draws on its way. At both ends stand the images of the two seeds.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from onefold import metrics
from onefold.networks.base import Network
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float
from onefold.sampling import Euler, Sampler, check_guidance, noises, solve, with_guidance

__all__ = ["Denoised", "between", "denoised", "generated", "noises_between"]


def generated(
    network: Network, seeds: Sequence[int], labels: Sequence[int] | None, sampler: Sampler
) -> UInt8[np.ndarray, "n H W C"]:
    """The images of seeds and labels, as `network.sample` draws them.

    Raises:
        UserError: guidance without classes.
    """
    return network.pictures(network.sample_latents(seeds, labels, sampler))


@torch.no_grad()
def between(
    network: Network, seeds: tuple[int, int], n: int, label: int | None, sampler: Sampler
) -> UInt8[np.ndarray, "n H W C"]:
    """`n` images from that of the first seed to that of the second, of one class.

    Raises:
        UserError: guidance without classes.
    """
    config, device = network.config, network.device
    check_guidance(sampler.guidance, config.classes)
    noise = noises_between(seeds, n, (config.tokens, config.latent_channels))
    y = None if label is None else torch.full((n,), label, device=device)
    guide = with_guidance(network.denoise, sampler.guidance, config.classes)
    eps = next(noise).to(device)
    z = solve(network.denoise, eps, y, sampler, guide=guide, noise=noise, jump=network.jump_of(sampler))
    return network.pictures([z])


def noises_between(seeds: tuple[int, int], n: int, shape: tuple[int, ...]) -> Iterator[Float[Tensor, "n ..."]]:
    """The noise of `n` places from one seed to another, again and again; see `sampling.noises`."""
    angle = torch.linspace(0, math.pi / 2, n, dtype=torch.float64)
    weights = torch.stack([angle.cos(), angle.sin()], dim=1).float()
    for pair in noises(seeds, shape):
        yield torch.einsum("kp,p...->k...", weights, pair)


class Denoised(NamedTuple):
    """Images (H, W, C), and the PSNR of the reconstruction in dB."""

    reconstruction: UInt8[np.ndarray, "H W C"]
    noised: UInt8[np.ndarray, "H W C"]
    denoised: UInt8[np.ndarray, "H W C"]
    resampled: UInt8[np.ndarray, "H W C"]
    psnr: float


@torch.no_grad()
def denoised(
    network: Network, x: UInt8[Tensor, "1 C H W"], t: float, *, seed: int = 0, label: int | None = None, steps: int = 20
) -> Denoised:
    """What becomes of an image: its latents z, z_t = t·z + (1 − t)·ε, ẑ(z_t, t), and the ODE's end, all decoded.

    Args:
        network: With encoder, denoiser and decoder.
        x: The image.
        t: Time in [0, 1]; 0 is noise.
        seed: Of the noise ε.
        label: Class that the denoiser is told; None: no class.
        steps: Euler steps of the ODE from t to 1.
    """
    device = network.device
    z = network.encode(to_float(x.to(device)))
    eps = next(noises([seed], tuple(z.shape[1:]))).to(z)
    z_t = noised(Linear(), z, eps, per_token(torch.full((1,), t, device=device)))
    y = None if label is None else torch.tensor([label], device=device)

    def denoise(z: Float[Tensor, "B N D"], t: float, r: float | None = None, /) -> Float[Tensor, "B N D"]:
        return network.denoise(z, torch.full((1,), t, device=device), y)

    times = torch.linspace(t, 1, (steps if t < 1 else 1) + 1).tolist()
    resampled = Euler().integrate(denoise, z_t, times, Linear(), None)
    images = network.pictures([z, z_t, denoise(z_t, t), resampled])
    x_hat = torch.from_numpy(images[:1]).permute(0, 3, 1, 2)
    return Denoised(*images, psnr=metrics.psnr(x_hat, x))
