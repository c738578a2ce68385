"""One step: the losses of a one-step generator and of the critic that it learns from.

    z = E(x),  G(ε, y) = generate((1 − t₀)·ε, t₀, y)     data and samples in the teacher's latents
    critic     learns what distinguishes them; its gradient g at a sample points towards the data
    generator  minimises Σ g · G(ε, y), whose gradient in its weights is that of the divergence
    upkeep     keeps what else the network does: D(z) at the image, E(x) and f(z_t, t) at the teacher's; there is none
               where the generator is a low-rank change of a network that stays as it is (`network.jump_rank`)

The critic is one of

    ratio    a ratio network (`density_ratio`), which learns only from data
    score    a student denoiser, which learns the generator's score; the teacher gives the data score. It is a change of
             the teacher as well, if the generator is
    dmd      the same (`score_distillation`), and a ratio network if it has an adversarial term

Critic and generator learn at the same points, from one backward pass. The upkeep is balanced: its gradient has a stated
multiple of the norm of the generator's. The teacher is any network whose latents and scores the generator is to match;
it may be a fixed copy or change along with the generator.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from tyro.conf import Suppress

from onefold import settings
from onefold.errors import UserError
from onefold.networks import Network, RatioNet
from onefold.networks.jump import Jump
from onefold.objectives.density_ratio import DensityRatio, Levels, NoiseDraws, draw_noise, ratio_loss
from onefold.objectives.losses import Losses, Span, each_tensor, reconstruction_error
from onefold.objectives.score_distillation import ScoreDistillation, distillation
from onefold.objectives.self_distillation import SelfDistillation, augmented, draw_offset
from onefold.paths import Linear, noised, per_token
from onefold.sampling import with_guidance
from onefold.schedule import Schedule

__all__ = ["Critic", "Method", "OneStep", "OneStepDraws", "Weights", "count_of", "critic_loss", "draw", "one_step_loss"]

Method = Literal["score", "ratio", "dmd"]
Weights = Literal["teacher", "random", "trunk", "ends"]
"""Which initial weights come from the teacher: all, none, only those of trunk and modulation, or all but those."""


@dataclass(frozen=True)
class OneStep:
    """How a trained denoiser, the teacher, becomes a one-step generator.

    Augmentation (`flip`, `shift`), `label_dropout` and the kind of `reconstruction` error are those of the objective
    that the teacher was trained with.
    """

    method: Annotated[Method, Suppress] = "score"  # --method on the command line
    ratio: DensityRatio = field(default_factory=DensityRatio)
    score: ScoreDistillation = field(default_factory=ScoreDistillation)
    start: float = 0.3
    """The generator's time t₀: it starts from (1 − t₀)·ε. At 0, all samples of a class are alike at first."""
    generator: Weights = "teacher"
    generator_trains: Literal["all", "norms"] = "all"
    """norms: the matrices of the trunk's blocks stay as they are."""
    critic: Weights = "teacher"
    critic_trains: Literal["all", "norms"] = "all"
    critic_blocks: int | None = None
    """Depth of the ratio network, by the method ratio: the teacher's first blocks. None: all."""
    critic_rate: float = 3e-4
    """Learning rate of a ratio network or a whole student; the generator's is set by the schedule."""
    student_rate: float = 4e-3
    """Learning rate of a student that is a low-rank change of the teacher."""
    scale_rate: float = 3e-2
    """Learning rate of the ratio's scale (`ratio.calibrated`)."""
    critic_updates: int = 1
    """Critic updates per generator update, each on a batch of its own."""
    critic_warmup: int = 6_000
    """Images that the critic is trained on before the generator starts; by default an eighth of all, a sixteenth where
    that is a low-rank change."""
    upkeep_share: float = 0.125
    """Fraction of the batch used to preserve what the network does besides generating."""
    upkeep: float = 1.0
    """Norm of the gradient of what preserves it, as a multiple of that of the generator's."""
    renoised: float = 0.0
    """Fraction of generator inputs that are data noised to a time between t₀ and 1, for sampling in a few steps."""
    measured: int = 1000
    """Samples of each measurement in the log."""
    selects: bool = False
    """Publish the average with the smallest distance to a fifth of the training images, rather than the last one."""
    features: str | None = None
    """File of the feature extractor for this measurement (.safetensors, .pt or .onnx). None: a small classifier of the
    data, which is first trained on the CPU; for large images, give another."""
    schedule: Annotated[Schedule | None, Suppress] = None
    """Schedule of this phase, if another one precedes it in the same run. None: the run's `training`."""

    def __post_init__(self) -> None:
        settings.check(
            "onestep",
            self,
            positive=("critic_rate", "student_rate", "scale_rate", "critic_updates", "measured"),
            not_negative=("critic_warmup", "upkeep"),
            shares=("upkeep_share", "renoised"),
        )
        if self.measured == 1:
            raise UserError("onestep.measured: 1 sample has no distance; give at least 2")
        if not 0 <= self.start < 1:
            raise UserError(f"onestep.start: {self.start} must be at least 0 (noise) and below 1 (data)")

    @property
    def has_ratio(self) -> bool:
        """Whether the critic contains a ratio network."""
        return self.method == "ratio" or self.score.adversarial > 0

    @property
    def reads_data(self) -> bool:
        """Whether critic or generator learn from the images, and not only from their labels."""
        return self.has_ratio or self.renoised > 0

    def kept(self, batch: int, rank: int) -> int:
        """Images of a batch that the upkeep is of; none where a generator of rank `rank` leaves all else as it is."""
        return count_of(self.upkeep_share * bool(self.upkeep) * (rank == 0), batch)


