"""Why latents collapse, in numbers: the two causes named by Wang & Zhang (2025), measured on a batch.

Variance suppression. The velocity loss at time t is

    E‖v − (z − ε)‖²  =  w_t · ( E‖ẑ − E[z|z_t]‖²  +  E tr Var[z|z_t] ),        w_t = 1/(1−t)²

and no denoiser can lower the last term; only an encoder can. The true Var[z|z_t] is unknown. Here it is replaced by
that of a Gaussian with the covariance C of the latents (of tokens, over images and positions), in closed form:

    w_t · tr Var[z|z_t]  =  tr( C (t² C + (1−t)² I)⁻¹ ),        ∫₀¹ … dt  =  (π/2) · tr C^½

This is the error of the best *linear* estimate of a token from its own noised value: exact for independent Gaussian
tokens, and an upper bound for all others, since a denoiser that sees the other tokens and the class can do better. The
alternative, the error of the trained denoiser, is the sum of both terms; this estimate does not depend on how well the
denoiser is trained, is differentiable in the encoder, and can be tested.

Rank differentiation. Self-distillation is stable where the predictor's output has a lower effective rank than its
target. Comparing `onefold.metrics.effective_rank` of ẑ with that of z, and of v with that of z − ε, shows whether it
does.

Reference: Wang & Zhang, Diffusion as Self-Distillation, 2025 (arXiv 2511.14716); the closed form: `docs/method.md`.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from onefold.paths import per_token

__all__ = ["LEAST_DIVISOR", "variance_term", "velocity_of"]

LEAST_DIVISOR = 0.05
"""Lower bound of 1 − t as a divisor, as in the velocity loss."""


def variance_term(
    z: Float[Tensor, "B N D"], t: Float[Tensor, " T"], *, least_divisor: float = LEAST_DIVISOR
) -> Float64[Tensor, ""]:
    """The part of the velocity loss of latents z that no denoiser can lower, averaged over the times t; on the CPU.

    A mean over values, like the loss. Differentiable in z for any spread, including 0.
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
    """(ẑ − z_t)/(1−t), which for z itself is z − ε, with the divisor of the velocity loss."""
    at = per_token(t)
    return (clean - z_t) / (1 - at).clamp(min=LEAST_DIVISOR)
