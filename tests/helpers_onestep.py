"""One-step runs so small that a step takes milliseconds, and what can be compared between two of them."""

import functools
from pathlib import Path
from typing import Any

import torch
from onefold.training.critic import Duel
from onefold.training.onestep import converted, onestep_of
from safetensors.torch import load_file
from torch import Tensor

from conftest import randomised
from helpers_runs import batch, newest, tensors, tiny
from onefold.networks.base import Network, build
from onefold.training.config import Config
from onefold.training.state import TrainingState

SMALL = {
    "training.images": 160,
    "training.learning_rate": 1e-3,
    "training.ema_half_lives": (32, 64),
    "onestep.critic_warmup": 32,
    "onestep.critic_rate": 1e-3,
    "onestep.selection": 40,
}


digits = functools.cache(batch)
"""The same images and labels again and again; nobody writes into them."""


def one_step(**changes: Any) -> Config:
    """Ten steps of 16 digits, in the first two of which the critic learns alone."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return onestep_of(tiny()).with_changes(SMALL | named)


def one_step_from(folder: Path, **changes: Any) -> Config:
    """The same of a run in a folder."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return converted(folder).with_changes({"training.precision": "float32"} | SMALL | named)


def teacher_for(config: Config, seed: int = 1) -> Network:
    """A network whose weights are all random and none of them zero, as a run gives out its teacher."""
    return randomised(build(config.network), seed).requires_grad_(False).eval()


def begun(config: Config, teacher: Network | None = None) -> TrainingState:
    return TrainingState.fresh(config, torch.device("cpu"), teacher or teacher_for(config))


def duel_of(state: TrainingState) -> Duel:
    assert state.duel is not None
    return state.duel


def everything(state: TrainingState) -> dict[str, Tensor]:
    """Every number that a step may change but the counters, copied; the teacher's too."""
    duel = duel_of(state)
    found = {f"critic.{key}": value for key, value in duel.critic.state_dict().items()}
    found |= {f"teacher.{key}": value for key, value in duel.teacher.state_dict().items()}
    for index, values in duel.optimizer.state_dict()["state"].items():
        found |= {f"critic optimizer.{index}.{key}": value for key, value in values.items()}
    return tensors(state) | {name: value.clone() for name, value in found.items()}


def newest_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a one-step run: its newest checkpoint, its model, its ratio network and its teacher."""
    others = [path for name in ("ratio", "teacher") for path in (folder / name).glob("*.safetensors")]
    return newest(folder) | {f"{path.parent.name} {k}": v for path in others for k, v in load_file(path).items()}