class OneStepDraws(NamedTuple):
    """The randomness of one batch of B samples and of their comparison with data."""

    eps: Float[Tensor, "B N D"]
    renoised: Bool[Tensor, " B"]
    """Which inputs of the generator are noised data …"""
    s: Float[Tensor, " B"]
    """… and the times of all: t₀, except for those."""
    mirrored: Bool[Tensor, " B"]
    unlabelled: Bool[Tensor, " B"]
    ratio: NoiseDraws
    """Levels and noise for the ratio network …"""
    score: NoiseDraws
    """… for the scores …"""
    kept: NoiseDraws
    """… and for the denoiser's upkeep."""
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

    renoised = uniform() < options.renoised
    return OneStepDraws(
        eps=torch.randn(shape, generator=rng, device=rng.device),
        renoised=renoised,
        s=options.start + (1 - options.start) * torch.where(renoised, uniform(), 0.0),
        mirrored=(uniform() < 0.5) & bool(objective.flip),
        unlabelled=uniform() < objective.label_dropout,
        ratio=draw_noise(options.ratio.time, options.ratio.t_max, shape, rng),
        score=draw_noise(options.score.time, options.score.t_max, shape, rng),
        kept=draw_noise(objective.time, 1.0, shape, rng),
        offset=draw_offset(objective, batch, rng),
        span=Span(0, batch, batch),
    )


class Critic(nn.Module):
    """What a one-step generator learns from: a ratio network, a student denoiser or change of one, or both."""

    def __init__(self, ratio: RatioNet | None, student: Network | Jump | None) -> None:
        super().__init__()
        self.ratio = ratio
        self.student = student
        self.levels = Levels()


