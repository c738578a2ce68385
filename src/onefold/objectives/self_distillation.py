"""Diffusion as self-distillation (DSD): the objective that trains encoder, denoiser and decoder together.

With z = E(x) from the online network, z* from the target encoder, z_t = t·z + (1−t)·ε and ẑ = f(z_t, t, y):

    L = λ_rec · ρ(D(z) − x)  +  λ_den · E_t w(t) · ‖ẑ − z*‖²  [ + λ_per · d(D(z), x) ]

All terms are means over values, so the weights do not depend on sizes. The switches below keep the latents from
collapsing, and each can be set to what the paper shows to fail:

    target     ema: z* from an EMA of the network · stopped: sg(z) · gradient: z itself (naive: the loss can be lowered
               by shrinking the latents)
    loss       clean: on ẑ · velocity: on v = (ẑ − z_t)/(1−t) against z* − ε
    through    whether the loss reaches the encoder through z_t

Reference: Wang & Zhang, Diffusion as Self-Distillation, 2025 (arXiv 2511.14716). Several draws per encoding and the
noised decoder input follow UNITE (arXiv 2603.22283).
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from onefold import settings
from onefold.networks import Network
from onefold.objectives.losses import Losses, Span, each_tensor, perceptual_error, reconstruction_error
from onefold.paths import Linear, TimeDistribution, noised, per_token
from onefold.pixels import mirrored, shifted

__all__ = ["DenoisingDraws", "SelfDistillation", "denoising_error", "draw", "self_distillation"]
__all__ += ["Augmentation", "augmented", "draw_offset"]


@dataclass(frozen=True)
class SelfDistillation:
    """Switches of the objective; recipes use the values that `docs/ablations.md` finds best."""

    target: Literal["ema", "stopped", "gradient"] = "ema"
    loss: Literal["clean", "velocity"] = "clean"
    through: bool = False
    """Whether the denoising loss reaches the online encoder through z_t."""
    draws: int = 1
    """Pairs (t, ε) per encoding; their losses are averaged."""
    time: TimeDistribution = field(default_factory=TimeDistribution)
    weighting: Literal["uniform", "min_snr"] = "uniform"
    """w(t): 1, or min(t²/(1−t)², 5) (Hang et al., 2023)."""
    reconstruction: Literal["l1", "l2", "charbonnier"] = "l2"
    reconstruction_weight: float = 1.0
    denoising_weight: float = 1.0
    perceptual_weight: float = 0.0
    """Weight of the distance between image and reconstruction in the features of the target network's encoder."""
    decoder_noise: float = 0.0
    """Fraction of images whose latents are noised before decoding, to a time uniform in [`decoder_noise_from`, 1]."""
    decoder_noise_from: float = 0.7
    label_dropout: float = 0.1
    """Fraction of labels replaced by "no class", for classifier-free guidance."""
    flip: bool | None = None
    """Mirror each image left to right with probability ½. None: only if the data are the recipe's own and may be
    mirrored (`data.mirrored`), which is decided before the first step."""
    shift: float = 0.0
    """Shift each image at random by up to this fraction of its size, in whole pixels; its border is repeated."""

    def __post_init__(self) -> None:
        settings.check(
            "objective",
            self,
            positive=("draws",),
            not_negative=("reconstruction_weight", "denoising_weight", "perceptual_weight"),
            shares=("decoder_noise", "decoder_noise_from", "label_dropout", "shift"),
        )

    @property
    def weights(self) -> dict[str, float]:
        """λ of each term of the loss, by name."""
        return {
            "reconstruction": self.reconstruction_weight,
            "denoising": self.denoising_weight,
            "perceptual": self.perceptual_weight,
        }


class DenoisingDraws(NamedTuple):
    """All the randomness of one batch of B images; n is the number of draws per image."""

    mirrored: Bool[Tensor, " B"]
    t: Float[Tensor, "B n"]
    eps: Float[Tensor, "B n N D"]
    unlabelled: Bool[Tensor, "B n"]
    decoder_t: Float[Tensor, " B"]
    decoder_eps: Float[Tensor, "B N D"]
    offset: Float[Tensor, "B 2"]
    span: Span

    def part(self, start: int, stop: int) -> "DenoisingDraws":
        """The draws of images `start` to `stop`."""
        return each_tensor(self, lambda value: value[start:stop])._replace(span=self.span.part(start, stop))


