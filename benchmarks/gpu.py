"""All that only a GPU can show, in one go: tests, shares of its peak, speed and memory, sampling, a training.

    python benchmarks/gpu.py --data DATA --out gpu --minutes 20
    python benchmarks/gpu.py --out gpu-dry --dry    # beforehand, on any machine: does it run?

DATA is a folder with `cifar10-train.zip` and `cifar10-test.zip`; without it nothing is trained. Jobs are processes of
their own: one that fails or takes too long costs nothing but itself. Each writes `OUT/NAME.log`, and `OUT/gpu.json` has
for each its exit status, its seconds and the end of what it said; the exit code is 1 if one failed.

`--dry` runs every job with networks of a toy's size on the digits, without a GPU too, where nothing is recorded. Its
numbers mean nothing.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import command
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
TOY = {"network.width": 32, "network.depth": 1, "network.heads": 2, "training.batch": 16, "training.compile": "no"}
"""Settings of a dry run …"""
TOY_IMAGES = 640
"""… and its images."""
TRAINED = 0.75
"""Part of the time that is left which the training is given; the rest is for starting, compiling and measuring."""


@dataclass
class Job:
    """A process, and how it went."""

    name: str
    command: Sequence[str]
    seconds: float
    """After which it is told to end."""
    told: bool = False
    status: int | None = None
    took: float = 0.0
    said: list[str] = field(default_factory=list)


def python(script: str, *arguments: object) -> list[str]:
    """A script of this folder."""
    return [sys.executable, "-u", str(HERE / script), *map(str, arguments)]


def options(settings: Mapping[str, object]) -> list[str]:
    """Settings as options of a command."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def run_together(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Run jobs at the same time, to their ends or limits, and add them to the summary."""
    begun = time.perf_counter()
    processes = {}
    for job in jobs:
        with (out / f"{job.name}.log").open("wb") as log:
            processes[job.name] = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT)
    waiting = list(jobs)
    while waiting:
        for job in list(waiting):
            job.took = time.perf_counter() - begun
            if job.took > job.seconds and not job.told:  # once: then it may save what it has
                processes[job.name].terminate()
                job.told = True
            elif job.took > job.seconds + GRACE:
                processes[job.name].kill()
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
    return list(jobs)


def speed(recipe: str, out: Path, *, graphs: bool, dry: bool) -> None:
    """Measure a recipe's step, and write it to `out`."""
    settings = {"batch": BATCHES[recipe], "compile": "yes", "precision": "bfloat16"}
    config = onefold.recipe(recipe, training=settings)
    if recipe.startswith("imagenet"):
        config = config.with_changes({"training.micro_batch": TOY["training.batch"] // 2 if dry else MICRO})
    else:
        config = with_one_step(config).with_changes({"onerun.begin": 0})
    if dry:
        config = config.with_changes(TOY)
    device = resolve_device("auto")
    config, graphs = decide(config, device), graphs and device.type == "cuda"
    state = TrainingState.fresh(config, device)
    if not dry:
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


def first_jobs(ends: tuple[object, object] | None, out: Path, *, dry: bool) -> list[Job]:
    """The tests that need a GPU, and meanwhile the features of the data."""
    tests = [str(HERE.parent / "tests" / name) for name in ("test_no_waiting.py", "test_graphs.py")[dry:]]
    jobs = [Job("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], 300)]
    if ends is not None:
        few = ("--widths", 8, 8, 8, 8, "--epochs", 1) if dry else ("--mirror",)
        command = python("train_features.py", *ends, out / "features.safetensors", "--residuals", 1, *few)
        jobs.append(Job("features", command, 300))
    return jobs


def speed_job(recipe: str, out: Path, *, graphs: bool, dry: bool) -> Job:
    """`speed` in a process of its own."""
    name = f"speed-{recipe}" + "-graphs" * graphs
    (out / f"{name}.json").unlink(missing_ok=True)
    flags = "--graphs" if graphs else "--no-graphs", "--dry" if dry else "--no-dry"
    return Job(name, python("gpu.py", "--out", out / f"{name}.json", "--speed-of", recipe, *flags), 180)


def sampling_job(recipe: str, out: Path, *, dry: bool) -> Job:
    how = ("--batch", 2, "--rounds", 1) if dry else ("--batch", 64, "--rounds", 3, "--device", "cuda", "--compile")
    ends = "--precision", "bfloat16", "--json-file", out / f"sampling-{recipe}.json"
    return Job(f"sampling-{recipe}", python("sampling.py", "--recipe", recipe, *how, *ends), 180)


def training_job(ends: tuple[object, object], images: int, out: Path, seconds: float, *, dry: bool) -> Job:
    sources = "--data", ends[0], "--test-data", ends[1], "--out", out / "run"
    command = [sys.executable, "-m", "onefold", "train", "cifar10", "--one-step", "--quiet", *map(str, sources)]
    command += ["--images", str(images), *(options(TOY) if dry else ())]
    command += ["--training.graphs", "yes"] if torch.cuda.is_available() else []
    return Job("training", command, seconds)


def main(
    data: Path | None = None,
    out: Path = Path("gpu"),
    minutes: float = 20.0,
    dry: bool = False,
    speed_of: str = "",
    graphs: bool = False,
) -> None:
    """Run everything. `speed_of` and `graphs` are for the processes of the part `speed`."""
    if speed_of:
        return speed(speed_of, out, graphs=graphs, dry=dry)
    end = time.perf_counter() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").unlink(missing_ok=True)
    ends = ("digits", "digits:test") if dry else data and (data / "cifar10-train.zip", data / "cifar10-test.zip")
    done = run_together(first_jobs(ends, out, dry=dry), out)
    for recipe, graphs in [*((name, False) for name in BATCHES), ("fashion", True), ("cifar10", True)]:
        done += run_together([speed_job(recipe, out, graphs=graphs, dry=dry)], out)
    for recipe in ("digits",) if dry else ("cifar10", "imagenet256-b"):
        done += run_together([sampling_job(recipe, out, dry=dry)], out)
    left, speeds = end - time.perf_counter(), out / "speed-cifar10-graphs.json"
    if ends is None or left < LEAST or not speeds.exists():
        print(f"nothing is trained: {'no data' if ends is None else f'{left:.0f} s left, or no speed measured'}")
    else:
        rate = json.loads(speeds.read_text())["images_per_second"]
        images = TOY_IMAGES if dry else int(TRAINED * left * rate)
        done += run_together([training_job(ends, images, out, left, dry=dry)], out)
        few = ("--images", 100, "--steps", 1) if dry else ()
        files = out / "run", "--features", out / "features.safetensors", "--out", out / "cifar10-one-run"
        done += run_together([Job("measurement", python("real_images.py", *files, *few), 600)], out)
    if failed := [job.name for job in done if job.status]:
        raise SystemExit(f"failed, or told to end: {', '.join(failed)}")


if __name__ == "__main__":
    command.run(main)
