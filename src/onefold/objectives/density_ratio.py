"""A generator trained by a learned density ratio, without a teacher's score (DiffRatio).

Let p_t and q_t be the densities of noised data and of noised samples of the generator. One network learns

    ℓ(x_t, t) = log p_t(x_t) / q_t(x_t)

by telling the two apart at all noise levels: its loss E_t[E_p softplus(−ℓ) + E_q softplus(ℓ)] is minimal at the true ℓ.
The generator x = G(ε) then minimises a divergence D_f(p_t‖q_t) = E_q f(p_t/q_t), averaged over t. With r = e^ℓ,

    ∇_θ D_f = −E_t E_q[ f″(r) r² · ∇ℓ(x_t, t) · ∂x_t/∂θ ],

which is the gradient of a loss h(ℓ(x_t, t)) with h′ = −f″(r) r², the ratio network held fixed:

    reverse_kl             f = −log r                            f″ r² = 1
    jensen_shannon         f = r log r − (1+r) log((1+r)/2)      σ(ℓ)
    non_saturating         f = (1+r) log(1+1/r)                  σ(−ℓ)
    forward_kl             f = r log r                           r
    squared_hellinger      f = (√r − 1)²                         √r/2
    skew_jensen_shannon    with m = αr + 1 − α:
                           f = (αr log(r/m) − (1−α) log m) / (α(1−α))    r/m

The skewed divergence interpolates between the forward (α → 0) and the reverse (α → 1) Kullback–Leibler divergence; at α
= ½ it is twice `jensen_shannon`. These functions do not depend on a network: samples have any shape (B, …).

Reference: Zhang, Chen, He et al., 2025 (arXiv 2502.08005). The penalty on finite differences follows R1 and R2
(Mescheder et al., 2018; Huang et al., 2024), the per-level normalisation Xu et al., 2025 (f-distill).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from onefold import settings
from onefold.errors import UserError
from onefold.paths import Linear, TimeDistribution, noised

__all__ = ["DIVERGENCES", "DensityRatio", "Divergence", "Levels", "NoiseDraws", "Ratio", "draw_noise", "ratio_gradient"]
__all__ += ["ratio_loss", "skewed"]

Ratio = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t (B, …), t (B,), y (B,) or None) → ℓ (B,)."""

LARGEST = 10.0
"""Exponentials of ℓ continue linearly from here, so that no single sample outweighs all others."""


class Divergence(NamedTuple):
    """How a divergence weights the gradient of ℓ; both functions are elementwise."""

    generator_loss: Callable[[Tensor], Tensor]
    """h(ℓ), to be minimised."""
    weight: Callable[[Tensor], Tensor]
    """−h′(ℓ) = f″(r) r², positive."""


def _exp(x: Tensor) -> Tensor:
    """e^x, continued by its tangent beyond `LARGEST`."""
    bounded = x.clamp(max=LARGEST)
    return bounded.exp() * (1 + x - bounded)


def skewed(alpha: float) -> Divergence:
    """The skewed Jensen–Shannon divergence with 0 < α < 1."""
    shift = math.log(alpha / (1 - alpha))

    def loss(logit: Tensor) -> Tensor:
        return -F.softplus(logit + shift) / alpha

    def weight(logit: Tensor) -> Tensor:
        return torch.sigmoid(logit + shift) / alpha

    return Divergence(loss, weight)


def _reverse_kl(logit: Tensor) -> Tensor:
    return -logit


def _jensen_shannon(logit: Tensor) -> Tensor:
    return -F.softplus(logit)


def _non_saturating(logit: Tensor) -> Tensor:
    return F.softplus(-logit)


def _non_saturating_weight(logit: Tensor) -> Tensor:
    return torch.sigmoid(-logit)


def _forward_kl(logit: Tensor) -> Tensor:
    return -_exp(logit)


def _forward_kl_weight(logit: Tensor) -> Tensor:
    return logit.clamp(max=LARGEST).exp()


def _squared_hellinger(logit: Tensor) -> Tensor:
    return -_exp(logit / 2)


def _squared_hellinger_weight(logit: Tensor) -> Tensor:
    return (logit / 2).clamp(max=LARGEST).exp() / 2


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": Divergence(_reverse_kl, torch.ones_like),
    "jensen_shannon": Divergence(_jensen_shannon, torch.sigmoid),
    "non_saturating": Divergence(_non_saturating, _non_saturating_weight),
    "forward_kl": Divergence(_forward_kl, _forward_kl_weight),
    "squared_hellinger": Divergence(_squared_hellinger, _squared_hellinger_weight),
    "skew_jensen_shannon": skewed(0.1),
}


@dataclass(frozen=True)
class DensityRatio:
    """Options of the losses of ratio network and generator."""

    divergence: str = "jensen_shannon"
    """A name in `DIVERGENCES`."""
    time: TimeDistribution = field(default_factory=TimeDistribution)
    """Noise levels at which data and samples are compared …"""
    t_max: float = 0.98
    """… times this: near t = 1 the supports separate and the ratio is unbounded."""
    penalty: float = 0.1
    """Weight of E‖∇ℓ‖² over noised data and noised samples (R1 + R2), by finite differences …"""
    penalty_step: float = 0.05
    """… of this size."""
    centring: float = 0.01
    """Weight of (ℓ(data) + ℓ(samples))², which keeps the logits around 0."""
    weighting: Literal["uniform", "noise"] = "uniform"
    """Of the levels in the generator's loss: 1, or DMD's (1−t)²/t, i.e. t times the difference of clean predictions."""
    level_normalised: bool = False
    """Divide f″(r) r² by its mean at each noise level, so that no divergence favours a level."""

    def __post_init__(self) -> None:
        settings.check(
            "ratio", self, positive=("penalty_step",), not_negative=("penalty", "centring"), shares=("t_max",)
        )
        if self.divergence not in DIVERGENCES:
            raise UserError(f"ratio.divergence: {self.divergence!r} is not one of {', '.join(DIVERGENCES)}")


