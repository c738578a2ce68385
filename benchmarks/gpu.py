"""All that only a GPU can show, in one go: tests, shares of its peak, speed and memory, sampling, a training.

    python benchmarks/gpu.py --data DATA --out gpu --minutes 20

DATA is a folder with `cifar10-train.zip` and `cifar10-test.zip`; without it nothing is trained. Jobs are processes of
their own: one that fails or takes too long costs nothing but itself. Each writes `OUT/NAME.log`, and `OUT/gpu.json` has
for each its exit status, its seconds and the end of what it said.

    tests       those that run on a GPU only
    speed       for each recipe: compiled, then one after the other, alone on the GPU: images/s, the share of the bf16
                peak, peak memory; random images, so that no disk is measured; of small networks also as CUDA graphs
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
from timing import machine, product_peak, seconds_of, wait

HERE = Path(__file__).parent
BATCHES = {"imagenet256-s": 256, "imagenet256-m": 128, "imagenet256-b": 64, "cifar10": 512, "fashion": 256}
"""Images of a measured step of each recipe; those of ImageNet's go through in micro-batches of `MICRO`."""
MICRO = 64
WARM, TIMED = 5, 5
"""Steps before, and of, a measurement."""
PEAK = 8192
"""Side of the matrices whose product is the peak."""
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
            if job.took > job.seconds:
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


def speed(recipe: str, out: Path, turns: Sequence[str], graphs: bool) -> None:
    """Measure a recipe's step, after those of `turns` before it, all of which compile at the same time."""
    config = onefold.recipe(recipe, **{"training.batch": BATCHES[recipe], "training.compile": "yes"})
    if recipe.startswith("imagenet"):
        config = config.with_changes({"training.micro_batch": MICRO})
    else:
        config = with_one_step(config).with_changes({"onerun.begin": 0})
    device = resolve_device("auto")
    config = decide(config, device)
    state = TrainingState.fresh(config, device)
    state.compile(phases_of(config)[0])
    network, batch = config.network, config.training.batch
    x = torch.rand((batch, network.channels, *network.image_size), device=device) * 2 - 1
    y = torch.arange(batch, device=device) % max(1, network.classes)
    compiling = time.perf_counter()
    step = Graphs().step if graphs else training_step
    for _ in range(WARM):
        step(state, x, y, config)
    wait(device)
    compiling = time.perf_counter() - compiling
    (out / f"{recipe}.warm").touch()
    before = turns[: turns.index(recipe)]
    while not all((out / f"{name}.warm").exists() for name in turns) or not all(
        (out / f"{name}.json").exists() for name in before
    ):
        time.sleep(0.05)
    peak = product_peak(device, torch.bfloat16, sizes=(PEAK if device.type == "cuda" else PEAK // 8,))
    times = [seconds_of(lambda: step(state, x, y, config), device) for _ in range(TIMED)]
    together = seconds_of(lambda: [step(state, x, y, config) for _ in range(TIMED)], device) / TIMED
    rate = batch / together
    found: dict[str, Any] = {
        **machine(device),
        "recipe": recipe,
        "batch": batch,
        "micro_batch": config.training.micro_batch,
        "precision": config.training.precision,
        "graphs": graphs,
        "seconds_of_first_steps": compiling,
        "seconds_apart": times,
        "seconds": together,
        "images_per_second": rate,
        "peak": vars(peak),
        "share_of_peak": rate * training_flops(config) / peak.flops_per_second,
        "peak_memory": peak_memory(device),
    }
    (out / f"{recipe}.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = f"{rate:,.0f} images/s, {100 * found['share_of_peak']:.1f} % of {peak.flops_per_second / 1e12:.0f} TFLOP/s"
    print(f"{recipe}: {shown}, {found['peak_memory'] / 2**30:.1f} GiB, first steps {compiling:.0f} s")


def main(
    data: Path | None = None,
    out: Path = Path("gpu"),
    minutes: float = 20.0,
    speed_of: str = "",
    turns: str = ",".join(BATCHES),
    graphs: bool = False,
) -> None:
    """Run everything. `speed_of`, `turns` and `graphs` are for the processes of the part `speed`."""
    if speed_of:
        return speed(speed_of, out, turns.split(","), graphs)
    end = time.perf_counter() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE.parent / "tests/test_no_waiting.py"),
    ]
    first = [Job("tests", tests, 300), *speeds(out / "usual", 300)]
    if data is not None:
        ends = data / "cifar10-train.zip", data / "cifar10-test.zip", out / "features.safetensors", "--mirror"
        first.append(Job("features", python("train_features.py", *ends), 300))
    run_together(first, out)
    run_together(speeds(out / "graphs", 200, ("cifar10", "fashion"), graphs=True), out)
    options = "--device", "cuda", "--precision", "bfloat16", "--compile", "--rounds", 3
    for name in ("cifar10", "imagenet256-b"):
        ends = "--recipe", name, "--batch", 64, *options, "--json-file", out / f"sampling-{name}.json"
        run_together([Job(f"sampling-{name}", python("sampling.py", *ends), 180)], out)
    if data is not None:
        rate = json.loads((out / "graphs" / "cifar10.json").read_text())["images_per_second"]
        images = int(TRAINED * (end - time.perf_counter()) * rate)
        sources = "--data", data / "cifar10-train.zip", "--test-data", data / "cifar10-test.zip"
        command = [sys.executable, "-m", "onefold", "train", "cifar10", "--one-step", "--quiet", *map(str, sources)]
        command += ["--images", str(images), "--training.graphs", "yes", "--out", str(out / "run")]
        run_together([Job("training", command, max(60.0, end - time.perf_counter()))], out)
        ends = out / "run", "--features", out / "features.safetensors", "--out", out / "cifar10-one-run"
        run_together([Job("measurement", python("real_images.py", *ends), 300)], out)


def speeds(out: Path, seconds: float, recipes: Sequence[str] = tuple(BATCHES), *, graphs: bool = False) -> list[Job]:
    """The jobs of the part `speed`, each with steps as usual, or as CUDA graphs; `out` is one for each of the two."""
    out.mkdir(parents=True, exist_ok=True)
    options = "--out", out, "--turns", ",".join(recipes), "--graphs" if graphs else "--no-graphs"
    return [
        Job(f"speed-{name}" + "-graphs" * graphs, python("gpu.py", *options, "--speed-of", name), seconds)
        for name in recipes
    ]


if __name__ == "__main__":
    tyro.cli(main)
