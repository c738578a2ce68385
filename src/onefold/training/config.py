"""The configuration of a run: frozen dataclasses, written in full to the run's `config.json`.

Every length and interval is counted in images seen, so that changing the batch changes nothing else.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from tyro.conf import Suppress, arg

from onefold import settings
from onefold.errors import UserError
from onefold.networks import NetworkConfig
from onefold.objectives.one_run import OneRun
from onefold.objectives.one_step import OneStep
from onefold.objectives.self_distillation import SelfDistillation
from onefold.objectives.two_stages import TwoStages
from onefold.sampling import Sampler
from onefold.schedule import Schedule
from onefold.settings import Precision

__all__ = ["Config", "DataConfig", "TrainingConfig"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    source: str = "digits"
    """`digits`, or the path of a folder or file that holds images."""
    test: str | None = None
    """Images used only for evaluation. Without it, the test split of the source, or else a fraction `holdout` of it,
    held out from training."""
    holdout: float = 0.05
    unreadable: Annotated[Literal["refuse", "skip"], Suppress] = "refuse"  # --unreadable on the command line
    labels_from: Annotated[str | None, Suppress] = None  # --labels-from on the command line
    """Where the labels are, if it is not clear; see `open_dataset`."""
    workers: int = 2
    """Threads that decode images of a source too large for memory."""
    mirrored: Annotated[str, Suppress] = ""  # a fact about a recipe's own data; --objective.flip decides for others
    """Name of a recipe's own data set, if its images keep their meaning when mirrored left to right. For other data
    this is unknown: letters do not. Empty: none."""

    def __post_init__(self) -> None:
        settings.check("data", self, not_negative=("workers",))
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout: {self.holdout} is not between 0 and 1; 0.05 holds out 5 % for evaluation")

    @property
    def may_be_mirrored(self) -> bool:
        """Whether the source is the recipe's own data set, wherever its file lies, and may be mirrored."""
        return bool(self.mirrored) and PurePath(self.source).name == self.mirrored


@dataclass(frozen=True)
class TrainingConfig(Schedule):
    """How the network is trained: the schedule, and how it is carried out."""

    batch: int = 64
    """Images per optimizer step, however they are split up."""
    micro_batch: int | None = None
    """Images per forward and backward pass; fewer need less memory. None: the whole batch."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping what is inside it: less memory, more time."""
    precision: Precision = "auto"
    """Of matrix products; norms, losses, parameters and averages are always float32. tf32: on NVIDIA GPUs only."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the blocks with torch.compile, which takes half a minute. auto: for long runs, where supported."""
    graphs: Literal["yes", "no"] = "no"
    """Record each kind of step as a CUDA graph and repeat it: for small networks, whose host is slower than the GPU."""
    device: str = "auto"
    seed: int = 0
    log_every: int = 3_200
    health_every: int = 6_400
    """Images between measurements of health, each of which takes about as long as a step (see docs/training.md)."""
    on_collapse: Annotated[Literal["warn", "stop", "ignore"], Suppress] = "warn"  # --on-collapse on the command line
    """When the latents have collapsed: warn, stop with exit code 3 after a checkpoint, or only log it."""
    sample_every: int = 16_000
    checkpoint_every: int = 16_000
    keep_last: int = 2
    """Checkpoints to keep; older ones are deleted …"""
    keep_every: int = 0
    """… except those at multiples of this many images (0: none)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        intervals = ("log_every", "health_every", "sample_every", "checkpoint_every")
        settings.check("training", self, positive=("batch", *intervals, "keep_last"), not_negative=("keep_every",))
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise UserError(f"training.micro_batch: {self.micro_batch} is not between 1 and the batch, {self.batch}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"training.seed: {self.seed} is out of range; give an integer from 0 to about 9e18")


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run. `onefold.recipe(name)` creates one; `with_changes` adapts it."""

    recipe: Annotated[str, Suppress] = "digits"
    """Name of the recipe that it is based on."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    phases: Annotated[tuple[str, ...], arg(help_behavior_hint="")] = ()
    """Training phases, in order: names in `training.phases.PHASES`. Empty: the architecture's own."""
    objective: SelfDistillation = field(default_factory=SelfDistillation)
    stages: TwoStages = field(default_factory=TwoStages)
    """Settings of the phases `autoencoder` and `diffusion`, which train three networks."""
    onestep: Annotated[OneStep, Suppress] = field(default_factory=OneStep)  # its options are those of `onefold onestep`
    """Settings of the phase `one_step`."""
    onerun: OneRun = field(default_factory=OneRun)
    """Settings of the phase `one_run` (--one-step)."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: Sampler = field(default_factory=Sampler)
    """Default sampler of `sample` and `evaluate`."""
    start: Annotated[str, Suppress] = ""  # --from on the command line, and the argument of `onefold onestep`
    """The run or saved network whose weights the first phase starts from. Empty: random weights."""
    start_sha256: Annotated[str, Suppress] = ""
    """SHA-256 of that network's `model.safetensors`."""

    def __post_init__(self) -> None:
        if self.sampler.paints:
            cure = "leave it out, and sample with it afterwards"
            raise UserError(f"sampler.solver: {self.sampler.solver!r} makes no latents for training to measure; {cure}")

    def with_changes(self, changes: dict[str, Any]) -> Self:
        """A copy with changed settings, e.g. {"training.batch": 32}; unknown names raise a UserError."""
        return settings.override(self, changes)
