"""The cost of a training step as the network or the batch grows: tokens, width, depth, batch.

    python benchmarks/scaling.py --recipe digits --json-file docs/results/scaling.json

Starting from the recipe's settings, one size at a time grows by factors of two: tokens by a larger image with the same
patches, width with heads of the same width. All steps take turns (see `timing.py`). Next to the time are the counted
operations and the slope of log time against log size: 0 if a step costs nothing more, 1 if twice the size takes twice
as long; attention grows with the square of tokens, matrices with the square of width. Nothing is compiled, so that all
sizes run the same code, and AdamW is used, so that the optimizer's arithmetic does not matter.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

import command
import onefold
from onefold.compute import resolve_device
from onefold.training.config import Config
from onefold.training.phases import training_flops
from onefold.training.prepare import decide
from onefold.training.state import TrainingState
from onefold.training.step import training_step
from timing import machine, product_peak, seconds_of, table, taking_turns, write

AXES = ("tokens", "width", "depth", "batch")


def grown(config: Config, axis: str, factor: int) -> Config:
    """The settings with one size times `factor`; tokens by its square, in both directions of the image."""
    network = config.network
    height, width = network.image_size
    changes: dict[str, dict[str, Any]] = {
        "tokens": {"network.image_size": (factor * height, factor * width)},
        "width": {"network.width": factor * network.width, "network.heads": factor * network.heads},
        "depth": {"network.depth": factor * network.depth},
        "batch": {"training.batch": factor * config.training.batch},
    }
    return config.with_changes(changes[axis])


def size_of(config: Config, axis: str) -> int:
    """What the axis counts."""
    network = config.network
    sizes = {"tokens": network.tokens, "width": network.width, "depth": network.depth, "batch": config.training.batch}
    return sizes[axis]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through log time against log size."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def step_of(config: Config, device: torch.device) -> Callable[[], float]:
    """Takes a training step on random images and returns its seconds."""
    state = TrainingState.fresh(config, device)
    network, batch = config.network, config.training.batch
    x = torch.rand((batch, network.channels, *network.image_size), device=device) * 2 - 1
    y = torch.arange(batch, device=device) % max(1, network.classes)
    return lambda: seconds_of(lambda: training_step(state, x, y, config), device)


def measured(config: Config, device: torch.device, factors: Sequence[int], rounds: int) -> dict[str, Any]:
    """All numbers, for resolved settings."""
    where, training = machine(device), config.training
    sizes = {axis: [grown(config, axis, factor) for factor in factors] for axis in AXES}
    steps = {f"{axis} {size_of(one, axis)}": step_of(one, device) for axis, many in sizes.items() for one in many}
    times = taking_turns(steps, rounds)
    peak = product_peak(device, torch.bfloat16 if training.precision == "bfloat16" else torch.float32)

    def found(one: Config, axis: str) -> dict[str, Any]:
        size, batch = size_of(one, axis), one.training.batch
        seconds = times[f"{axis} {size}"]
        flops = batch * training_flops(one)
        rate = flops / median(seconds)
        return {
            "size": size,
            "seconds": seconds,
            "step": median(seconds),
            "images_per_second": batch / median(seconds),
            "flops": flops,
            "share_of_peak": rate / peak.flops_per_second,
        }

    return {
        **where,
        "recipe": config.recipe,
        "precision": training.precision,
        "rounds": rounds,
        "peak": vars(peak),
        "axes": {axis: [found(one, axis) for one in many] for axis, many in sizes.items()},
    }


def main(
    recipe: str = "digits",
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    batch: int | None = None,
    factors: tuple[int, ...] = (1, 2, 4),
    rounds: int = 5,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table for each size, and write all numbers.

    Args:
        recipe: A recipe, from which the sizes grow.
        device: auto, cpu, cuda, …
        precision: auto decides as training does.
        batch: Images per step to begin with. Default: the recipe's.
        factors: What each size is multiplied by; tokens by their squares.
        rounds: Rounds that count.
        json_file: Where to write all numbers.
    """
    where = resolve_device(device)
    changes: dict[str, Any] = {"device": str(where), "precision": precision, "compile": "no", "optimizer": "adamw"}
    changes |= {} if batch is None else {"batch": batch}
    config = decide(onefold.recipe(recipe, training=changes), where)
    found = measured(config, where, factors, rounds)
    print(f"{recipe}, {found['device']}, {found['precision']}, load before {found['load']:.1f}; ", end="")
    print(f"peak of products {found['peak']['flops_per_second'] / 1e9:,.0f} GFLOP/s")
    for axis, many in found["axes"].items():
        rows = [
            [
                f"{one['size']:,}",
                f"{1e3 * one['step']:,.1f}",
                f"{one['images_per_second']:,.1f}",
                f"{one['flops'] / 1e9:,.1f}",
                f"{100 * one['share_of_peak']:.1f} %",
            ]
            for one in many
        ]
        print("\n" + table([axis, "ms", "images/s", "GFLOP", "of the peak"], rows))
        if len(many) > 1:
            sizes = [one["size"] for one in many]
            by_time = slope(sizes, [one["step"] for one in many])
            by_count = slope(sizes, [one["flops"] for one in many])
            print(f"\nslope: {by_time:.2f} of time, {by_count:.2f} of operations")
    write(found, json_file)


if __name__ == "__main__":
    command.run(main)
