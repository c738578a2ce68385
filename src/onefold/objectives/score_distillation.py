"""Score distillation: a generator trained by the difference of two scores.

A teacher's denoiser f_p gives the score of noised data; a student denoiser f_q, trained alongside on the generator's
samples, gives that of noised samples. The gradient of the reverse Kullback–Leibler divergence at a sample x is

    E_t w(t) (s_q − s_p)(x_t, t) · t,     s_q − s_p = t (f_q − f_p)(x_t, t) / (1−t)²,

where the weight w(t) = (1−t)²/t² leaves the plain difference of the two clean predictions.

    score    f_q − f_p: variational score distillation (Wang et al., 2023), Diff-Instruct (Luo et al., 2023)
    dmd      (f_q − f_p) / mean |x − f_p(x_t)|, each sample by its own mean (Yin et al., 2024), optionally with the
             gradient of a discriminator at the noised sample (Yin et al., 2024, "DMD2")

Both errors, the teacher's and the student's, enter the gradient; `studies/bias.py` measures them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold import settings
from onefold.objectives.density_ratio import NoiseDraws
from onefold.paths import Linear, TimeDistribution, noised

__all__ = ["ScoreDistillation", "distillation", "score_gradient"]

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t (B, …), t (B,), y (B,) or None) → clean prediction (B, …)."""


@dataclass(frozen=True)
class ScoreDistillation:
    """Options of score distillation."""

    time: TimeDistribution = field(default_factory=TimeDistribution)
    """Noise levels of both losses."""
    t_max: float = 0.8
    """The latest noise level: times are multiplied by it. In a first trial, samples were nearer to test images than
    with 0.98 (`docs/onestep.md`)."""
    guidance: float = 1.0
    """Guidance of the teacher (Ho & Salimans, 2022): the generator learns to sample as the teacher would under it."""
    adversarial: float = 0.0
    """Weight of a discriminator's gradient added to that of the scores, with method dmd."""

    def __post_init__(self) -> None:
        settings.check("score", self, not_negative=("adversarial", "guidance"), shares=("t_max",))


def _at(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.ndim - 1))


def distillation(
    teacher: Denoiser,
    student: Denoiser,
    fake: Float[Tensor, "B ..."],
    y: Int64[Tensor, " B"] | None,
    draws: NoiseDraws,
    *,
    normalised: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B ..."] | None]:
    """(loss of the student, gradient of the generator's loss at its samples), from one evaluation of each denoiser.

    The student's loss is the mean squared error of its clean predictions on noised samples. Where the samples require
    no gradient, there is none, and the teacher is not asked. Neither result has a gradient in samples or teacher.
    """
    x = fake.detach()
    x_t = noised(Linear(), x, draws.eps, _at(draws.t, x))
    own = student(x_t, draws.t, y).float()
    loss = (own - x).square().mean()
    if not fake.requires_grad:
        return loss, None
    with torch.no_grad():
        wanted = teacher(x_t, draws.t, y).float()
    return loss, score_gradient(own.detach(), wanted, x, normalised=normalised)


def score_gradient(
    own: Float[Tensor, "B ..."], wanted: Float[Tensor, "B ..."], x: Float[Tensor, "B ..."], *, normalised: bool
) -> Float[Tensor, "B ..."]:
    """Gradient of each sample's own loss at samples x, from the predictions of both; `normalised` as in DMD."""
    difference = own - wanted
    if not normalised:
        return difference
    return difference / _at((x - wanted).abs().flatten(1).mean(1), x).clamp(min=1e-3)
