"""CUDA graphs: a step is recorded once, and from then on the GPU repeats it by itself.

A small network's step is thousands of short operations, each of which the host has to start: it is then the host that
sets the speed. Since no number of a step passes between host and device (`step.take_turn`), the whole of it can be
recorded: draws, losses, gradients, optimizers and averages. What changes from step to step lies on the device, and is
filled in before: images and labels, learning rates, renewals of averages, and the seed of the random numbers, so a
repeated step draws what it would have drawn.

There is a recording for each set of parts that take turns, by one process alone: gloo cannot be recorded. Its first
steps run as usual: they compile, create the optimizers' states and let libraries choose their algorithms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.training.config import Config, TrainingConfig
from onefold.training.engine import ranks
from onefold.training.optimizer import keep_rates_on
from onefold.training.phases import Part, Say
from onefold.training.state import TrainingState
from onefold.training.step import Turn, set_rates_of, take_turn

__all__ = ["Graphs", "check_graphs", "recorded"]

USUAL = 3
"""Steps of each kind that run as usual before one is recorded."""


Step = Callable[[TrainingState, Tensor, Tensor, Config], dict[str, Tensor]]
Kind = tuple[tuple[Part, ...], bool]
"""Parts that take part, and whether they train all that has begun (`Turn.whole`)."""


@dataclass
class Recording:
    """A recorded step, with what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    rng: torch.Generator
    x: Tensor
    y: Tensor
    renewals: list[Tensor]
    names: list[str]
    values: Tensor


class Graphs:
    """The recorded steps of a state, whose modules, optimizers and counts of skips must stay the same objects."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._usual: dict[Kind, int] = {}
        self._recorded: dict[Kind, Recording] = {}
        self._stream = torch.cuda.Stream(device)  # one for all: what backward passes reuse is bound to a stream
        self._pool = torch.cuda.graph_pool_handle()

    def step(self, state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
        """As `step.training_step`, of which it is the same computation."""
        with torch.cuda.device(self._device):
            return self._step(state, x, y, config)

    def _step(self, state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
        if not self._usual:
            for optimizers in state.optimizers.values():
                keep_rates_on(optimizers, x.device)
        turn, seed = Turn.at(state, config), state.seed(config.training.seed)
        kind = turn.parts, turn.whole
        usual = self._usual.get(kind, 0)
        set_rates_of(state, turn)
        if usual < USUAL:
            self._usual[kind] = usual + 1
            rng, renewals = torch.Generator(x.device).manual_seed(seed), _scalars(turn.renewals, x.device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                values = take_turn(state, turn, x, y, config.training, rng, renewals)
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            if kind not in self._recorded:
                self._recorded[kind] = self._record(state, turn, x, y, config)
            recording = self._recorded[kind]
            recording.x.copy_(x)
            recording.y.copy_(y)
            for own, renewal in zip(recording.renewals, turn.renewals, strict=True):
                own.fill_(renewal)
            recording.rng.manual_seed(seed)
            recording.graph.replay()
            values = dict(zip(recording.names, recording.values.clone().unbind(), strict=True))
        state.counters.images += turn.batch
        return values

    def _record(self, state: TrainingState, turn: Turn, x: Tensor, y: Tensor, config: Config) -> Recording:
        graph, rng = torch.cuda.CUDAGraph(), torch.Generator(x.device)
        graph.register_generator_state(rng)
        x, y = x.clone(), y.clone()
        renewals = _scalars(turn.renewals, x.device)
        torch.cuda.synchronize(x.device)
        # What other threads do meanwhile, such as those that read images, is not recorded, nor forbidden.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            found = take_turn(state, turn, x, y, config.training, rng, renewals)
            values = torch.stack(list(found.values()))
        return Recording(graph, rng, x, y, renewals, list(found), values)


def recorded(training: TrainingConfig, device: torch.device, say: Say) -> Step | None:
    """The steps of a run that wants graphs; None where they are as usual. It may go on where there are no graphs."""
    if training.graphs == "no":
        return None
    if _there(device):
        return Graphs(device).step
    say("training.graphs needs a CUDA GPU and one process: steps are taken as usual")
    return None


def check_graphs(training: TrainingConfig, device: torch.device) -> None:
    """Refuse graphs where there are none.

    Raises:
        UserError: naming the option.
    """
    if training.graphs == "yes" and not _there(device):
        raise UserError("training.graphs: needs a CUDA GPU, and one process; leave it at no")


def _there(device: torch.device) -> bool:
    return device.type == "cuda" and ranks().count == 1


def _scalars(values: Sequence[float], device: torch.device) -> list[Tensor]:
    """Scalars on the device, filled there: a copy would make the host wait."""
    return [torch.full((), value, device=device) for value in values]