def draw(
    objective: SelfDistillation, batch: int, latent_shape: tuple[int, int], rng: torch.Generator
) -> DenoisingDraws:
    """Draw for `batch` images with latents of shape (N, D), on the device of `rng`.

    The times of a batch are stratified: see `TimeDistribution.sample`.
    """
    n, device = objective.draws, rng.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    noisy = uniform(batch) < objective.decoder_noise
    decoder_t = objective.decoder_noise_from + (1 - objective.decoder_noise_from) * uniform(batch)
    return DenoisingDraws(
        mirrored=(uniform(batch) < 0.5) & bool(objective.flip),
        t=objective.time.sample(batch * n, rng).view(batch, n),
        eps=normal(batch, n, *latent_shape),
        unlabelled=uniform(batch, n) < objective.label_dropout,
        decoder_t=torch.where(noisy, decoder_t, 1.0),
        decoder_eps=normal(batch, *latent_shape),
        offset=draw_offset(objective, batch, rng),
        span=Span(0, batch, batch),
    )


def draw_offset(objective: SelfDistillation, batch: int, rng: torch.Generator) -> Float[Tensor, "B 2"]:
    """The shift of each image, drawn last so that all other draws are the same with and without it."""
    if not objective.shift:
        return torch.zeros((batch, 2), device=rng.device)
    return objective.shift * (2 * torch.rand((batch, 2), generator=rng, device=rng.device) - 1)


class Augmentation(Protocol):
    """The draws that change images."""

    @property
    def mirrored(self) -> Tensor: ...

    @property
    def offset(self) -> Tensor: ...


def augmented(
    x: Float[Tensor, "B C H W"], draws: Augmentation, objective: SelfDistillation
) -> Float[Tensor, "B C H W"]:
    """Images as training sees them: mirrored and shifted as the objective specifies."""
    x = mirrored(x, draws.mirrored)
    return shifted(x, draws.offset) if objective.shift else x


def self_distillation(
    network: Network,
    target: Network,
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    draws: DenoisingDraws,
    objective: SelfDistillation,
) -> Losses:
    """The DSD loss of one batch.

    Args:
        network: The online network, which receives the gradient.
        target: The EMA network; read for `target="ema"` and the perceptual term, never receives a gradient.
        x: Images in [−1, 1].
        y: Labels 0…K−1 (ignored by an unconditional network).
        draws: The batch's randomness.
        objective: The switches.
    """
    x = augmented(x, draws, objective)
    z = network.encode(x)
    z_target = _target_latents(target, x, z, objective)

    n = draws.t.shape[1]
    t, eps = draws.t.flatten(), draws.eps.flatten(0, 1)
    source = z if objective.through else z.detach()
    z_t = noised(Linear(), source.repeat_interleave(n, 0), eps, per_token(t))
    labels = torch.where(draws.unlabelled, network.config.classes, y[:, None]).flatten()
    decoder_z = noised(Linear(), z, draws.decoder_eps, per_token(draws.decoder_t))

    x_hat, z_hat = network.decode_and_denoise(decoder_z, z_t, t, labels if network.config.classes else None)

    terms = {
        "reconstruction": reconstruction_error(x_hat, x, objective.reconstruction),
        "denoising": denoising_error(z_hat, z_t, z_target.repeat_interleave(n, 0), eps, t, objective),
    }
    if objective.perceptual_weight:
        terms["perceptual"] = perceptual_error(target, x_hat, x)
    return Losses.weighted(terms, objective.weights, draws.span)


def _target_latents(target: Network, x: Tensor, z: Tensor, objective: SelfDistillation) -> Tensor:
    if objective.target == "gradient":
        return z
    if objective.target == "stopped":
        return z.detach()
    with torch.no_grad():
        return target.encode(x)


def denoising_error(
    z_hat: Tensor, z_t: Tensor, z_target: Tensor, eps: Tensor, t: Tensor, objective: SelfDistillation
) -> Float[Tensor, ""]:
    """Weighted mean squared error of the clean latent, or of the velocity, against the target.

    The error of the velocity is (ẑ − z_t)/(1−t) − (z* − ε). Its divisor is bounded below by 0.05 (as in Li & He, 2025,
    arXiv 2511.13720) in both terms alike, so the minimum does not move.
    """
    at = per_token(t)
    if objective.loss == "clean":
        error = z_hat - z_target
    else:
        error = (z_hat - z_t - (1 - at) * (z_target - eps)) / (1 - at).clamp(min=0.05)
    weight = torch.ones_like(at)
    if objective.weighting == "min_snr":
        weight = (at / (1 - at).clamp(min=1e-4)).square().clamp(max=5.0)
    return (weight * error.square()).mean()