class NoiseDraws(NamedTuple):
    """The randomness of one comparison of B samples: levels, noise, and directions for the finite differences."""

    t: Float[Tensor, " B"]
    eps: Float[Tensor, "B ..."]
    direction: Float[Tensor, "B ..."]


def draw_noise(time: TimeDistribution, t_max: float, shape: tuple[int, ...], rng: torch.Generator) -> NoiseDraws:
    """Draw for samples of `shape` (B, …), on the device of `rng`; times are from `time`, times `t_max`."""

    def normal() -> Tensor:
        return torch.randn(shape, generator=rng, device=rng.device)

    return NoiseDraws(t_max * time.sample(shape[0], rng), normal(), normal())


class Levels(nn.Module):
    """Running means of f″(r) r² in bins of the noise level, initially 1.

    Weights are collected while a step computes its gradient, in one or more micro-batches; the means are updated once,
    at its end.
    """

    means: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, bins: int = 10, survival: float = 0.99) -> None:
        super().__init__()
        self.survival = survival
        self.register_buffer("means", torch.ones(bins))
        self.register_buffer("total", torch.zeros(bins), persistent=False)
        self.register_buffer("count", torch.zeros(bins), persistent=False)

    @torch.no_grad()
    def normalised(self, weight: Float[Tensor, " B"], t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Weights divided by the means of their levels; collects them for the next update."""
        level = (t * len(self.means)).long().clamp(max=len(self.means) - 1)
        self.total.index_add_(0, level, weight.float())
        self.count.index_add_(0, level, torch.ones_like(weight, dtype=torch.float32))
        return weight / self.means[level]

    @torch.no_grad()
    def move(self, skipped: Bool[Tensor, ""]) -> None:
        """End a step: update the means with the collected weights, unless the step was skipped."""
        known = (self.count > 0) & ~skipped
        seen = torch.where(known, self.total / self.count.clamp(min=1), self.means)
        self.means.lerp_(seen, 1 - self.survival)
        self.total.zero_()
        self.count.zero_()


def _noised(x: Tensor, draws: NoiseDraws) -> Tensor:
    return noised(Linear(), x, draws.eps, draws.t.view(-1, *(1,) * (x.ndim - 1)))


def ratio_loss(
    ratio: Ratio,
    real: Float[Tensor, "B ..."],
    fake: Float[Tensor, "B ..."],
    y: Int64[Tensor, " B"] | None,
    draws: NoiseDraws,
    options: DensityRatio,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of the ratio network, and its terms, detached.

    Data and samples are noised to the same levels with the same noise and have the same labels, so they differ only in
    what is to be learned. All evaluations are packed into one call.
    """
    clean = torch.stack([_noised(real, draws), _noised(fake.detach(), draws)])
    points = torch.cat([clean, clean + options.penalty_step * draws.direction]) if options.penalty else clean
    sets = len(points)
    labels = None if y is None else y.repeat(sets)
    logits = ratio(points.flatten(0, 1), draws.t.repeat(sets), labels).float().unflatten(0, (sets, -1))
    on_real, on_fake = logits[0], logits[1]
    parts = {"ratio": (F.softplus(-on_real) + F.softplus(on_fake)).mean()}
    loss = parts["ratio"]
    if options.penalty:
        # E over directions u ~ N(0, I) of (u·∇ℓ)² is ‖∇ℓ‖².
        slopes = (logits[2:] - logits[:2]) / options.penalty_step
        parts["ratio_penalty"] = slopes.square().sum(0).mean()
        loss = loss + options.penalty * parts["ratio_penalty"]
    if options.centring:
        loss = loss + options.centring * (on_real + on_fake).square().mean()
    return loss, {name: part.detach() for name, part in parts.items()}


def ratio_gradient(
    ratio: Ratio,
    fake: Float[Tensor, "B ..."],
    y: Int64[Tensor, " B"] | None,
    draws: NoiseDraws,
    options: DensityRatio,
    levels: Levels | None = None,
) -> Float[Tensor, "B ..."]:
    """Gradient of the generator's loss at its samples: of each sample's own loss, not of the batch mean.

    The batch mean of Σ gradient · G(ε) has the gradient of the divergence with respect to the generator's weights.
    `levels` is required for `level_normalised`.
    """
    divergence = DIVERGENCES[options.divergence]
    with torch.enable_grad():
        at = fake.detach().requires_grad_()
        logits = ratio(_noised(at, draws), draws.t, y).float()
        (slope,) = torch.autograd.grad(logits.sum(), at)
    weight = divergence.weight(logits.detach())
    if options.level_normalised and levels is not None:
        weight = levels.normalised(weight, draws.t)
    if options.weighting == "noise":
        weight = weight * (1 - draws.t).square() / draws.t.clamp(min=1e-2)
    return -weight.view(-1, *(1,) * (fake.ndim - 1)) * slope
