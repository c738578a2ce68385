"""Why latents collapse, in numbers: the two causes that Wang & Zhang (2025) name, measured on a batch.

Variance suppression. The velocity loss at time t is

    E‖v − (z − ε)‖²  =  w_t · ( E‖ẑ − E[z|z_t]‖²  +  E tr Var[z|z_t] ),        w_t = 1/(1−t)²

and no denoiser can lower the last term; only an encoder can. Var[z|z_t] is that of an unknown distribution. Here it is
that of a Gaussian with the covariance C of the latents (of tokens, over images and positions), in closed form:

    w_t · tr Var[z|z_t]  =  tr( C (t² C + (1−t)² I)⁻¹ ),        ∫₀¹ … dt  =  (π/2) · tr C^½

That is the error of the best *linear* guess of a token from itself alone: exact for independent Gaussian tokens, an
upper bound for all others, since who sees the other tokens and the class can do better. The other estimate at hand is
the error of the trained denoiser, which is the sum of both terms; this one does not depend on how far the denoiser is,
is differentiable in the encoder, and can be tested.

Rank differentiation. Self-distillation is stable where the predictor's output has a lower effective rank than its
target. `onefold.metrics.effective_rank` of ẑ against that of z, and of v against that of z − ε, say whether it has.

Reference: Wang & Zhang, Diffusion as Self-Distillation, 2025 (arXiv 2511.14716); the closed form: `docs/method.md`.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from onefold.paths import per_token

__all__ = ["LEAST_DIVISOR", "variance_term", "velocity_of"]

LEAST_DIVISOR = 0.05
"""1 − t is kept at this or more where it divides, as in the velocity loss."""


def variance_term(
    z: Float[Tensor, "B N D"], t: Float[Tensor, " T"], *, least_divisor: float = LEAST_DIVISOR
) -> Float64[Tensor, ""]:
    """What no denoiser can lower in the velocity loss of latents z, averaged over the times t; on the CPU.

    A mean over numbers, as the loss is. Differentiable in z, of any spread, 0 included.
    """
    tokens = z.flatten(0, 1).cpu().double()
    tokens = tokens - tokens.mean(0)
    variances = torch.linalg.eigvalsh(tokens.mT @ tokens / len(tokens)).clamp(min=0)
    alpha, sigma = t.cpu().double()[:, None], (1 - t.cpu().double())[:, None].clamp(min=1e-6)
    weight = (sigma / sigma.clamp(min=least_divisor)).square()
    return (weight * variances / (alpha.square() * variances + sigma.square())).mean()


def velocity_of(
    clean: Float[Tensor, "B N D"], z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"]
) -> Float[Tensor, "B N D"]:
    """(ẑ − z_t)/(1−t), and of z itself z − ε, with the divisor of the velocity loss."""
    at = per_token(t)
    return (clean - z_t) / (1 - at).clamp(min=LEAST_DIVISOR)
