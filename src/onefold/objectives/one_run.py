"""One run: a network learns to encode, denoise, decode and generate in one step, all at once, from random weights.

The shared weights learn by self-distillation (`self_distillation`), as without a generator. On top of their average,
two small sets of weights (`networks.jump`) learn at the same steps:

    G(ε, y)      the one-step generator, from (1 − t₀)·ε at t₀
    f_q(x_t, t)  the student: a denoiser of the generator's samples x = G(ε, y)

    student    ‖f_q(x_t, t, y) − sg(x)‖²
    exit       ‖image(sg h) − sg(D(x))‖², the hidden tokens h of the same pass of G to pixels, towards the decoder's
               picture; it learns alone, and makes an image in one pass of the trunk where G and D take two
    generator  Σ sg(f_q − f_p)(x_t, t, y) · G(ε, y),  with f_p the averaged network's denoiser

The generator's gradient is that of the reverse Kullback–Leibler divergence from noised samples to noised data, each
sample's divided by the mean of |x − f_p| (`score_distillation`), with both scores from the network itself, as it is at
that moment: there is no teacher run, no critic, and no loss has a weight. No loss of generator or student reaches the
shared weights, so encoder, denoiser and decoder are those of plain training. Because the student is a change of the
average, what both have in common moves with the latents, and only the difference f_q − f_p has to be learned.

References: score distillation: Wang et al., 2023 (ProlificDreamer, whose student is a low-rank change, too); Luo et
al., 2023 (Diff-Instruct). Scores of data and samples in one network: TwinFlow (arXiv 2512.05150).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from onefold import settings
from onefold.errors import UserError
from onefold.networks import Network
from onefold.networks.jump import Jump
from onefold.objectives.density_ratio import NoiseDraws, draw_noise
from onefold.objectives.losses import Losses, Span, each_tensor
from onefold.objectives.score_distillation import distillation
from onefold.paths import Linear, TimeDistribution, noised, per_token
from onefold.sampling import with_guidance

__all__ = ["OneRun", "OneRunDraws", "draw", "one_run"]


@dataclass(frozen=True)
class OneRun:
    """How a network learns to generate in one step while it learns everything else."""

    start: float = 0.3
    """The generator's time t₀: it starts from (1 − t₀)·ε."""
    begin: int | None = None
    """Images of the run before generator and student begin to learn. None: 35 % of all."""
    updates: int = 2
    """Their updates at each step …"""
    share: float = 0.5
    """… and samples of each, as a fraction of the batch."""
    generator_rate: float = 2e-3
    """Learning rate of the generator."""
    student_rate: float = 4e-3
    """Learning rate of the student."""
    normalised: bool = True
    """Whether each sample's gradient is divided by the mean of |x − f_p(x_t)| (Yin et al., 2024, DMD)."""
    decay: float = 0.5
    """Fraction of the run, at its end, over which both rates fall linearly to 0."""
    time: TimeDistribution = field(default_factory=TimeDistribution)
    """Noise levels at which samples and data are compared …"""
    t_max: float = 0.9
    """… times this, the latest."""
    guidance: float = 1.0
    """Guidance of the data's score (Ho & Salimans, 2022): the generator learns to sample as under it."""
    measured: int = 1000
    """Samples of each measurement in the log."""
    features: str | None = None
    """File of the feature extractor for this measurement (.safetensors, .pt or .onnx). None: the classifier of the
    data, if an evaluation has made it before."""

    def __post_init__(self) -> None:
        settings.check(
            "onerun",
            self,
            positive=("updates", "share", "t_max", "generator_rate", "student_rate", "measured"),
            not_negative=("guidance",),
            shares=("share", "decay", "t_max"),
        )
        if self.measured == 1:
            raise UserError("onerun.measured: 1 sample has no distance; give at least 2")
        if self.begin is not None and self.begin < 0:
            raise UserError(f"onerun.begin: {self.begin} is negative; give the images before it, or leave it out")
        if not 0 <= self.start < 1:
            raise UserError(f"onerun.start: {self.start} must be at least 0 (noise) and below 1 (data)")


class OneRunDraws(NamedTuple):
    """The randomness of samples and of their comparison with data, for a batch of B images."""

    eps: Float[Tensor, "B N D"]
    unlabelled: Bool[Tensor, " B"]
    score: NoiseDraws
    span: Span

    def part(self, start: int, stop: int) -> "OneRunDraws":
        """The draws of images `start` to `stop`."""
        return each_tensor(self, lambda value: value[start:stop])._replace(span=self.span.part(start, stop))


def draw(
    options: OneRun, label_dropout: float, batch: int, latent_shape: tuple[int, int], rng: torch.Generator
) -> OneRunDraws:
    """Draw for a batch of `batch` images with latents of shape (N, D), on the device of `rng`."""
    shape = (batch, *latent_shape)
    return OneRunDraws(
        eps=torch.randn(shape, generator=rng, device=rng.device),
        unlabelled=torch.rand(batch, generator=rng, device=rng.device) < label_dropout,
        score=draw_noise(options.time, options.t_max, shape, rng),
        span=Span(0, batch, batch),
    )


def one_run(
    student: Jump,
    generator: Jump,
    average: Network,
    y: Int64[Tensor, " B"],
    draws: OneRunDraws,
    options: OneRun,
    exit: nn.Module | None = None,
) -> Losses:
    """The loss of student, generator and exit, from whose backward pass each receives the gradient of its own.

    Args:
        student: Learns to denoise the generator's samples.
        generator: Learns to generate in one step.
        average: The average of the network that trains, on top of which both act. Receives no gradient.
        y: Labels 0…K−1 of a batch of images (ignored by an unconditional network); the samples have those of a share.
        draws: The batch's randomness.
        options: Of generator and student.
        exit: Learns to make images of the generator's samples in the same pass, if there is one.
    """
    count = max(1, round(options.share * draws.span.batch))
    kept = draws.span.spread(count, y.device)
    if not len(kept):
        return Losses(torch.zeros((), device=y.device), {})
    classes = average.config.classes
    labels = y.masked_fill(draws.unlabelled, classes)[kept] if classes else None
    start = torch.full((len(kept),), options.start, device=y.device)
    eps = draws.eps[kept]
    noise = noised(Linear(), torch.zeros_like(eps), eps, per_token(start))
    if exit is None:
        fake, image = average.generate_with(generator, noise, start, labels), None
    else:
        fake, image = average.generate_with_image(generator, exit, noise, start, labels)
    error, gradient = distillation(
        with_guidance(average.denoise, options.guidance, classes),
        partial(average.generate_with, student),
        fake,
        labels,
        NoiseDraws(*(value[kept] for value in draws.score)),
        normalised=options.normalised,
    )
    assert gradient is not None
    share = len(kept) / count
    told = {"student": share * error.detach(), "difference": share * gradient.square().mean()}
    total = error + (gradient * fake).mean()
    if image is not None:
        with torch.no_grad():
            wanted = average.decode(fake.detach())
        missed = (image - wanted).square().mean()
        total, told = total + missed, {**told, "exit": share * missed.detach()}
    return Losses(share * total, told)
