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

A penalty E‖∇ℓ‖² keeps a ratio network smooth, but makes its ℓ too small: of data and samples that it tells apart with
an AUC of 0.8, it says so with a σ(ℓ) near ½. A scale undoes that, level by level: a factor of the network's value that
follows from the same classification loss without the penalty, and leaves the network as it is. So there are two values:
the network's own, which its loss and its penalty are about, and ℓ, calibrated, which divergences, verifier and log
read.

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

SUREST = 40.0
"""At −ℓ beyond, the classification loss has so little slope that it is no longer turned into all of the generator's."""


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
    alpha: float = 0.1
    """The α of `skew_jensen_shannon`, between 0 and 1."""
    time: TimeDistribution = field(default_factory=TimeDistribution)
    """Noise levels at which data and samples are compared."""
    t_max: float = 0.98
    """The latest noise level: times are multiplied by it. Near t = 1 the supports separate and ℓ is unbounded."""
    penalty: float = 0.02
    """Weight of E‖∇ℓ‖² over noised data and noised samples (R1 + R2): a sum over a sample's values, so that for a
    linear ℓ it acts like noise of one and the same variance in each value, however many there are."""
    penalty_share: float = 0.125
    """Fraction of the batch that the penalty is taken over, which in turn does not teach the generator."""
    penalty_step: float = 0.05
    """Size of the finite differences that the penalty is taken by."""
    calibrated: bool = True
    """Scale ℓ at each noise level to how often the network is right, which the penalty alone would make too small."""
    weighting: Literal["uniform", "noise"] = "uniform"
    """Of the levels in the generator's loss: 1, or DMD's (1−t)²/t, i.e. t times the difference of clean predictions."""
    level_normalised: bool = False
    """Divide f″(r) r² by its mean at each noise level, so that no divergence favours a level."""

    def __post_init__(self) -> None:
        settings.check(
            "ratio", self, positive=("penalty_step",), not_negative=("penalty",), shares=("t_max", "penalty_share")
        )
        if self.penalty_share == 1:
            raise UserError("ratio.penalty_share: 1 leaves no sample to teach the generator; give less")
        if not 0 < self.alpha < 1:
            raise UserError(f"ratio.alpha: {self.alpha} is not between 0 and 1; 0.5, for instance, is Jensen–Shannon")
        if self.divergence not in DIVERGENCES:
            raise UserError(
                f"ratio.divergence: {self.divergence!r} is not one of {', '.join(DIVERGENCES)}; for one of your own, "
                "run its file first, `onefold --import FILE.py …`"
            )
        if not isinstance(DIVERGENCES[self.divergence], Divergence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"ratio.divergence: {self.divergence!r} is registered, but as no Divergence(loss, weight)")

    def weight(self, logit: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """f″(r) r² of the divergence at ℓ."""
        skew = self.divergence == "skew_jensen_shannon"
        return (skewed(self.alpha) if skew else DIVERGENCES[self.divergence]).weight(logit)


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
    return noised(Linear(), x, draws.eps, _each(draws.t, x))


def _each(value: Float[Tensor, " B"], x: Float[Tensor, "B ..."]) -> Tensor:
    """A value for each sample, in the shape that broadcasts against samples."""
    return value.view(-1, *(1,) * (x.ndim - 1))


def ratio_loss(
    ratio: Ratio,
    real: Float[Tensor, "B ..."],
    fake: Float[Tensor, "B ..."],
    y: Int64[Tensor, " B"] | None,
    draws: NoiseDraws,
    options: DensityRatio,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
    levels: Levels | None = None,
    penalised: Int64[Tensor, " k"] | None = None,
    share: float | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of the ratio network, and its terms, detached; its backward pass also teaches the generator.

    Data and samples are noised to the same levels with the same noise and have the same labels, so they differ only in
    what is to be learned. All evaluations are packed into one call.

    If `fake` requires a gradient, it receives that of the *generator's* loss, −w ∇ℓ / values (see `ratio_gradient`;
    the mean over the batch, like all losses), from the same backward pass that gives the network its own: what comes
    back at a sample is the derivative of its classification loss in ℓ times ∇ℓ, and one factor for each sample turns
    the former into −w (as gradient reversal does; Ganin et al., 2016). Samples in the penalty have more than one way
    back, and receive none.

    Args:
        ratio: (x_t, t, y) → the network's own value.
        real: Data.
        fake: Samples of the generator, as many.
        y: Labels of both.
        draws: Levels, noise and directions.
        options: Penalty and divergence.
        scale: Times (B,) → factors (B,) from the network's own value to ℓ, which are learned. None: 1.
        levels: Required for `level_normalised`.
        penalised: Positions of the samples that the penalty is taken over. None: `penalty_share` of them, spread evenly
        share: Their fraction of the whole batch, of which these samples may be a part. None: these are all.
    """
    x_real, x_fake = _noised(real, draws), _noised(fake, draws)
    chosen = penalised if penalised is not None else _spread(options.penalty_share, len(fake), fake.device)
    sets = [torch.arange(len(fake), device=fake.device)] * 2
    points = [x_real, x_fake]
    if options.penalty and len(chosen):
        step = options.penalty_step * draws.direction[chosen]
        points += [x_real[chosen] + step, x_fake.detach()[chosen] + step]
        sets += [chosen, chosen]
    index = torch.cat(sets)
    found = ratio(torch.cat(points), draws.t[index], None if y is None else y[index]).float()
    on_real, on_fake, *shifted = found.split([len(part) for part in points])
    parts = {"ratio": (F.softplus(-on_real) + F.softplus(on_fake)).mean()}
    loss = parts["ratio"]
    factor = torch.ones_like(draws.t) if scale is None else scale(draws.t)
    if scale is not None:
        logits = factor * on_real.detach(), factor * on_fake.detach()
        parts["calibrated"] = (F.softplus(-logits[0]) + F.softplus(logits[1])).mean()
        loss = loss + parts["calibrated"]
    if shifted:
        # E over directions u ~ N(0, I) of (u·∇ℓ)² is ‖∇ℓ‖².
        slopes = torch.stack([shifted[0] - on_real[chosen], shifted[1] - on_fake[chosen]]) / options.penalty_step
        parts["ratio_penalty"] = slopes.square().sum() / (share * len(fake) if share else len(chosen))
        loss = loss + options.penalty * parts["ratio_penalty"]
    if fake.requires_grad:
        teaching = torch.ones_like(draws.t) if not shifted else torch.ones_like(draws.t).index_fill(0, chosen, 0.0)
        own = on_fake.detach()
        weight = teaching * factor.detach() * _weight(factor.detach() * own, draws.t, options, levels)
        turned = _each(weight / (torch.sigmoid(own.clamp(min=-SUREST)) * fake[0].numel()), fake)

        def turn(gradient: Tensor) -> Tensor:
            return -turned * gradient

        x_fake.register_hook(turn)
    return loss, {name: part.detach() for name, part in parts.items()}


def _spread(share: float, count: int, device: torch.device) -> Int64[Tensor, " k"]:
    """Positions of a share of `count` samples, evenly spread, of which at least one is left out."""
    chosen = min(round(share * count), count - 1)
    return torch.arange(chosen, device=device) * count // max(1, chosen)


def _weight(logit: Tensor, t: Tensor, options: DensityRatio, levels: Levels | None) -> Float[Tensor, " B"]:
    """The generator's weight of ∇ℓ at each sample."""
    weight = options.weight(logit)
    if options.level_normalised and levels is not None:
        weight = levels.normalised(weight, t)
    if options.weighting == "noise":
        weight = weight * (1 - t).square() / t.clamp(min=1e-2)
    return weight


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
    `levels` is required for `level_normalised`. Training has the same from `ratio_loss`, at no cost.
    """
    with torch.enable_grad():
        at = fake.detach().requires_grad_()
        logits = ratio(_noised(at, draws), draws.t, y).float()
        (slope,) = torch.autograd.grad(logits.sum(), at)
    return -_each(_weight(logits.detach(), draws.t, options, levels), fake) * slope
