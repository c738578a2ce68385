"""The cost of measuring health, as a fraction of training time.

    python benchmarks/health.py --recipe digits --json-file docs/results/health.json
    python benchmarks/health.py --recipe cifar10 --batch 16 --steps 2

    share = measurement / (health_every · step / batch)

Both times are medians, taken in one process with the run's own precision and compilation, each after a discarded first
time. The images are random, which does not affect the times. The log that a measurement reads is that of half the run.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import command
import onefold
from onefold.commands.terminal import discard
from onefold.compute import resolve_device
from onefold.data import Dataset, read_all
from onefold.pixels import to_float
from onefold.training.health import IMAGES, HealthMonitor
from onefold.training.log import RunLog
from onefold.training.phases import phases_of
from onefold.training.prepare import decide
from onefold.training.run import Run
from onefold.training.state import TrainingState
from onefold.training.step import training_step


def random_images(config: onefold.NetworkConfig, count: int, folder: Path) -> Dataset:
    """Noise, with labels in rotation."""
    generator = np.random.Generator(np.random.PCG64(0))
    images = generator.integers(0, 256, (count, *config.image_size, config.channels), np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(count) % max(1, config.classes))
    return onefold.data.open_dataset(str(folder / "images.npz"))


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat except a first one. `work` ends by reading a number from the device, and so waits."""
    seconds: list[float] = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measured(config: onefold.Config, steps: int, looks: int, folder: Path) -> dict[str, Any]:
    """Seconds of steps and of measurements, and what was measured."""
    device = resolve_device(config.training.device)
    config = decide(config, device)
    training = config.training
    state = TrainingState.fresh(config, device)
    if training.compile == "yes":
        state.compile(phases_of(config)[0])
    data = random_images(config.network, max(IMAGES, training.batch), folder)
    x, y = (part.to(device) for part in read_all(data, np.arange(training.batch)))
    step_seconds = timed(lambda: training_step(state, to_float(x), y, config)["gradient_norm"].item(), steps)

    watch = HealthMonitor(Run(folder, config), data, device, warmup=training.warmup)
    line = {"images": training.batch, "peak_memory": 0}
    looked = {**line, **watch.look(state, line, discard)}
    log = RunLog(folder / "log.jsonl", images=0)
    for images in range(training.log_every, training.images // 2, training.log_every):
        log.write(looked if images % training.health_every < training.log_every else line)
    look_seconds = timed(lambda: watch.look(state, line, discard), looks)

    step, look = median(step_seconds), median(look_seconds)
    return {
        "recipe": config.recipe,
        "onefold": onefold.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "precision": training.precision,
        "compile": training.compile,
        "batch": training.batch,
        "health_every": training.health_every,
        "steps": step_seconds,
        "looks": look_seconds,
        "step": step,
        "look": look,
        "share": look / (training.health_every / training.batch * step),
    }


def main(
    recipe: str = "digits",
    batch: int | None = None,
    steps: int = 20,
    looks: int = 10,
    device: str = "auto",
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        recipe: A recipe, with its own settings.
        batch: Images per step, if the recipe's are too many for this machine; the cost per image is assumed to be the
        same.
        steps: Steps to time.
        looks: Measurements to time.
        device: auto, cpu, cuda, …
        json_file: Where to write all numbers.
    """
    changes = {} if batch is None else {"batch": batch, "micro_batch": None}
    config = onefold.recipe(recipe, training={"device": device, **changes})
    with tempfile.TemporaryDirectory() as folder:
        found = measured(config, steps, looks, Path(folder))
    print(f"| {recipe}, {found['device']}, {found['precision']} | |\n|---|---|")
    print(f"| a training step of {found['batch']} images | {1000 * found['step']:.1f} ms |")
    print(f"| a measurement of health | {1000 * found['look']:.1f} ms |")
    print(f"| share of training time, once in {found['health_every']:,} images | {100 * found['share']:.2f} % |")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
