"""The speed of sampling: one image, and many, in 50, 4 and 1 steps, with decoding.

    python benchmarks/sampling.py --recipe digits --json-file docs/results/sampling.json
    python benchmarks/sampling.py --recipe imagenet256-b --device cuda --batch 256 --precision bfloat16

What is timed is `Network.sample`, from the seed to the uint8 image in memory, as the command `onefold sample` calls
it. The network is the recipe's with random weights: the time does not depend on them, and a one-step generator is the
same network. Any solver that evaluates the network once in a step takes as long as Euler's. Numbers of steps and of
images take turns (see `timing.py`).

`onefold sample` and `onefold evaluate` compute in float32. `--precision bfloat16` times the same under autocast, which
tells what that would save, and nothing of what it would do to the images.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro

import onefold
from onefold.architecture import build
from onefold.flops import sampling_flops
from onefold.training.config import Config
from onefold.training.engine import resolve_device
from timing import machine, seconds_of, table, taking_turns, write


def measured(
    config: Config, device: torch.device, precision: str, batch: int, steps: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Seconds of one image and of a batch, and the speed of the batch, for each number of steps."""
    where = machine(device)
    network = build(config.network).to(device).eval()

    def sampled(count: int, steps: int) -> Callable[[], float]:
        def work() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                network.sample(count, steps=steps, batch=count)

        return lambda: seconds_of(work, device)

    turns = {f"{count} by {k}": sampled(count, k) for k in steps for count in (1, batch)}
    times = taking_turns(turns, rounds)

    def found(k: int) -> dict[str, Any]:
        one, many = times[f"1 by {k}"], times[f"{batch} by {k}"]
        return {
            "seconds_of_one": one,
            "seconds_of_batch": many,
            "latency": median(one),
            "images_per_second": batch / median(many),
            "flops_per_image": sampling_flops(config.network, k),
        }

    settings = {"recipe": config.recipe, "precision": precision, "batch": batch, "rounds": rounds}
    return {**where, **settings, "steps": {str(k): found(k) for k in steps}}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What the most steps cost over the fewest: of one image, of a batch, and by counted operations."""
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
    precision: Literal["float32", "bfloat16"] = "float32",
    batch: int = 256,
    steps: tuple[int, ...] = (50, 4, 1),
    rounds: int = 7,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        recipe: A recipe, for its network.
        device: auto, cpu, cuda, …
        precision: float32, as the commands sample; or under bf16 autocast.
        batch: Images of the large batch.
        steps: Numbers of steps.
        rounds: Rounds that count.
        json_file: Where to write all numbers.
    """
    found = measured(onefold.recipe(recipe), resolve_device(device), precision, batch, steps, rounds)
    found["ratios"] = ratios(found)
    print(f"{recipe}, {found['device']}, {precision}, load before {found['load']:.1f}\n")
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
