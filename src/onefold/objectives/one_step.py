"""One step: the losses of a one-step generator and of the critic that it learns from.

    z = E(x),  G(ε, y) = f(ε, 0, y)          data and samples in the teacher's latents
    critic     learns what distinguishes them; its gradient g at a sample points towards the data
    generator  minimises Σ g · G(ε, y), whose gradient in its weights is that of the divergence

The critic is one of

    ratio    a ratio network (`density_ratio`), which learns only from data
    score    a student denoiser, which learns the generator's score; the teacher gives the data score
    dmd      the same (`score_distillation`), and a ratio network if it has an adversarial term

Where encoder and decoder are the same network as the generator, part of every batch preserves them: it keeps D(z) at
the image and E(x) at the teacher's latents. The teacher is any network whose latents and scores the generator is to
match; it may be a fixed copy or change along with the generator.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from tyro.conf import Suppress

from onefold import settings
from onefold.errors import UserError
from onefold.networks import Network, RatioNet
from onefold.objectives.density_ratio import DensityRatio, Levels, NoiseDraws, draw_noise, ratio_gradient, ratio_loss
from onefold.objectives.losses import Losses, Span, each_tensor, reconstruction_error
from onefold.objectives.score_distillation import ScoreDistillation, score_gradient, student_loss
from onefold.objectives.self_distillation import SelfDistillation, augmented, draw_offset
from onefold.paths import Linear, noised, per_token
from onefold.schedule import Schedule

__all__ = ["Critic", "OneStep", "OneStepDraws", "Weights", "critic_loss", "draw", "generator_inputs", "generator_loss"]

Weights = Literal["teacher", "random", "trunk", "ends"]
"""Which initial weights come from the teacher: all, none, only those of trunk and modulation, or all but those."""


@dataclass(frozen=True)
class OneStep:
    """How a trained denoiser, the teacher, becomes a one-step generator.

    Augmentation (`flip`, `shift`), `label_dropout` and the kind of `reconstruction` error are those of the objective
    that the teacher was trained with.
    """

    method: Annotated[Literal["ratio", "score", "dmd"], Suppress] = "ratio"  # --method on the command line
    ratio: DensityRatio = field(default_factory=DensityRatio)
    score: ScoreDistillation = field(default_factory=ScoreDistillation)
    generator: Weights = "teacher"
    generator_trains: Literal["all", "norms"] = "all"
    """norms: the matrices of the trunk's blocks stay as they are."""
    critic: Weights = "teacher"
    critic_trains: Literal["all", "norms"] = "all"
    critic_blocks: int | None = None
    """Depth of the ratio network: the teacher's first blocks. None: all."""
    critic_rate: float = 3e-4
    """Learning rate of the critic; the generator's is set by the schedule."""
    critic_updates: int = 1
    """Critic updates per generator update, each on a batch of its own."""
    critic_warmup: int = 6_000
    """Images that the critic is trained on before the generator starts."""
    codec_share: float = 0.25
    """Fraction of the batch used to preserve encoder and decoder, if they are the same network as the generator …"""
    codec_weight: float = 1.0
    """… and the weight of this loss."""
    renoised: float = 0.0
    """Fraction of generator inputs that are noised data instead of noise, which also teaches few-step sampling."""
    selection: int = 1000
    """Samples of the quick measurement that selects the published checkpoint; 0 publishes the last one."""
    features: str | None = None
    """File of the feature extractor for this measurement (.safetensors, .pt or .onnx). None: a small classifier of the
    data, which is first trained on the CPU; for large images, give another."""
    schedule: Annotated[Schedule | None, Suppress] = None
    """Schedule of this phase, if another one precedes it in the same run. None: the run's `training`."""

    def __post_init__(self) -> None:
        settings.check(
            "onestep",
            self,
            positive=("critic_rate", "critic_updates"),
            not_negative=("critic_warmup", "codec_weight", "selection"),
            shares=("codec_share", "renoised"),
        )
        if self.selection == 1:
            raise UserError("onestep.selection: 1 sample has no distance; give at least 2, or 0 to publish the last")

    @property
    def has_ratio(self) -> bool:
        """Whether the critic contains a ratio network."""
        return self.method == "ratio" or self.score.adversarial > 0


class OneStepDraws(NamedTuple):
    """The randomness of one batch of B samples and of their comparison with data."""

    eps: Float[Tensor, "B N D"]
    s: Float[Tensor, " B"]
    """Times of the generator's inputs: 0, except for those that are noised data."""
    mirrored: Bool[Tensor, " B"]
    unlabelled: Bool[Tensor, " B"]
    ratio: NoiseDraws
    """Levels and noise for the ratio network …"""
    score: NoiseDraws
    """… and for the scores."""
    offset: Float[Tensor, "B 2"]
    span: Span

    def part(self, start: int, stop: int) -> "OneStepDraws":
        """The draws of images `start` to `stop`."""
        return each_tensor(self, lambda value: value[start:stop])._replace(span=self.span.part(start, stop))


