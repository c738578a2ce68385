"""Noised mixtures of Gaussians: the reference for generators where everything must be known exactly.

    x = m_k + A_k ε with probability w_k,     x_t = t x + (1−t) ε′  ~  Σ_k w_k N(t m_k, t² A_k A_kᵀ + (1−t)² I)

If A_k Aᵀ_k has the variances v along its principal axes, the noised component has t² v + (1−t)² along them.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["Mixture"]


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians in d dimensions; a single Gaussian if K = 1."""

    weights: Float[Tensor, " K"]
    """Positive, with sum 1."""
    means: Float[Tensor, "K d"]
    factors: Float[Tensor, "K d d"]
    """A_k."""
    variances: Float[Tensor, "K d"] = field(init=False)
    axes: Float[Tensor, "K d d"] = field(init=False)
    """In columns."""

    def __post_init__(self) -> None:
        variances, axes = torch.linalg.eigh(self.factors @ self.factors.mT)
        object.__setattr__(self, "variances", variances.clamp(min=0))
        object.__setattr__(self, "axes", axes)

    @classmethod
    def round(cls, means: Float[Tensor, "K d"], std: Float[Tensor, " K"]) -> "Mixture":
        """Equally likely isotropic components with the given means and standard deviations."""
        count, d = means.shape
        return cls(means.new_full((count,), 1 / count), means, std[:, None, None] * torch.eye(d, dtype=means.dtype))

    def draw(
        self, n: int, rng: torch.Generator
    ) -> tuple[Float[Tensor, "n d"], Int64[Tensor, " n"], Float[Tensor, "n d"]]:
        """Samples, their components k and their ε."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        eps = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[k] + torch.einsum("nij,nj->ni", self.factors[k], eps), k, eps

    def log_density(self, x_t: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Logarithm of the density p_t."""
        return self._joint(x_t, t)[0].logsumexp(1)

    def score(self, x_t: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """∇ log p_t(x_t)."""
        joint, along, variances = self._joint(x_t, t)
        return -torch.einsum("nk,kij,nkj->ni", joint.softmax(1), self.axes, along / variances)

    def posterior_mean(self, x_t: Float[Tensor, "n d"], t: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """E[x | x_t], what a perfect denoiser predicts."""
        joint, along, variances = self._joint(x_t, t)
        gain = t[:, None, None] * self.variances / variances
        moved = torch.einsum("kij,nkj->nki", self.axes, gain * along)
        return torch.einsum("nk,nki->ni", joint.softmax(1), self.means + moved)

    def _joint(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithm of w_k N(x_t; …) (n, K); x_t − t m_k along the axes (n, K, d) and the variances there."""
        t = t[:, None, None]
        along = torch.einsum("kij,nki->nkj", self.axes, x_t[:, None] - t * self.means)
        variances = t.square() * self.variances + (1 - t).square()
        exponent = -(along.square() / variances + (2 * math.pi * variances).log()).sum(2) / 2
        return self.weights.log() + exponent, along, variances
