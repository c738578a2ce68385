"""The usual two stages of latent diffusion: the objectives of the baseline with three networks.

First only the autoencoder, with z = E(x) and noise η of standard deviation s:

    L = λ_rec · ρ(D(z + s·η) − x)  [ + λ_per · d(D(z + s·η), x) ]

then, with encoder and decoder frozen and z normalised per channel, only the denoiser:

    L = λ_den · E_t w(t) · ‖f(z_t, t, y) − z‖²

The noise makes the autoencoder a variational one: for a posterior N(z, s²) against the prior N(0, 1), the divergence
per token is ½(|z|² + D·s² − D − D·ln s²), which a latent norm of unit size makes constant. Only the reconstruction term
remains, and only s determines how smooth the latents are.

Reference: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022 (arXiv 2112.10752).
The switches shared by both methods (ρ, λ, w, loss, draws, labels, decoder noise) are those of `SelfDistillation`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold import settings
from onefold.errors import UserError
from onefold.networks import Network
from onefold.objectives.losses import Losses, perceptual_error, reconstruction_error
from onefold.objectives.self_distillation import DenoisingDraws, SelfDistillation, augmented, denoising_error
from onefold.paths import Linear, noised, per_token

__all__ = ["TwoStages", "autoencoder", "diffusion"]


@dataclass(frozen=True)
class TwoStages:
    """How three networks are trained; a single network ignores these settings."""

    autoencoder: float = 0.5
    """Fraction of the run's images that the autoencoder is trained on before it is frozen."""
    latent_noise: float = 0.1
    """Standard deviation of the noise added to the latents that the autoencoder decodes."""

    def __post_init__(self) -> None:
        settings.check("stages", self, not_negative=("latent_noise",))
        if not 0 < self.autoencoder < 1:
            raise UserError(f"stages.autoencoder: {self.autoencoder} is not between 0 and 1; 0.5 is half of the run")


def autoencoder(
    network: Network,
    target: Network,
    x: Float[Tensor, "B C H W"],
    draws: DenoisingDraws,
    objective: SelfDistillation,
    stages: TwoStages,
) -> Losses:
    """The loss of the first stage, which trains encoder and decoder; `target` is an average of the network."""
    x = augmented(x, draws, objective)
    z = network.encode(x)
    decoder_z = noised(Linear(), z, draws.decoder_eps, per_token(draws.decoder_t))
    x_hat = network.decode(decoder_z + stages.latent_noise * draws.decoder_eps)
    terms = {"reconstruction": reconstruction_error(x_hat, x, objective.reconstruction)}
    if objective.perceptual_weight:
        terms["perceptual"] = perceptual_error(target, x_hat, x)
    return Losses.weighted(terms, objective.weights, draws.span)


def diffusion(
    network: Network,
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    draws: DenoisingDraws,
    objective: SelfDistillation,
) -> Losses:
    """The loss of the second stage, which trains only the denoiser."""
    x = augmented(x, draws, objective)
    with torch.no_grad():
        z = network.encode(x)
    n = draws.t.shape[1]
    t, eps, source = draws.t.flatten(), draws.eps.flatten(0, 1), z.repeat_interleave(n, 0)
    z_t = noised(Linear(), source, eps, per_token(t))
    labels = torch.where(draws.unlabelled, network.config.classes, y[:, None]).flatten()
    z_hat = network.denoise(z_t, t, labels if network.config.classes else None)
    terms = {"denoising": denoising_error(z_hat, z_t, source, eps, t, objective)}
    return Losses.weighted(terms, objective.weights, draws.span)
