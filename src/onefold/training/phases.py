"""Phases: a run is a list of them, and each defines what its steps train.

    self_distillation         encoder, denoiser and decoder together
    autoencoder, diffusion    the two stages of the baseline with three networks
    one_run                   encoder, denoiser, decoder and one-step generator together
    one_step                  critic and one-step generator

A phase starts from the network published by the previous one, with its own optimizers and averages. The phase of an
image depends only on the configuration, and what a phase starts with only on the state and the data, so a run resumed
at any image is bit-identical. A custom phase is a subclass that registers itself: `examples/own_objective.py` is one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold.data import Dataset
from onefold.errors import UserError
from onefold.networks import Network, build
from onefold.objectives.losses import Draws, Losses
from onefold.sampling import Sampler
from onefold.schedule import Schedule
from onefold.training import ema
from onefold.training.config import Config
from onefold.training.optimizer import build_optimizers

if TYPE_CHECKING:
    from onefold.training.monitor import Monitor
    from onefold.training.run import Run

__all__ = [
    "PHASES",
    "Part",
    "Phase",
    "Say",
    "Trained",
    "averaged",
    "check_parts_of",
    "in_batches",
    "length",
    "names_of_phases",
    "phase_at",
    "phases_of",
    "register",
    "training_flops",
]


Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A module that a part of a step trains, and how."""

    name: str
    """Its name in the state."""
    optimizers: Callable[[nn.Module], list[Optimizer]]
    """Its optimizers, at their peak rates (see `optimizer.set_rates`)."""
    schedule: Schedule
    """Rates, clipping and averages, from `start` on."""
    half_lives: tuple[int, ...] = ()
    """Half-lives of its averages, which are called average-0, average-1, …"""
    start: int = 0
    """Images of the phase at which its schedule begins."""
    norm: str = "gradient_norm"
    """Name of its gradient's norm in the log."""


