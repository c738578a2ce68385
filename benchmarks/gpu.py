"""All that only a GPU can show, in one go: tests, shares of its peak, speed and memory, sampling, a training.

    python benchmarks/gpu.py --data DATA --out gpu --minutes 20

DATA is a folder with `cifar10-train.zip` and `cifar10-test.zip`; without it nothing is trained. Jobs are processes of
their own: one that fails or takes too long costs nothing but itself. Each writes `OUT/NAME.log`, and `OUT/gpu.json` has
for each its exit status, its seconds and the end of what it said.

    tests       those that run on a GPU only
    speed       of each recipe's steps, compiled, alone on the GPU: images/s, the share of the bf16 peak, peak memory;
                random images, so that no disk is measured; of small networks also recorded as CUDA graphs
    sampling    images/s in 50, 4 and 1 steps
    features    the classifier that measures the images (`train_features.py`)
    training    `cifar10 --one-step`, as long as the minutes allow at the measured speed, and its measurement
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

import onefold
from onefold.compute import resolve_device
from onefold.training.graphs import Graphs
from onefold.training.log import peak_memory
from onefold.training.one_run import with_one_step
from onefold.training.phases import phases_of, training_flops
from onefold.training.prepare import decide
from onefold.training.state import TrainingState
from onefold.training.step import training_step
from timing import machine, product_peak, seconds_of

HERE = Path(__file__).parent
BATCHES = {"imagenet256-s": 256, "imagenet256-m": 128, "imagenet256-b": 64, "cifar10": 512, "fashion": 256}
"""Images of a measured step of each recipe; those of ImageNet's go through in micro-batches of `MICRO`."""
MICRO = 64
WARM, TIMED = 5, 5
"""Steps before, and of, a measurement."""
PEAK = 8192
"""Side of the matrices whose product is the peak."""
GRACE = 30.0
"""Seconds that a process has to end when it is told to."""
LEAST = 120.0
"""Seconds that a training is worth beginning for."""
TRAINED = 0.75
"""Part of the time that is left which the training is given; the rest is for starting, compiling and measuring."""


@dataclass
class Job:
    """A process, and how it went."""

    name: str
    command: Sequence[str]
    seconds: float
    """After which it is ended."""
    status: int | None = None
    took: float = 0.0
    said: list[str] = field(default_factory=list)


def python(script: str, *arguments: object) -> list[str]:
    """A script of this folder."""
    return [sys.executable, "-u", str(HERE / script), *map(str, arguments)]


def run_together(jobs: Sequence[Job], out: Path) -> None:
    """Run jobs at the same time, to their ends or limits, and add them to the summary."""
    begun = time.perf_counter()
    processes = {}
    for job in jobs:
        log = (out / f"{job.name}.log").open("wb")
        processes[job.name] = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
    waiting = list(jobs)
    while waiting:
        for job in list(waiting):
            job.took = time.perf_counter() - begun
            if job.took > job.seconds:  # then it may save what it has
                processes[job.name].terminate() if job.took < job.seconds + GRACE else processes[job.name].kill()
            job.status = processes[job.name].poll()
            if job.status is not None:
                waiting.remove(job)
                text = (out / f"{job.name}.log").read_text(errors="replace").replace("\r", "\n")
                job.said = text.strip().splitlines()[-8:]
                print(f"{job.name}: {job.status} after {job.took:.0f} s", *job.said, sep="\n    ", flush=True)
        time.sleep(0.2)
    kept = out / "gpu.json"
    before = json.loads(kept.read_text()) if kept.exists() else []
    kept.write_text(json.dumps([*before, *map(asdict, jobs)], indent=1) + "\n")


