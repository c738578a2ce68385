"""Paths between noise and data, and conversions between clean latent, noise, velocity and score along them.

A path gives z_t = α(t)·z + σ(t)·ε for t in [0, 1]; t = 0 is noise, t = 1 is data. Every denoiser returns the clean
latent ẑ = E[z | z_t]; the rest follows:

    noise      ε̂ = (z_t − α ẑ) / σ
    velocity   v = α′ ẑ + σ′ ε̂            dz_t/dt along the probability-flow ODE
    score      ∇ log p_t(z_t) = −ε̂ / σ    = (α ẑ − z_t) / σ²

On the linear path, α = t and σ = 1 − t, these are (ẑ − z_t)/(1 − t) for the velocity and (t ẑ − z_t)/(1 − t)² for
the score. Times t are tensors that broadcast against z_t; σ = 0 at t = 1, where none of the three is defined.

References: Lipman et al., 2023 (linear); Song et al., 2021 (variance preserving, variance exploding).
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from onefold import settings
from onefold.errors import UserError

__all__ = [
    "Linear",
    "Path",
    "TimeDistribution",
    "VarianceExploding",
    "VariancePreserving",
    "clean_from_velocity",
    "noise",
    "noised",
    "per_token",
    "score",
    "shift_time",
    "velocity",
]


class Path(Protocol):
    """Coefficients of a path and their derivatives with respect to t."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α(t), σ(t))."""
        ...

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α′(t), σ′(t))."""
        ...


class Linear:
    """α = t, σ = 1 − t: the path that onefold trains on."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, 1 - t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), -torch.ones_like(t)


class VariancePreserving:
    """α = sin(πt/2), σ = cos(πt/2): α² + σ² = 1."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return angle.sin(), angle.cos()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin()


@dataclass(frozen=True)
class VarianceExploding:
    """α = 1, σ falls geometrically from `sigma_max` at t = 0 to `sigma_min` at t = 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * (self.sigma_min / self.sigma_max) ** t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = self.coefficients(t)
        return torch.zeros_like(t), math.log(self.sigma_min / self.sigma_max) * sigma


def noised(path: Path, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = α z + σ ε."""
    alpha, sigma = path.coefficients(t)
    return alpha * z + sigma * eps


def noise(path: Path, z_hat: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """ε̂ from the clean latent."""
    alpha, sigma = path.coefficients(t)
    return (z_t - alpha * z_hat) / sigma


def velocity(path: Path, z_hat: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """The velocity v from the clean latent."""
    d_alpha, d_sigma = path.derivatives(t)
    return d_alpha * z_hat + d_sigma * noise(path, z_hat, z_t, t)


def clean_from_velocity(path: Path, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """ẑ from the velocity: solve v = α′ ẑ + σ′ (z_t − α ẑ)/σ."""
    alpha, sigma = path.coefficients(t)
    d_alpha, d_sigma = path.derivatives(t)
    return (sigma * v - d_sigma * z_t) / (sigma * d_alpha - d_sigma * alpha)


def score(path: Path, z_hat: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """∇ log p_t(z_t) from the clean latent."""
    alpha, sigma = path.coefficients(t)
    return (alpha * z_hat - z_t) / sigma**2


def per_token(t: Float[Tensor, " B"]) -> Float[Tensor, "B 1 1"]:
    """Times (B,) in the shape that broadcasts against latents (B, N, D)."""
    return t[:, None, None]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp [0, 1] onto itself: shift < 1 moves times towards noise, > 1 towards data (Esser et al., 2024)."""
    return (shift * t / (1 + (shift - 1) * t)).clamp(max=1)  # rounding could exceed 1


@dataclass(frozen=True)
class TimeDistribution:
    """Distribution of training times: uniform, or logistic(mean + std·normal), then shifted."""

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        settings.check("objective.time", self, positive=("std", "shift"))
        if not math.isfinite(self.mean):
            raise UserError(f"objective.time.mean: {self.mean} is not a finite number; 0 is the middle of the path")

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw `n` stratified times on the generator's device: one from each of n equal quantiles, in random order.

        Stratification (Kingma et al., 2021) removes most of the noise that the times add to the loss. Since times are
        assigned to images at random, the marginal distribution of each time does not change.
        """
        order = torch.randperm(n, generator=generator, device=generator.device)
        u = (order + torch.rand(n, generator=generator, device=generator.device)) / n
        if self.kind == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
            u = torch.sigmoid(self.mean + self.std * normal)
        return shift_time(u, self.shift)
