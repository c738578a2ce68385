"""The configuration of a run: frozen dataclasses, all of it written into the run's `config.json`.

Every length and interval is counted in images seen, so that changing the batch changes nothing else.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from tyro.conf import Suppress

from onefold import settings
from onefold.errors import UserError
from onefold.networks.base import NetworkConfig
from onefold.objectives.density_ratio import DensityRatio
from onefold.objectives.score_distillation import ScoreDistillation
from onefold.objectives.self_distillation import SelfDistillation
from onefold.objectives.two_stages import TwoStages
from onefold.sampling import Sampler

__all__ = ["Config", "DataConfig", "OneStep", "TrainingConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: str = "digits"
    """`digits`, or the path of an image folder, .zip, .npz or .parquet file."""
    test: str | None = None
    """Images for evaluation alone. Without it, `holdout` of the source is set apart from training."""
    holdout: float = 0.05
    unreadable: Annotated[Literal["refuse", "skip"], Suppress] = "refuse"  # --unreadable on the command line
    workers: int = 2
    """Threads that decode images of a source too large for memory."""

    def __post_init__(self) -> None:
        settings.check("data", self, not_negative=("workers",))
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout: {self.holdout} is not between 0 and 1; 0.05 sets 5 % apart for evaluation")


@dataclass(frozen=True)
class TrainingConfig:
    """How the network is trained."""

    images: int = 64_000
    """Length of the run."""
    batch: int = 64
    """Images for each optimiser step, however they are split up."""
    micro_batch: int | None = None
    """Images for each forward and backward pass; smaller ones need less memory. None: the whole batch."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """AdamW's."""
    muon_rate: float = 0.02
    """Muon's, for the matrices of the trunk's blocks."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: int = 4_000
    decay: float = 0.5
    """Share of the run, at its end, over which the learning rate falls."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    final_rate: float = 0.0
    """What the learning rate falls to, as a share of its peak."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""
    ema_half_lives: tuple[int, ...] = (4_000,)
    """An average of the weights for each. The first is the objective's target; the last is the published model."""
    ema_ramp: float = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; norms, losses, parameters and averages are float32 in any case."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the blocks with torch.compile, which takes half a minute. auto: for long runs, where it can be done."""
    device: str = "auto"
    seed: int = 0
    log_every: int = 3_200
    health_every: int = 6_400
    """Images between two measurements of health, each of which takes about as long as a step (see docs/training.md)."""
    on_collapse: Annotated[Literal["warn", "stop", "ignore"], Suppress] = "warn"  # --on-collapse on the command line
    """When the latents have collapsed: say so, or stop with exit code 3 after a checkpoint, or only log it."""
    sample_every: int = 16_000
    checkpoint_every: int = 16_000
    keep_last: int = 2
    """Checkpoints to keep; older ones are deleted …"""
    keep_every: int = 0
    """… but for those at multiples of this many images (0: none)."""

    def __post_init__(self) -> None:
        lengths = ("images", "batch", "log_every", "health_every", "sample_every", "checkpoint_every", "keep_last")
        settings.check(
            "training",
            self,
            positive=(*lengths, "learning_rate", "muon_rate", "clip"),
            not_negative=("warmup", "weight_decay", "ema_ramp", "keep_every"),
            shares=("decay", "final_rate", "betas"),
        )
        if max(self.betas) == 1:
            raise UserError(f"training.betas: {self.betas} must both be below 1")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise UserError(f"training.micro_batch: {self.micro_batch} is not within 1 to the batch, {self.batch}")
        if not self.ema_half_lives or min(self.ema_half_lives) < 1:
            raise UserError("training.ema_half_lives: give at least one positive number of images")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"training.seed: {self.seed} is out of range; give an integer from 0 to about 9e18")


Weights = Literal["teacher", "random", "trunk", "ends"]
"""Where weights start: all from the teacher, none, those of trunk and modulation alone, or all but those."""


@dataclass(frozen=True)
class OneStep:
    """How a trained denoiser, the teacher, becomes a one-step generator.

    The critic is what the generator learns from: a ratio network, or a student that learns the generator's score.
    """

    teacher: Annotated[str, Suppress] = ""  # the first argument of the command
    """The run that it begins from; its model is copied into this one."""
    method: Annotated[Literal["ratio", "score", "dmd"], Suppress] = "ratio"  # --method
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
    """Learning rate of the critic; that of the generator is `training.learning_rate`."""
    critic_updates: int = 1
    """Critic updates, each on a batch of its own, for each update of the generator."""
    critic_warmup: int = 6_000
    """Images that the critic learns from before the generator moves."""
    codec_share: float = 0.25
    """Share of the batch on which encoder and decoder, which are the same network, are kept as they were …"""
    codec_weight: float = 1.0
    """… and the weight of that."""
    renoised: float = 0.0
    """Share of the generator's inputs that are noised data instead of noise, which teaches it a few steps as well."""
    selection: int = 1000
    """Samples of the small measurement that chooses the published checkpoint; 0 publishes the last."""
    features: str | None = None
    """File of the feature extractor that it measures with (.safetensors, .pt or .onnx). None: a small classifier of the
    data, which is trained on the CPU first; for large images give another."""

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


@dataclass(frozen=True)
class Config:
    """A run, wholly. `onefold.recipe(name)` makes one; `with_changes` adapts it."""

    recipe: Annotated[str, Suppress] = "digits"
    """Name of the recipe that it comes from."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: SelfDistillation = field(default_factory=SelfDistillation)
    stages: TwoStages = field(default_factory=TwoStages)
    """Of three networks alone."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: Sampler = field(default_factory=Sampler)
    """What `sample` and `evaluate` use unless told otherwise."""
    onestep: Annotated[OneStep | None, Suppress] = None  # made by `onefold onestep`
    """Of a run that makes a one-step generator, which is trained by this and not by the objective above."""

    def __post_init__(self) -> None:
        options = self.onestep
        if options is None:
            return
        if options.critic_warmup >= self.training.images:
            raise UserError(
                f"onestep.critic_warmup: {options.critic_warmup:,} images leave none of {self.training.images:,} for "
                "the generator; give a shorter warm-up or more --images"
            )
        if self.network.kind.learns_codec and (options.generator, options.generator_trains) != ("teacher", "all"):
            raise UserError(
                "onestep.generator: with other weights than the teacher's its decoder would be lost; begin from a run "
                "in pixels (--architecture pixels)"
            )

    def with_changes(self, changes: dict[str, Any]) -> Self:
        """A copy with changed settings, e.g. {"training.batch": 32}; unknown names raise a UserError."""
        return settings.override(self, changes)
