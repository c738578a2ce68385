"""One-step runs so small that a step takes milliseconds, and what can be compared between two of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import randomised
from helpers_runs import batch, newest, tiny
from onefold.networks.base import Network, build
from onefold.objectives.one_step import Critic, OneStepDraws
from onefold.training.config import Config
from onefold.training.conversion import converted, one_step_config
from onefold.training.phases import Part, phases_of
from onefold.training.state import TrainingState
from onefold.training.step import accumulate

SMALL = {
    "onestep.method": "ratio",
    "training.images": 160,
    "training.learning_rate": 1e-3,
    "training.ema_half_lives": (32, 64),
    "onestep.critic_warmup": 32,
    "onestep.critic_rate": 1e-3,
    "onestep.measured": 64,
    "onestep.selects": True,
}


digits = functools.cache(batch)
"""The same images and labels again and again; nobody writes into them."""


def one_step(rank: int = 0, **changes: Any) -> Config:
    """Ten steps of 16 digits, in the first two of which the critic learns alone; all weights learn at rank 0."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    small = {name: value for name, value in SMALL.items() if name != "onestep.critic_rate" or not rank}
    return one_step_config(tiny(), rank=rank).with_changes(small | named)


def one_step_from(folder: Path, rank: int = 0, **changes: Any) -> Config:
    """The same of a run in a folder."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return converted(folder, rank=rank).with_changes({"training.precision": "float32"} | SMALL | named)


def teacher_for(config: Config, seed: int = 1) -> Network:
    """A network whose weights are all random and none of them zero, as a run gives out its teacher."""
    return randomised(build(config.network), seed).requires_grad_(False).eval()


def begun(config: Config, teacher: Network | None = None) -> TrainingState:
    return TrainingState.fresh(config, torch.device("cpu"), teacher or teacher_for(config))


def teacher_of(state: TrainingState) -> Network:
    teacher = state.modules["teacher"]
    assert isinstance(teacher, Network)
    return teacher


def critic_of(state: TrainingState) -> Critic:
    critic = state.modules["critic"]
    assert isinstance(critic, Critic)
    return critic


def parts_of(state: TrainingState, config: Config) -> tuple[Part, Part]:
    """The critic's part of a step, and that of critic and generator together."""
    critic, both = phases_of(config)[state.counters.phase].parts
    assert [[trained.name for trained in part.trains] for part in (critic, both)] == [["critic"], ["critic", "network"]]
    return critic, both


def drawn(state: TrainingState, config: Config, seed: int = 0, count: int = 16) -> OneStepDraws:
    """The randomness of a batch."""
    draws = parts_of(state, config)[1].draw(count, torch.Generator().manual_seed(seed))
    assert isinstance(draws, OneStepDraws)
    return draws


Gradient = Callable[[TrainingState, Tensor, Tensor, OneStepDraws, Config], dict[str, Tensor]]


def critic_gradient(
    state: TrainingState, x: Tensor, y: Tensor, draws: OneStepDraws, config: Config
) -> dict[str, Tensor]:
    """Add the gradient of the critic's loss to what it trains; what the loss tells."""
    return accumulate(state, parts_of(state, config)[0], x, y, draws, config.training)


def both_gradients(
    state: TrainingState, x: Tensor, y: Tensor, draws: OneStepDraws, config: Config
) -> dict[str, Tensor]:
    """The same for critic and generator together."""
    return accumulate(state, parts_of(state, config)[1], x, y, draws, config.training)


def newest_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a one-step run: its newest checkpoint, the teacher in it, its model and its ratio network."""
    ratio = (folder / "ratio").glob("*.safetensors")
    return newest(folder) | {f"{path.parent.name} {k}": v for path in ratio for k, v in load_file(path).items()}
