"""The training state: everything that a step reads and changes, by name.

Random numbers are not part of it: a step draws them from a generator seeded with (seed, images, rollbacks), and the
order of the data is a function of (seed, images).
"""

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold.compute import compile_blocks
from onefold.data import Dataset
from onefold.errors import UserError, reason
from onefold.networks import Network, build
from onefold.networks.trunk import Trunk
from onefold.training.config import Config
from onefold.training.engine import ranks
from onefold.training.log import Window
from onefold.training.phases import Phase, phases_of
from onefold.training.sharding import origin, shard, whole

__all__ = ["Counters", "Skips", "TrainingState", "seeded"]


@dataclass
class Counters:
    """Counters kept during a run."""

    images: int = 0
    """Images seen, the run's clock."""
    phase: int = 0
    """Index of the phase that modules and optimizers belong to."""
    skipped: int = 0
    """Steps skipped because the loss or its gradient was not finite, as of the last `TrainingState.read_skips` …"""
    skipped_in_row: int = 0
    """… and how many of them were the most recent steps, without a good one in between."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint after too many skipped steps in a row."""
    best: float | None = None
    """If a monitor selects what is published: the smallest distance measured in this phase …"""
    best_images: int = 0
    """… and when."""


class Skips:
    """Counts skipped steps on the device, so that no step makes the host wait for it."""

    def __init__(self, device: torch.device, total: int = 0, in_row: int = 0) -> None:
        self.total = torch.full((), total, device=device)  # filled there, rather than copied from the host
        self.in_row = torch.full((), in_row, device=device)
        self.last = torch.full((), False, device=device)

    def count(self, skipped: Bool[Tensor, ""], *, whole: bool = True) -> None:
        """Count a step, taken or skipped; one without a turn of every part (not `whole`) does not end a row."""
        self.last.copy_(skipped)  # in place, as all of a step that is recorded (see `graphs`)
        self.total += skipped
        self.in_row.copy_(torch.where(skipped, self.in_row + 1, 0 if whole else self.in_row))


@dataclass
class TrainingState:
    """Everything that a step reads and changes; `Phase.modules` defines the modules."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, list[Optimizer]]
    """Optimizers of each trained module, by its name."""
    skips: Skips
    counters: Counters = field(default_factory=Counters)
    window: Window = field(default_factory=Window)
    """The values that the next log line averages."""
    shapes: dict[str, nn.Module] = field(default_factory=dict)
    """Where modules are sharded, each of them as shapes alone."""

    @classmethod
    def fresh(
        cls, config: Config, device: torch.device, network: Network | None = None, data: Dataset | None = None
    ) -> "TrainingState":
        """The state at the beginning of the run's first phase.

        Args:
            config: The run.
            device: Where it is trained.
            network: The weights to start from; not modified. Default: random ones from the run's seed, drawn on the CPU
                and thus the same on every device.
            data: What the first phase adapts the network to; default: it is not adapted.
        """
        group = ranks()
        with seeded(config.training.seed):
            with origin():
                network = build(config.network) if network is None else copy.deepcopy(network)
            place = torch.device("cpu" if group.first else "meta") if group.shards else device
            state = cls({"network": network.to(place)}, {}, Skips(device))
            first = phases_of(config)[0]
            if data is not None and (group.first or not group.shards):
                first.adapt(state.network, data)
            state._fill(first)
        return state

    def enter(self, phase: Phase) -> None:
        """Become the initial state of a phase, starting from the network published so far."""
        with seeded(phase.config.training.seed):
            self._fill(phase)

    def _fill(self, phase: Phase) -> None:
        if self.shapes:
            network = self.whole([self.published_name], torch.device("cpu")).published
        else:
            network = self.published.to(self.network.device)
        self.modules = self._modules(phase, network)
        for module in self.modules.values():
            if isinstance(module, Network):
                module.sampler = phase.sampler
            for part in module.modules():
                if isinstance(part, Trunk):
                    part.recomputes = phase.config.training.recompute
        if ranks().shards:
            self.shapes = {name: shard(module, self.device) for name, module in self.modules.items()}
        trained = {trained.name: trained for part in phase.parts for trained in part.trains}
        self.optimizers = {name: each.optimizers(self.modules[name]) for name, each in trained.items()}
        self.counters.phase, self.counters.best, self.counters.best_images = phase.index, None, 0

    def _modules(self, phase: Phase, network: Network) -> dict[str, nn.Module]:
        try:
            with origin():
                return phase.modules(network)
        except (NotImplementedError, RuntimeError) as error:
            if network.device.type != "meta":
                raise
            cure = "make them without, or leave --engine fsdp out"
            raise UserError(
                f"phase {phase.name!r}: its modules are made with values, which only the first rank has "
                f"({reason(error)}); {cure}"
            ) from error

    def whole(self, names: Iterable[str] | None = None, device: torch.device | None = None) -> "TrainingState":
        """The state with these modules whole in the first rank, to be measured there; default: all, on its device.

        Where nothing is sharded, the state itself. Every rank has to call it.
        """
        if not self.shapes:
            return self
        there = self.device if device is None else device
        chosen = self.modules if names is None else names
        found = {name: whole(self.modules[name], self.shapes[name], there) for name in chosen}
        return replace(self, modules={**self.modules, **found})

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.skips.total.device

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self._network("network")

    @property
    def averages(self) -> list[Network]:
        """Its averages, in order."""
        count = sum(name.startswith("average-") for name in self.modules)
        return [self._network(f"average-{k}") for k in range(count)]

    @property
    def published(self) -> Network:
        """The network that is saved as the run's model, sampled and evaluated."""
        return self._network(self.published_name)

    @property
    def published_name(self) -> str:
        """The best, or else the last average."""
        if self.counters.best is not None:
            return "best"
        return f"average-{len(self.averages) - 1}" if self.averages else "network"

    def _network(self, name: str) -> Network:
        module = self.modules[name]
        assert isinstance(module, Network)
        return module

    def compile(self, phase: Phase) -> None:
        """Compile all blocks that the phase's steps use, in place."""
        for name in sorted({name for part in phase.parts for name in part.modules}):
            compile_blocks(self.modules[name], dynamic=False)

    def read_skips(self) -> int:
        """Update the counters of skipped steps and return the number in a row; makes the host wait."""
        counts = torch.stack([self.skips.total, self.skips.in_row]).tolist()
        self.counters.skipped, self.counters.skipped_in_row = counts
        return self.counters.skipped_in_row

    def seed(self, seed: int) -> int:
        """Seed of the next step's random numbers, in a run with this seed."""
        key = np.random.SeedSequence([seed, self.counters.images, self.counters.rollbacks])
        return int(key.generate_state(1, np.uint64)[0] >> 1)

    def rng(self, seed: int, device: torch.device) -> torch.Generator:
        """The source of the next step's random numbers."""
        return torch.Generator(device).manual_seed(self.seed(seed))


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Seed torch's random numbers on the CPU; afterwards they continue as if nothing had happened.

    Those of other devices are left alone, which `torch.manual_seed` would seed, too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
