"""The configuration of a run: frozen dataclasses, all of it written into the run's `config.json`.

Every length and interval is counted in images seen, so that changing the batch changes nothing else.
"""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from tyro.conf import Suppress

from onefold import settings
from onefold.errors import UserError
from onefold.networks import NetworkConfig
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
    """Images for evaluation alone. Without it, the test part of the source, or else `holdout` of it, set apart from
    training."""
    holdout: float = 0.05
    unreadable: Annotated[Literal["refuse", "skip"], Suppress] = "refuse"  # --unreadable on the command line
    labels_from: Annotated[str | None, Suppress] = None  # --labels-from on the command line
    """Where the labels are, if it is not clear; see `open_dataset`."""
    workers: int = 2
    """Threads that decode images of a source too large for memory."""
    mirrored: Annotated[str, Suppress] = ""  # a fact about a recipe's own data; --objective.flip decides for others
    """The name of a recipe's own data set, if its images mean the same mirrored left to right. Of others nobody knows:
    letters do not. Empty: none."""

    def __post_init__(self) -> None:
        settings.check("data", self, not_negative=("workers",))
        if not 0 < self.holdout < 1:
            raise UserError(f"data.holdout: {self.holdout} is not between 0 and 1; 0.05 sets 5 % apart for evaluation")

    @property
    def may_be_mirrored(self) -> bool:
        """Whether the source is the recipe's own data set, wherever its file lies, and means the same mirrored."""
        return bool(self.mirrored) and PurePath(self.source).name == self.mirrored


@dataclass(frozen=True)
class TrainingConfig(Schedule):
    """How the network is trained: the schedule, and how it is carried out."""

    batch: int = 64
    """Images for each optimizer step, however they are split up."""
    micro_batch: int | None = None
    """Images for each forward and backward pass; smaller ones need less memory. None: the whole batch."""
    precision: Precision = "auto"
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
    """… except those at multiples of this many images (0: none)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        intervals = ("log_every", "health_every", "sample_every", "checkpoint_every")
        settings.check("training", self, positive=("batch", *intervals, "keep_last"), not_negative=("keep_every",))
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch:
            raise UserError(f"training.micro_batch: {self.micro_batch} is not within 1 to the batch, {self.batch}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"training.seed: {self.seed} is out of range; give an integer from 0 to about 9e18")


@dataclass(frozen=True)
class Config:
    """A run, wholly. `onefold.recipe(name)` makes one; `with_changes` adapts it."""

    recipe: Annotated[str, Suppress] = "digits"
    """Name of the recipe that it comes from."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    phases: tuple[str, ...] = ()
    """What the network is trained by, one after the other: names of `training.phases.PHASES`. None: those that the
    architecture goes through."""
    objective: SelfDistillation = field(default_factory=SelfDistillation)
    stages: TwoStages = field(default_factory=TwoStages)
    """Of the phases `autoencoder` and `diffusion`, which three networks go through."""
    onestep: Annotated[OneStep, Suppress] = field(default_factory=OneStep)  # its options are those of `onefold onestep`
    """Of the phase `one_step`."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampler: Sampler = field(default_factory=Sampler)
    """What `sample` and `evaluate` use unless told otherwise."""
    start: Annotated[str, Suppress] = ""  # --from on the command line, and the argument of `onefold onestep`
    """The run or saved network whose weights the first phase begins with. Empty: random weights."""
    start_sha256: Annotated[str, Suppress] = ""
    """Of that network's `model.safetensors`."""

    def with_changes(self, changes: dict[str, Any]) -> Self:
        """A copy with changed settings, e.g. {"training.batch": 32}; unknown names raise a UserError."""
        return settings.override(self, changes)
