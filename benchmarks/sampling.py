"""Speed of sampling one image, and many, in 50, 4 and 1 steps, including decoding.

    python benchmarks/sampling.py --recipe digits --json-file docs/results/sampling.json
    python benchmarks/sampling.py --recipe imagenet256-b --device cuda --batch 256 --precision bfloat16

What is timed is `Network.sample`, from the seed to the uint8 image in memory. The network is the recipe's with random
weights: the time does not depend on them, and a one-step generator is the same network. Any solver that evaluates the
network once per step takes as long as Euler's. Numbers of steps and of images take turns (see `timing.py`).

`--precision` and `--compile` are those of `onefold sample`; they show the time saved, but not the effect on the images.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import tyro

import onefold
from onefold.compute import resolve_device, sampling_context
from onefold.networks.base import build
from onefold.settings import Precision
from onefold.training.config import Config
from timing import machine, seconds_of, table, taking_turns, write


def measured(
    config: Config,
    device: torch.device,
    batch: int,
    steps: tuple[int, ...],
    rounds: int,
    precision: Precision = "float32",
    compiled: bool = False,
) -> dict[str, Any]:
    """Seconds for one image and for a batch, and the speed of the batch, for each number of steps."""
    where = machine(device)
    network = build(config.network).to(device).eval()

    def sampled(count: int, steps: int) -> Callable[[], float]:
        return lambda: seconds_of(lambda: network.sample(count, steps=steps, batch=count), device)

    turns = {f"{count} by {k}": sampled(count, k) for k in steps for count in (1, batch)}
    with sampling_context(network, device, precision=precision, compiled=compiled) as taken:
        times = taking_turns(turns, rounds)

    def found(k: int) -> dict[str, Any]:
        one, many = times[f"1 by {k}"], times[f"{batch} by {k}"]
        return {
            "seconds_of_one": one,
            "seconds_of_batch": many,
            "latency": median(one),
            "images_per_second": batch / median(many),
            "flops_per_image": network.role_flops(config.network).sample(k),
        }

    settings = {"recipe": config.recipe, "precision": taken, "compiled": compiled, "batch": batch, "rounds": rounds}
    return {**where, **settings, "steps": {str(k): found(k) for k in steps}}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Cost of the most steps relative to the fewest: for one image, for a batch, and in counted operations."""
    numbers = sorted(found["steps"], key=int)
    few, many = found["steps"][numbers[0]], found["steps"][numbers[-1]]
    return {
        "latency": many["latency"] / few["latency"],
        "batch": few["images_per_second"] / many["images_per_second"],
        "operations": many["flops_per_image"] / few["flops_per_image"],
    }


def main(
    recipe: str = "digits",
    device: str = "auto",
    precision: Precision = "float32",
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False,
    batch: int = 256,
    steps: tuple[int, ...] = (50, 4, 1),
    rounds: int = 7,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        recipe: A recipe, for its network.
        device: auto, cpu, cuda, …
        precision: Of matrix products.
        compiled: Compile the network.
        batch: Images in the large batch.
        steps: Numbers of steps.
        rounds: Rounds that count.
        json_file: Where to write all numbers.
    """
    where = resolve_device(device)
    found = measured(onefold.recipe(recipe), where, batch, steps, rounds, precision, compiled)
    found["ratios"] = ratios(found)
    how = f"{found['precision']}, {'compiled' if compiled else 'not compiled'}"
    print(f"{recipe}, {found['device']}, {how}, load before {found['load']:.1f}\n")
    head = ["steps", "one image, ms", f"images/s at a batch of {batch}", "GFLOP an image"]
    rows = [
        [k, f"{1e3 * one['latency']:.1f}", f"{one['images_per_second']:,.1f}", f"{one['flops_per_image'] / 1e9:,.3f}"]
        for k, one in found["steps"].items()
    ]
    print(table(head, rows))
    ratio = found["ratios"]
    print(f"\n{max(steps)} steps to {min(steps)}: {ratio['latency']:.1f} times the time for one image, ", end="")
    print(f"{ratio['batch']:.1f} times for a batch, {ratio['operations']:.1f} times the operations")
    write(found, json_file)


if __name__ == "__main__":
    tyro.cli(main)
