"""`onefold demo`: one run on the embedded digits, sampled in many steps and in one, evaluated and shown."""

import statistics
import time
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from onefold.commands import tables
from onefold.commands.terminal import console
from onefold.data import open_dataset
from onefold.errors import Interrupted, UserError
from onefold.evaluation import evaluate
from onefold.metrics import Record
from onefold.pictures import panels
from onefold.pictures.grids import sample_grid
from onefold.recipes import recipe
from onefold.sampling import Sampler, resolve_labels
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.loop import train
from onefold.training.one_run import with_one_step
from onefold.training.prepare import difference
from onefold.training.run import Run, load_run

__all__ = ["demo"]

SHOWN = 100
FEW = 8
"""Steps between one and many, for the picture."""
TURNS = 5
"""Measurements of each speed."""


def demo(out: Path = Path("demo"), seed: int = 0, quiet: bool = False) -> None:
    """Train on the embedded digits, sample in one step and in many, evaluate, and show where the pictures are.

    Example: onefold demo --out demo

    Args:
        out: Folder of the demo; a finished or interrupted one is continued.
        seed: Seed of the training.
        quiet: No progress bar.
    """
    config = with_one_step(recipe("digits", **{"training.seed": seed}))
    console.print(
        f"One network of {config.network.depth} blocks learns to encode, denoise, decode and generate in one step "
        f"{len(open_dataset('digits')):,} handwritten digits, in one run from random weights."
    )
    run = _train(config, out, quiet=quiet)
    many = run.config.sampler
    record, many_record = _evaluate(run, None, "demo"), _evaluate(run, many, "demo-many")
    picture = out / "samples.png"
    sample_grid(run.network, picture, count=SHOWN, columns=10)
    newest = sorted((out / "samples").glob("*-reconstructions.png"))[-1]
    sheet = out / "one-step.png"
    _show(sheet, run, record, many_record)
    console.print(f"samples in one step, a column per class: {picture}")
    console.print(f"the same noise and classes in 1, {FEW} and {many.steps} steps, side by side: {sheet}")
    console.print(f"test images above their reconstructions: {newest}")
    console.print(f"one step instead of {many.steps}: {_times_as_fast(run):.0f} times as many images per second")
    console.print(f"the run: {out}; the records: evaluation/demo.json, evaluation/demo-many.json")


def _train(config: Config, folder: Path, *, quiet: bool) -> Run:
    """Train, or continue what is in the folder; says how long it took.

    Raises:
        UserError: another run is in the folder.
        Interrupted: as of `train`; the same command goes on.
    """
    started, begun = time.perf_counter(), (folder / "config.json").exists()
    if begun:
        found = load_run(folder)
        if difference(config, found) is not None:
            raise UserError(f"{folder}: holds another run than this demo's; choose another --out")
        done = max((int(path.name) for path in checkpoints(folder)), default=0)
        if done >= found.length:
            console.print(f"{folder}: was trained before")
            return found
        console.print(f"{folder}: goes on from {done:,} images")
    try:
        run = train(config, folder, resume=begun, quiet=quiet)
    except Interrupted as stop:
        raise Interrupted(stop.signal, f"{folder}: stopped and saved; the same command goes on") from stop
    console.print(f"training and pictures: {tables.duration(time.perf_counter() - started)}")
    return run


def _evaluate(run: Run, sampler: Sampler | None, name: str) -> Record:
    record = evaluate(run, sampler=sampler, say=lambda line: console.print(line, style="dim"))
    record.write(run.folder / "evaluation" / f"{name}.json")
    tables.show_record(console, record)
    return record


def _times_as_fast(run: Run) -> float:
    """How many times as fast one step is, by the medians of measurements in turns: a busy moment slows both down."""
    times: list[tuple[float, float]] = []
    for _ in range(TURNS):
        start = time.perf_counter()
        _sample(run, run.config.sampler)
        between = time.perf_counter()
        _sample(run, run.network.sampler)
        times.append((between - start, time.perf_counter() - between))
    many, one = (statistics.median(each) for each in zip(*times, strict=True))
    return many / one


def _sample(run: Run, sampler: Sampler) -> UInt8[np.ndarray, "n H W C"]:
    network = run.network
    labels = resolve_labels(SHOWN, None, 0, network.config.classes)
    return network.pictures(network.sample_latents(range(SHOWN), labels, sampler))


def _show(path: Path, run: Run, record: Record, many_record: Record) -> None:
    """Samples of the same seeds and classes, in one step, in a few and in many."""

    def title(steps: str, numbers: Record) -> str:
        return f"{steps}: accuracy {numbers['class_accuracy']:.3f}, Fréchet {numbers['frechet_distance']:.2f}"

    one, many = run.network.sampler, run.config.sampler
    panels.write(
        path,
        [
            (title("1 step", record), _sample(run, one)),
            (f"{FEW} steps", _sample(run, one.with_options(steps=FEW))),
            (title(f"{many.steps} steps", many_record), _sample(run, many)),
        ],
    )