def critic_loss(
    critic: Critic,
    generator: Network,
    teacher: Network,
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
        z = teacher.encode(augmented(x, draws, objective)) if options.reads_data else None
        fake = _samples(generator, z, labels, draws)
    return _learn(critic, teacher, z, fake, labels, draws, options)


def one_step_loss(
    critic: Critic,
    generator: Network,
    teacher: Network,
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    draws: OneStepDraws,
    options: OneStep,
    objective: SelfDistillation,
) -> Losses:
    """The loss of critic and generator, from whose backward pass each receives the gradient of its own; and the upkeep.

    Terms: `ratio`, `calibrated`, `ratio_penalty` or `student` of the critic; `decoding`, `encoding` and `denoiser` of
    the upkeep. The generator's loss is a mean over values, like all losses. The teacher receives no gradient.
    """
    labels, image = _labels(generator, y, draws), augmented(x, draws, objective)
    count = options.kept(draws.span.batch, generator.config.jump_rank)
    with torch.no_grad():
        z = teacher.encode(image) if options.reads_data or count else None
    learned = _learn(critic, teacher, z, _samples(generator, z, labels, draws), labels, draws, options)
    kept = draws.span.spread(count, x.device)
    if z is None or not len(kept):
        return learned
    of_batch = len(kept) / count
    of_kept = image[kept], z[kept], None if labels is None else labels[kept], draws.kept.t[kept], draws.kept.eps[kept]
    terms = _upkeep(generator, teacher, *of_kept, objective)
    errors = {name: of_batch * error for name, error in terms.items()}
    told, total = {name: error.detach() for name, error in errors.items()}, torch.stack([*errors.values()]).sum()
    return learned._replace(parts=learned.parts | told, balanced={"upkeep": (options.upkeep, total)})


def _samples(
    generator: Network, z: Float[Tensor, "B N D"] | None, labels: Int64[Tensor, " B"] | None, draws: OneStepDraws
) -> Float[Tensor, "B N D"]:
    """Samples from noise or, where draws say so, from noised data z."""
    source = torch.zeros_like(draws.eps) if z is None else torch.where(draws.renoised[:, None, None], z, 0.0)
    return generator.generate(noised(Linear(), source, draws.eps, per_token(draws.s)), draws.s, labels)


def _learn(
    critic: Critic,
    teacher: Network,
    z: Float[Tensor, "B N D"] | None,
    fake: Float[Tensor, "B N D"],
    labels: Int64[Tensor, " B"] | None,
    draws: OneStepDraws,
    options: OneStep,
) -> Losses:
    """The critic's loss on data z and samples, which receive the gradient of the generator's if they require one."""
    total, parts = torch.zeros((), device=fake.device), dict[str, Tensor]()
    if critic.ratio is not None:
        assert z is not None
        ratio, span = options.ratio, draws.span
        penalised = min(
            count_of(ratio.penalty_share * bool(ratio.penalty), span.batch), span.batch - 1
        )  # the rest teaches
        weight = 1.0 if critic.student is None else options.score.adversarial
        loss, parts = ratio_loss(
            critic.ratio.logit,
            z,
            _with_gradient(fake, weight),
            labels,
            draws.ratio,
            ratio,
            scale=critic.ratio.scale if ratio.calibrated else None,
            levels=critic.levels,
            penalised=span.spread(penalised, z.device),
            share=penalised / span.batch,
        )
        total = total + loss
    if critic.student is not None:
        denoise = with_guidance(teacher.denoise, options.score.guidance, teacher.config.classes)
        normalised = options.method == "dmd"
        student = critic.student
        own = partial(teacher.generate_with, student) if isinstance(student, Jump) else student.denoise
        error, gradient = distillation(denoise, own, fake, labels, draws.score, normalised=normalised)
        total, parts = total + error, {**parts, "student": error.detach()}
        if gradient is not None:
            total = total + (gradient * fake).mean()
    share = draws.span.share
    return Losses(share * total, {name: share * part for name, part in parts.items()})


def _with_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with `factor` times its gradient."""
    return x if factor == 1 else factor * x + (1 - factor) * x.detach()


def _upkeep(
    generator: Network,
    teacher: Network,
    image: Float[Tensor, "K C H W"],
    z: Float[Tensor, "K N D"],
    labels: Int64[Tensor, " K"] | None,
    t: Float[Tensor, " K"],
    eps: Float[Tensor, "K N D"],
    objective: SelfDistillation,
) -> dict[str, Float[Tensor, ""]]:
    """Errors of what the network does besides generating, by name; without a codec in it, of denoising alone."""
    z_t = noised(Linear(), z, eps, per_token(t))
    with torch.no_grad():
        wanted = teacher.denoise(z_t, t, labels)
    if not generator.shares_codec:
        return {"denoiser": (generator.denoise(z_t, t, labels) - wanted).square().mean()}
    x_hat, z_hat = generator.decode_and_denoise(z, z_t, t, labels)
    return {
        "decoding": reconstruction_error(x_hat, image, objective.reconstruction),
        "encoding": (generator.encode(image) - z).square().mean(),
        "denoiser": (z_hat - wanted).square().mean(),
    }


def count_of(share: float, batch: int) -> int:
    """Images in a share of a batch: at least one unless the share is 0."""
    return max(1, round(share * batch)) if share else 0


def _labels(generator: Network, y: Tensor, draws: OneStepDraws) -> Int64[Tensor, " B"] | None:
    """Labels, some of them replaced by "no class"; the same for data and samples."""
    classes = generator.config.classes
    return y.masked_fill(draws.unlabelled, classes) if classes else None
