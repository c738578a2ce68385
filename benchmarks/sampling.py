"""Speed of sampling one image, and many, in 50, 4 and 1 steps, including decoding.

    python benchmarks/sampling.py --recipe digits --json-file docs/results/sampling.json
    python benchmarks/sampling.py --recipe imagenet256-b --device cuda --batch 256 --precision bfloat16
    python benchmarks/sampling.py --one-step --steps 50 1 --json-file docs/results/sampling-pass.json

What is timed is `Network.sample`, from the seed to the uint8 image in memory. The network is the recipe's with random
weights: the time does not depend on them, and a one-step generator is the same network. Any solver that evaluates the
network once per step takes as long as Euler's. Numbers of steps and of images take turns (see `timing.py`). With
`--one-step` the network is that of one run, whose generator has weights of its own: one step is its, by two passes of
the trunk, and `pass` is the same in one.

`--precision` and `--compile` are those of `onefold sample`; they show the time saved, but not the effect on the images.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from tyro.conf import arg

import command
import onefold
from onefold.compute import resolve_device, sampling_context
from onefold.networks.base import NetworkConfig, build
from onefold.networks.jump import exit_flops
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.training.config import Config
from onefold.training.one_run import with_one_step
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
    samplers = {str(k): Sampler(k) for k in steps}
    if config.network.jump_exit:
        samplers |= {"1": Sampler(1, "refine", start=0.3), "pass": Sampler(1, "one_pass", start=0.3)}

    def sampled(count: int, sampler: Sampler) -> Callable[[], float]:
        seeds, labels = range(count), [k % config.network.classes for k in range(count)]

        def sample() -> None:
            network.pictures(network.sample_latents(seeds, labels, sampler, batch=count))

        return lambda: seconds_of(sample, device)

    turns = {f"{count} by {k}": sampled(count, sampler) for k, sampler in samplers.items() for count in (1, batch)}
    with sampling_context(network, device, precision=precision, compiled=compiled) as taken:
        times = taking_turns(turns, rounds)

    def found(k: str) -> dict[str, Any]:
        one, many = times[f"1 by {k}"], times[f"{batch} by {k}"]
        return {
            "seconds_of_one": one,
            "seconds_of_batch": many,
            "latency": median(one),
            "images_per_second": batch / median(many),
            "flops_per_image": operations(config.network, k),
        }

    settings = {"recipe": config.recipe, "precision": taken, "compiled": compiled, "batch": batch, "rounds": rounds}
    return {**where, **settings, "steps": {k: found(k) for k in samplers}}


def operations(config: NetworkConfig, steps: str) -> float:
    """Operations of one image, without the products BA, which are shared by a batch."""
    role = config.kind.role_flops(config)
    if steps != "pass":
        return role.sample(int(steps))
    return role.denoise + exit_flops(config.tokens, config.width, config.patch**2 * config.channels)


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Cost of the most steps relative to the fewest: for one image, for a batch, and in counted operations."""
    numbers = sorted(found["steps"], key=lambda k: 0 if k == "pass" else int(k))
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
    compiled: Annotated[bool, arg(name="compile")] = False,
    one_step: bool = False,
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
        one_step: The network of a run with --one-step.
        batch: Images in the large batch.
        steps: Numbers of steps.
        rounds: Rounds that count.
        json_file: Where to write all numbers.
    """
    where = resolve_device(device)
    config = with_one_step(onefold.recipe(recipe)) if one_step else onefold.recipe(recipe)
    found = measured(config, where, batch, steps, rounds, precision, compiled)
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
    few = "one pass" if one_step else min(steps)
    print(f"\n{max(steps)} steps to {few}: {ratio['latency']:.1f} times the time for one image, ", end="")
    print(f"{ratio['batch']:.1f} times for a batch, {ratio['operations']:.1f} times the operations")
    write(found, json_file)


if __name__ == "__main__":
    command.run(main)
