"""Effective rank: how many directions the latents really use.

With singular values σ_i of the centred rows and p_i = σ_i / Σσ,

    effective rank = exp(−Σ p_i log p_i)

between 1 (all on a line) and d (the same spread in every direction); it does not change when the latents are
scaled, shifted or rotated. 0 means that all rows are equal: the latents have collapsed.

Tokens (B, N, D) count as B·N rows, "per token"; for the whole latent, give `z.flatten(1)`, (B, N·D).

Shapes: latents (n, d) or (B, N, D). Reference: Roy & Vetterli 2007, "The effective rank".
"""

import numpy as np
import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.arrays import FeatureArray, as_matrix


def spectrum(latents: FeatureArray) -> Tensor:
    """Standard deviations along the principal directions, descending: (min(n, d),) float64.

    They are the singular values of the centred rows divided by √n, from the eigenvalues of the smaller of
    the covariance (d, d) and the Gram matrix (n, n). Raises `UserError` unless the shape is (n, d) or (B,
    N, D), n > 1, and all is finite.
    """
    latents = latents if isinstance(latents, Tensor) else np.asarray(latents)
    if latents.ndim not in (2, 3):
        shape = tuple(latents.shape)
        raise UserError(f"latents: shape {shape} is neither (n, d) nor (B, N, D); reshape them")
    x = as_matrix(latents.reshape(-1, latents.shape[-1]), "latents", at_least=2)
    size = x.square().mean().sqrt()
    x -= x.mean(0)
    n, d = x.shape
    values = torch.linalg.eigvalsh(x.T @ x / n if n >= d else x @ x.T / n).flip(0).clamp(min=0).sqrt()
    # What is left of equal rows after centring is rounding, and no direction.
    return values if values[0] > 1e-12 * size else torch.zeros_like(values)


def effective_rank(latents: FeatureArray) -> float:
    """Effective rank of latents (n, d) or (B, N, D), between 1 and d; 0.0 if all rows are equal.

    Raises `UserError` as `spectrum`.
    """
    values = spectrum(latents)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().exp().item()
