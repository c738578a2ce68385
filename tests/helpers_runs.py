"""Runs so small that a step takes milliseconds, and what can be compared between two of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from onefold.data import open_dataset, read_all
from onefold.pixels import to_float
from onefold.recipes import recipe
from onefold.training import ema
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.pieces import Pieces
from onefold.training.state import TrainingState

TIMES = {"images_per_second", "peak_memory"}
"""What differs between two equal runs."""


def tiny(**changes: Any) -> Config:
    """Ten steps of 16 digits; logs at 32, 64, …, checkpoints at 48, 96, 144 and 160 images."""
    config = recipe(
        "digits",
        network={"width": 32, "depth": 1, "heads": 2},
        objective={"draws": 1},
        training={
            "images": 160,
            "batch": 16,
            "warmup": 32,
            "ema_half_lives": (32, 64),
            "log_every": 32,
            "health_every": 1_000_000,
            "sample_every": 1_000_000,
            "checkpoint_every": 48,
            "precision": "float32",
            "device": "cpu",
        },
        sampler={"steps": 2},
    )
    return config.with_changes({name.replace("__", "."): value for name, value in changes.items()})


def fresh(config: Config) -> TrainingState:
    return TrainingState.fresh(config, torch.device("cpu"))


def batch(count: int = 16, start: int = 0) -> tuple[Tensor, Tensor]:
    """Digits in [−1, 1] and their labels."""
    x, y = read_all(open_dataset("digits"), range(start, start + count))
    return to_float(x), y


def tensors(state: TrainingState) -> dict[str, Tensor]:
    """Every number that a step may change but the counters, copied."""
    found: dict[str, Tensor] = {}
    for name, module in state.modules.items():
        found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for name, optimizers in state.optimizers.items():
        for k, optimizer in enumerate(optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                found |= {f"optimizer of {name}.{k}.{index}.{key}": value for key, value in values.items()}
    return {name: value.clone() for name, value in found.items()}


def on_towards(state: TrainingState, seen: int, config: Config, steps: int = 1) -> dict[str, Tensor]:
    """What the averages become in `steps` steps that end at `seen` images and leave the weights as they are."""
    averages, training = [ema.average_of(average) for average in state.averages], config.training
    for k in reversed(range(steps)):
        for average, half_life in zip(averages, training.ema_half_lives, strict=True):
            survival = training.survival(half_life, seen - k * training.batch, training.batch)
            ema.update(average, state.network, 1 - survival)
    return {f"average-{k}.{name}": value for k, net in enumerate(averages) for name, value in net.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, or that only one has."""
    return [name for name in {**a, **b} if name not in a or name not in b or not torch.equal(a[name], b[name])]


def newest(folder: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint and of its published model, by file and name."""
    path, found = checkpoints(folder)[-1], dict[str, Tensor]()
    shards = json.loads((path / "state.json").read_text())["shards"]
    for stem in sorted({file.stem.removesuffix(f"-1-of-{shards}") for file in path.glob("*.safetensors")}):
        if "-of-" not in stem:
            pieces = Pieces(path, stem, shards)
            found |= {f"{path.name} {stem}.safetensors {name}": pieces.whole(name) for name in pieces.shapes}
    assert found
    model = load_file(folder / "model" / "model.safetensors")
    return found | {f"model model.safetensors {name}": value for name, value in model.items()}


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