def draw(
    options: OneStep, objective: SelfDistillation, batch: int, latent_shape: tuple[int, int], rng: torch.Generator
) -> OneStepDraws:
    """Draw for `batch` samples of shape (N, D), on the device of `rng`."""
    shape = (batch, *latent_shape)

    def uniform() -> Tensor:
        return torch.rand(batch, generator=rng, device=rng.device)

    return OneStepDraws(
        eps=torch.randn(shape, generator=rng, device=rng.device),
        s=torch.where(uniform() < options.renoised, uniform(), 0.0),
        mirrored=(uniform() < 0.5) & bool(objective.flip),
        unlabelled=uniform() < objective.label_dropout,
        ratio=draw_noise(options.ratio.time, options.ratio.t_max, shape, rng),
        score=draw_noise(options.score.time, options.score.t_max, shape, rng),
        offset=draw_offset(objective, batch, rng),
        span=Span(0, batch, batch),
    )


class Critic(nn.Module):
    """What a one-step generator learns from: a ratio network, a student denoiser, or both."""

    def __init__(self, ratio: RatioNet | None, student: Network | None) -> None:
        super().__init__()
        self.ratio = ratio
        self.student = student
        self.levels = Levels()

    def gradient(
        self,
        teacher: Network,
        fake: Float[Tensor, "B N D"],
        y: Int64[Tensor, " B"] | None,
        draws: OneStepDraws,
        options: OneStep,
    ) -> Float[Tensor, "B N D"]:
        """The gradient of the generator's loss at its samples: of each sample's own loss."""
        if self.student is None:
            assert self.ratio is not None
            return ratio_gradient(self.ratio, fake, y, draws.ratio, options.ratio, self.levels)
        normalised = options.method == "dmd"
        found = score_gradient(teacher.denoise, self.student.denoise, fake, y, draws.score, normalised=normalised)
        if self.ratio is not None:
            against = ratio_gradient(self.ratio, fake, y, draws.ratio, options.ratio, self.levels)
            found = found + options.score.adversarial * against
        return found


def generator_inputs(z: Float[Tensor, "B N D"], draws: OneStepDraws) -> Float[Tensor, "B N D"]:
    """Noise or, where s > 0, noised data z."""
    return noised(Linear(), z, draws.eps, per_token(draws.s))


def critic_loss(
    critic: Critic,
    teacher: Network,
    generator: Network,
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    draws: OneStepDraws,
    options: OneStep,
    objective: SelfDistillation,
) -> Losses:
    """The critic's loss on images x in [−1, 1] with labels y, and on equally many samples of the generator.

    Neither teacher nor generator receives a gradient.
    """
    labels = _labels(generator, y, draws)
    with torch.no_grad():
        z = teacher.encode(augmented(x, draws, objective))
        fake = generator.denoise(generator_inputs(z, draws), draws.s, labels)
    total, parts = torch.zeros((), device=x.device), dict[str, Tensor]()
    if critic.ratio is not None:
        total, parts = ratio_loss(critic.ratio, z, fake, labels, draws.ratio, options.ratio)
    if critic.student is not None:
        error = student_loss(critic.student.denoise, fake, labels, draws.score)
        total, parts = total + error, {**parts, "student": error.detach()}
    share = draws.span.share
    return Losses(share * total, {name: share * part for name, part in parts.items()})


def generator_loss(
    generator: Network,
    teacher: Network,
    critic: Critic,
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    draws: OneStepDraws,
    options: OneStep,
    objective: SelfDistillation,
) -> Losses:
    """The generator's loss and, where it shares weights with encoder and decoder, the loss that preserves those.

    `slope` is the size of the critic's gradient g (RMS over a sample's values), `decoding` and `encoding` are the
    codec's errors. g · G is averaged over values, like all losses. No gradient reaches teacher or critic.
    """
    labels, image, span = _labels(generator, y, draws), augmented(x, draws, objective), draws.span
    # A share of the batch; at least one image unless the share is 0.
    count = max(1, round(options.codec_share * span.batch)) if options.codec_share and generator.shares_codec else 0
    kept = span.spread(count, x.device)
    with torch.no_grad():
        z = teacher.encode(image) if options.renoised else torch.zeros_like(draws.eps)
    inputs = generator_inputs(z, draws)
    codec: dict[str, Tensor] = {}
    if len(kept):
        image = image[kept]
        with torch.no_grad():
            z = z[kept] if options.renoised else teacher.encode(image)
        x_hat, fake = generator.decode_and_denoise(z, inputs, draws.s, labels)
        of_codec = len(kept) / count
        codec["decoding"] = of_codec * reconstruction_error(x_hat, image, objective.reconstruction)
        codec["encoding"] = of_codec * (generator.encode(image) - z).square().mean()
    else:
        fake = generator.denoise(inputs, draws.s, labels)
    slope = critic.gradient(teacher, fake.detach(), labels, draws, options)
    total = span.share * (slope * fake).mean()
    if codec:
        total = total + options.codec_weight * (codec["decoding"] + codec["encoding"])
    parts = {"slope": span.share * slope.square().mean().sqrt(), **codec}
    return Losses(total, {name: part.detach() for name, part in parts.items()})


def _labels(generator: Network, y: Tensor, draws: OneStepDraws) -> Int64[Tensor, " B"] | None:
    """Labels, some of them replaced by "no class"; the same for data and samples."""
    classes = generator.config.classes
    return y.masked_fill(draws.unlabelled, classes) if classes else None