def speed(recipe: str, out: Path, *, graphs: bool) -> None:
    """Measure a recipe's step, and write it to `out`."""
    settings = {"batch": BATCHES[recipe], "compile": "yes", "precision": "bfloat16"}
    config = onefold.recipe(recipe, training=settings)
    if recipe.startswith("imagenet"):
        config = config.with_changes({"training.micro_batch": MICRO})
    else:
        config = with_one_step(config).with_changes({"onerun.begin": 0})
    device = resolve_device("auto")
    config = decide(config, device)
    state = TrainingState.fresh(config, device)
    state.compile(phases_of(config)[0])
    step = Graphs(device).step if graphs else training_step
    network, batch = config.network, config.training.batch
    x = torch.rand((batch, network.channels, *network.image_size), device=device) * 2 - 1
    y = torch.arange(batch, device=device) % max(1, network.classes)

    def steps(count: int) -> float:
        return seconds_of(lambda: [step(state, x, y, config) for _ in range(count)], device)

    first, seconds = steps(WARM), steps(TIMED) / TIMED
    memory = peak_memory(device)
    peak = product_peak(device, torch.bfloat16, sizes=(PEAK if device.type == "cuda" else PEAK // 8,))
    rate = batch / seconds
    found: dict[str, Any] = {
        **machine(device),
        "recipe": recipe,
        "batch": batch,
        "micro_batch": config.training.micro_batch,
        "precision": config.training.precision,
        "graphs": graphs,
        "seconds_of_first_steps": first,
        "seconds": seconds,
        "images_per_second": rate,
        "peak": vars(peak),
        "share_of_peak": rate * training_flops(config) / peak.flops_per_second,
        "peak_memory": memory,
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    shown = f"{rate:,.0f} images/s, {100 * found['share_of_peak']:.1f} % of {peak.flops_per_second / 1e12:.0f} TFLOP/s"
    print(f"{recipe}: {shown}, {memory / 2**30:.1f} GiB, first steps {first:.0f} s")


def main(
    data: Path | None = None,
    out: Path = Path("gpu"),
    minutes: float = 20.0,
    speed_of: str = "",
    graphs: bool = False,
) -> None:
    """Run everything. `speed_of` and `graphs` are for the processes of the part `speed`."""
    if speed_of:
        return speed(speed_of, out, graphs=graphs)
    end = time.perf_counter() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").unlink(missing_ok=True)
    tests = [str(HERE.parent / "tests" / name) for name in ("test_no_waiting.py", "test_graphs.py")]
    first = [Job("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], 300)]
    if data is not None:
        ends = data / "cifar10-train.zip", data / "cifar10-test.zip", out / "features.safetensors", "--mirror"
        first.append(Job("features", python("train_features.py", *ends, "--residuals", 1), 300))
    run_together(first, out)
    for recipe, graphs in [*((name, False) for name in BATCHES), ("fashion", True), ("cifar10", True)]:
        name = f"speed-{recipe}" + "-graphs" * graphs
        (out / f"{name}.json").unlink(missing_ok=True)
        options = "--out", out / f"{name}.json", "--speed-of", recipe, "--graphs" if graphs else "--no-graphs"
        run_together([Job(name, python("gpu.py", *options), 180)], out)
    options = "--device", "cuda", "--precision", "bfloat16", "--compile", "--rounds", 3
    for name in ("cifar10", "imagenet256-b"):
        ends = "--recipe", name, "--batch", 64, *options, "--json-file", out / f"sampling-{name}.json"
        run_together([Job(f"sampling-{name}", python("sampling.py", *ends), 180)], out)
    left, speeds = end - time.perf_counter(), out / "speed-cifar10-graphs.json"
    if data is None or left < LEAST or not speeds.exists():
        print(f"nothing is trained: {'no data' if data is None else f'{left:.0f} s left, or no speed measured'}")
        return None
    images = int(TRAINED * left * json.loads(speeds.read_text())["images_per_second"])
    sources = "--data", data / "cifar10-train.zip", "--test-data", data / "cifar10-test.zip"
    command = [sys.executable, "-m", "onefold", "train", "cifar10", "--one-step", "--quiet", *map(str, sources)]
    command += ["--images", str(images), "--training.graphs", "yes", "--out", str(out / "run")]
    run_together([Job("training", command, left)], out)
    ends = out / "run", "--features", out / "features.safetensors", "--out", out / "cifar10-one-run"
    run_together([Job("measurement", python("real_images.py", *ends), 600)], out)


if __name__ == "__main__":
    tyro.cli(main)