@dataclass(frozen=True)
class Part:
    """One loss of a step, and the modules that it trains. Images are counted from the beginning of the phase."""

    trains: tuple[Trained, ...]
    reads: tuple[str, ...]
    """Names of the other modules that the loss reads."""
    draw: Callable[[int, torch.Generator], Draws]
    """(B, rng) → the randomness of a batch of B images."""
    loss: Callable[..., Losses]
    """(*trained modules, *those it reads, x, y, draws) → losses."""
    start: int = 0
    """Images before its first turn."""
    every: int = 1
    """It takes part in one step out of this many …"""
    unless: "Part | None" = None
    """… but not where this part does."""
    finish: Callable[[Mapping[str, nn.Module], Bool[Tensor, ""]], None] | None = None
    """Called with (modules, skipped) after its update, for anything updated once per step."""
    few: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Images of a batch that the loss or a term of it is of, where that is not all, by the option that says so."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the loss's modules, in order."""
        return (*(trained.name for trained in self.trains), *self.reads)

    def has_turn(self, images: int, batch: int) -> bool:
        """Whether it takes part in the step that begins after `images` images."""
        if self.unless is not None and self.unless.has_turn(images, batch):
            return False
        return images >= self.start and (images // batch + 1) % self.every == 0

    def updates(self, images: int, batch: int, since: int = 0) -> int:
        """Updates of what it trains since `since` images, the step that begins after `images` images included."""
        return max(0, (images // batch + 1) // self.every - -(-since // batch) // self.every)


class Phase(ABC):
    """A section of a run in which every step trains the same modules."""

    name: ClassVar[str]

    def __init__(self, config: Config, index: int, start: int) -> None:
        """Phase number `index` of a run, which begins after `start` images.

        Raises:
            UserError: settings that are invalid for it.
        """
        self.config = config
        self.index = index
        self.start = start
        self.schedule = self.schedule_of(config)

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """Its length, rates and averages."""
        return config.training

    @cached_property
    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """What a step trains, in this order."""

    def modules(self, network: Network) -> dict[str, nn.Module]:
        """Everything that its steps read and change, created from the network that it starts with.

        `network` is trained; `average-0`, `average-1`, … are its averages. What is published is `best`, if a monitor
        has selected one, else the last average, else `network`. Random weights come from torch's current seed.
        """
        return averaged(network, self.schedule)

    def published(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Modules saved alongside the published network, by folder name."""
        return {}

    def adapt(self, network: Network, data: Dataset) -> None:  # noqa: B027
        """Adapt the network that the phase starts with to the data; called once, before `modules`."""

    def optimizers(self, network: nn.Module) -> list[Optimizer]:
        """Optimizers of the network, with Muon's iterations in the precision of the run's matrix products."""
        assert isinstance(network, Network)
        bfloat16 = self.config.training.precision == "bfloat16"
        return build_optimizers(network, self.schedule, torch.bfloat16 if bfloat16 else torch.float32)

    @property
    def sampler(self) -> Sampler:
        """The sampler of its network: in the last phase the run's, before that a diffusion model's."""
        return self.config.sampler if self.index == len(names_of_phases(self.config)) - 1 else Sampler()

    def begin_from(self, source: Network) -> Network:
        """The network of this run with the weights of another. Where the classes differ, label vectors are those of the
        classes of the same name, and else random; the last row, "no class", means the same in both.

        Raises:
            UserError: a network whose other weights do not fit.
        """
        network = build(self.config.network)
        own, theirs = network.state_dict(), source.state_dict()
        fitting = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
        labels = {name for name in own if name.endswith("labels.weight")}
        missing = sorted((own.keys() ^ theirs.keys()) | (own.keys() - fitting.keys() - labels))
        missing = [name for name in missing if not name.startswith("jump")]  # a generator may begin anew
        if missing:
            cure = "give one of the same architecture, patch, width and channels"
            raise UserError(f"start: the weights do not fit this run's network ({missing[0]} differs); {cure}")
        ours, others = network.config.class_names, source.config.class_names
        if ours != others or labels - fitting.keys():
            rows = [(ours.index(name), others.index(name)) for name in ours if name in others]
            rows.append((-1, -1))
            for name in labels:
                fitting.pop(name, None)
                for row, other in rows:
                    own[name][row] = theirs[name][other]
        network.load_state_dict({**own, **fitting})
        return network

    @abstractmethod
    def monitors(self, run: "Run", data: Dataset, test: Dataset, device: torch.device, say: Say) -> Sequence["Monitor"]:
        """The phase's monitors, on training and test images; `say` is called before anything that takes long."""

    @abstractmethod
    def flops(self) -> float:
        """Arithmetic of a step per image: operations of matrix products, forward and backward."""


PHASES: dict[str, type[Phase]] = {}
"""Registered phases, by name."""

P = TypeVar("P", bound=type[Phase])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: register a phase under a name, for `Config.phases`.

    A class with the same module and name replaces an earlier one, so that a notebook cell can run twice.

    Raises:
        UserError: another phase has the name.
    """

    def add(kind: P) -> P:
        other = PHASES.get(name, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(f"phase {name!r}: is already registered; choose another name")
        PHASES[name] = kind
        kind.name = name
        phases_of.cache_clear()  # it may hold phases of the class that is replaced
        return kind

    return add


def names_of_phases(config: Config) -> tuple[str, ...]:
    """The phases of a run by name: those configured, or else the architecture's own."""
    return config.phases or config.network.kind.phases


@lru_cache(maxsize=32)
def phases_of(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, in order; each begins with a whole batch.

    Raises:
        UserError: a name that is not registered, settings that are invalid for a phase, or parts that contradict.
    """
    phases: list[Phase] = []
    start, batch = 0, config.training.batch
    for index, name in enumerate(names_of_phases(config)):
        if name not in PHASES:
            raise UserError(f"phases: {name!r} is not known; choose from {', '.join(PHASES)}")
        phase = PHASES[name](config, index, start)
        _check_parts(phase)
        phases.append(phase)
        start += in_batches(phase.schedule.images, batch)
    return tuple(phases)


def _check_parts(phase: Phase) -> None:
    """Refuse parts that train the same module with different optimizers: the state has one list for each module."""
    optimizers: dict[str, Callable[[nn.Module], list[Optimizer]]] = {}
    for trained in (trained for part in phase.parts for trained in part.trains):
        if optimizers.setdefault(trained.name, trained.optimizers) != trained.optimizers:
            raise UserError(
                f"phase {phase.name!r}: two parts train {trained.name!r} with different optimizers; "
                "give both the same function"
            )


def check_parts_of(config: Config, count: int) -> None:
    """Refuse a loss of few images of which some of `count` ranks would have none: sharded, all compute it together.

    Raises:
        UserError: naming the option that says how many, and what fits.
    """
    batch = config.training.batch
    for option, images in (item for phase in phases_of(config) for part in phase.parts for item in part.few.items()):
        if images % count:
            below, above = images // count * count, -(-images // count) * count
            fitting = " or ".join(f"{n / batch:g}" for n in (below, above) if n)
            raise UserError(
                f"{option}: {images} of {batch} images cannot be divided among {count} ranks, as --engine fsdp needs; "
                f"give {fitting}, or another training.batch"
            )


def phase_at(images: int, config: Config) -> Phase:
    """The phase of the step that begins after `images` images."""
    return [phase for phase in phases_of(config) if phase.start <= images][-1]


def in_batches(images: int, batch: int) -> int:
    """What a budget of images comes to: it ends with the step that reaches it."""
    return batch * -(-images // batch)


def length(config: Config) -> int:
    """Images of the whole run, those of its last step included."""
    last = phases_of(config)[-1]
    return last.start + in_batches(last.schedule.images, config.training.batch)


def training_flops(config: Config) -> float:
    """Arithmetic of training per image, averaged over the run."""
    batch = config.training.batch
    return sum(in_batches(phase.schedule.images, batch) * phase.flops() for phase in phases_of(config)) / length(config)


def averaged(network: Network, schedule: Schedule) -> dict[str, nn.Module]:
    """A trainable copy of a network, and averages of it."""
    trained = ema.trainable_copy(network)
    averages = {f"average-{k}": ema.average_of(trained) for k in range(len(schedule.ema_half_lives))}
    return {"network": trained, **averages}
