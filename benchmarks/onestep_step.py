"""The cost of a generator update: with a density ratio, and with the score differences that it replaces.

    python benchmarks/onestep_step.py --json-file docs/results/onestep-step.json

On one backbone and in one process: the arithmetic of an update with its critic updates, counted by torch, in units of
F, a forward pass of the denoiser on the batch; its time, the median of several rounds in which the methods take turns,
relative to the first method's; and the memory of the state (weights, gradients, moments, average) in bytes per
parameter of the generator. All weights learn, with the upkeep of the network's other roles; but for `low-rank`, the
default by scores.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import command
import onefold
from onefold.compute import resolve_device
from onefold.networks import Network, build
from onefold.networks.jump import RANK
from onefold.training.config import Config
from onefold.training.conversion import one_step_config
from onefold.training.phases import phases_of
from onefold.training.prepare import decide
from onefold.training.state import TrainingState
from onefold.training.step import training_step

RATIO = {"onestep.method": "ratio"}

METHODS: dict[str, dict[str, Any]] = {
    "ratio": RATIO,
    "ratio, no penalty": {**RATIO, "onestep.ratio.penalty": 0.0},
    "ratio, half the depth, no penalty": {**RATIO, "onestep.critic_blocks": "half", "onestep.ratio.penalty": 0.0},
    "ratio, half the depth": {**RATIO, "onestep.critic_blocks": "half"},
    "ratio, no upkeep": {**RATIO, "onestep.upkeep": 0.0},
    "score, low-rank": {"onestep.method": "score", "network.jump_rank": RANK},
    "score, 1 student update": {"onestep.method": "score"},
    "dmd, 5 student updates": {"onestep.method": "dmd", "onestep.critic_updates": 5},
    "dmd, 5, adversarial": {"onestep.method": "dmd", "onestep.critic_updates": 5, "onestep.score.adversarial": 0.1},
}


def prepared(config: Config, teacher: Network, changes: dict[str, Any]) -> tuple[TrainingState, Config]:
    """A state at the point where the generator starts to be updated."""
    half = max(1, config.network.depth // 2)
    changes = {name: half if value == "half" else value for name, value in changes.items()}
    config = config.with_changes({"onestep.critic_warmup": 0, **changes})
    state = TrainingState.fresh(config, next(teacher.parameters()).device, teacher)
    if config.training.compile == "yes":
        state.compile(phases_of(config)[0])
    return state, config


def update(state: TrainingState, config: Config, x: torch.Tensor, y: torch.Tensor) -> None:
    """As many steps as one generator update takes."""
    while "gradient_norm" not in training_step(state, x, y, config):
        pass


def state_bytes(state: TrainingState) -> int:
    """Weights, of what is trained gradients and moments, the upkeep's gradient, average and teacher; 4 bytes each."""
    weights = [p for name in state.optimizers for p in state.modules[name].parameters()]
    trained = [p for p in weights if p.requires_grad]
    optimizers = [optimizer for several in state.optimizers.values() for optimizer in several]
    numbers = sum(p.numel() for p in (*weights, *trained, *state.averages[0].parameters()))
    if not state.network.config.jump_rank:
        numbers += sum(p.numel() for p in state.network.parameters())  # the gradient of the upkeep, which is kept apart
    numbers += sum(v.numel() for each in optimizers for values in each.state.values() for v in values.values())
    # The ratio needs the teacher only for encoding, if there are latents; scores need it in every update.
    return 4 * (numbers + sum(p.numel() for p in state.modules["teacher"].parameters()))


def counted(action: Callable[[], object]) -> int:
    """Floating point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def main(
    recipe: str = "digits", batch: int = 64, rounds: int = 7, device: str = "auto", json_file: Path | None = None
) -> None:
    """Measure and print."""
    where = resolve_device(device)
    base = onefold.recipe(recipe, training={"batch": batch, "images": 10**9, "compile": "no", "device": str(where)})
    config = decide(one_step_config(base, rank=0), where)
    teacher = build(config.network).to(where).requires_grad_(False)
    height, width = config.network.image_size
    x = torch.rand(batch, config.network.channels, height, width, device=where) * 2 - 1
    y = torch.randint(0, max(1, config.network.classes), (batch,), device=where)
    shape = (batch, config.network.tokens, config.network.latent_channels)
    z, t = torch.randn(shape, device=where), torch.zeros(batch, device=where)
    with torch.no_grad():
        forward = counted(lambda: teacher.denoise(z, t, y))
    own = sum(p.numel() for p in teacher.parameters())
    runs = {name: prepared(config, teacher, changes) for name, changes in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, (state, settings) in runs.items():
            start = time.perf_counter()
            update(state, settings, x, y)
            if where.type == "cuda":
                torch.cuda.synchronize()
            if k:
                times[name].append(time.perf_counter() - start)
    first = median(times["ratio"])
    found: dict[str, Any] = {}
    print("| method | arithmetic, F | time, ratio = 1 | state, bytes per parameter |\n|---|---:|---:|---:|")
    for name, (state, settings) in runs.items():
        flops = counted(lambda state=state, settings=settings: update(state, settings, x, y))
        numbers = flops / forward, median(times[name]) / first, state_bytes(state) / own
        found[name] = {"forward_passes": numbers[0], "time": numbers[1], "bytes_per_parameter": numbers[2]}
        print(f"| {name} | {numbers[0]:.1f} | {numbers[1]:.2f} | {numbers[2]:.0f} |")
    print(f"\n{recipe}, batch {batch}, {where}, {config.training.precision}; ratio: {1e3 * first:.0f} ms an update")
    if json_file is not None:
        about = {"recipe": recipe, "batch": batch, "device": str(where), "precision": config.training.precision}
        described = {**about, "threads": torch.get_num_threads(), "seconds_of_ratio": first, "methods": found}
        json_file.write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    command.run(main)
