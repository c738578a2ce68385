"""`onefold demo`: train on the embedded digits, make a one-step generator, evaluate both, and show the pictures."""

import statistics
import time
from pathlib import Path

from onefold.commands import tables
from onefold.commands.terminal import console
from onefold.data import open_dataset
from onefold.errors import Interrupted, UserError
from onefold.evaluation import evaluate
from onefold.metrics import Record
from onefold.pictures import panels
from onefold.pictures.grids import sample_grid
from onefold.recipes import recipe
from onefold.sampling import resolve_labels
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.conversion import converted
from onefold.training.loop import train
from onefold.training.prepare import fit_to_data
from onefold.training.run import Run, load_run

__all__ = ["demo"]

SHOWN = 100
TURNS = 5
"""Measurements of each speed."""


def demo(out: Path = Path("demo"), seed: int = 0, quiet: bool = False) -> None:
    """Train on the embedded digits, sample, evaluate, and show where the pictures are.

    Example: onefold demo --out demo

    Args:
        out: Folder of the demo; a finished or interrupted one is continued.
        seed: Seed of the training.
        quiet: No progress bar.
    """
    config = recipe("digits", **{"training.seed": seed})
    console.print(
        f"One network of {config.network.depth} blocks learns to encode, denoise and decode "
        f"{len(open_dataset('digits')):,} handwritten digits, from random weights."
    )
    run = _train(config, out, quiet=quiet)
    record = _evaluate(run)
    picture = out / "samples.png"
    sample_grid(run.network, picture, count=SHOWN, columns=10)
    newest = sorted((out / "samples").glob("*-reconstructions.png"))[-1]
    console.print(f"samples, a column per class: {picture}")
    console.print(f"test images above their reconstructions: {newest}\n")

    console.print("The same weights become a one-step generator, taught by their own score.")
    fast = _train(converted(out), out.with_name(f"{out.name}-onestep"), quiet=quiet)
    fast_record = _evaluate(fast)
    both = fast.folder / "one-step.png"
    _show(both, run, fast, record, fast_record)
    times = _times_as_fast(run, fast)
    console.print(f"one step instead of {run.config.sampler.steps}: {times:.0f} times as many images per second")
    console.print(f"{run.config.sampler.steps} steps, one step before and one step after, side by side: {both}")
    console.print(f"the runs: {out}, {fast.folder}; the records: evaluation/demo.json in both")


def _train(config: Config, folder: Path, *, quiet: bool) -> Run:
    """Train, or continue what is in the folder; says how long it took.

    Raises:
        UserError: another run is in the folder.
        Interrupted: as of `train`; the same command goes on.
    """
    started, begun = time.perf_counter(), (folder / "config.json").exists()
    if begun:
        found = load_run(folder)
        decided = {f"training.{name}": getattr(found.config.training, name) for name in ("precision", "compile")}
        if found.config != fit_to_data(config.with_changes(decided), found.open_data()[0]):
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


def _evaluate(run: Run) -> Record:
    record = evaluate(run, say=lambda line: console.print(line, style="dim"))
    record.write(run.folder / "evaluation" / "demo.json")
    tables.show_record(console, record)
    return record


def _times_as_fast(run: Run, fast: Run) -> float:
    """How many times as fast one step is, by the medians of measurements in turns: a busy moment slows both down."""
    times: list[tuple[float, float]] = []
    for _ in range(TURNS):
        start = time.perf_counter()
        run.network.sample(SHOWN)
        between = time.perf_counter()
        fast.network.sample(SHOWN)
        times.append((between - start, time.perf_counter() - between))
    many, one = (statistics.median(each) for each in zip(*times, strict=True))
    return many / one


def _show(path: Path, run: Run, fast: Run, record: Record, fast_record: Record) -> None:
    """Samples of the same seeds and classes: many steps, one step before, one step after."""
    steps = run.config.sampler.steps

    def title(text: str, numbers: Record) -> str:
        return f"{text}: accuracy {numbers['class_accuracy']:.3f}, Fréchet {numbers['frechet_distance']:.2f}"

    many = run.network.sample(SHOWN)
    labels = resolve_labels(SHOWN, None, 0, run.network.config.classes)
    start = run.network.sample_latents(range(SHOWN), labels, fast.network.sampler)
    before, after = run.network.pictures(start), fast.network.sample(SHOWN)
    panels.write(
        path,
        [
            (title(f"{steps} steps", record), many),
            ("1 step of the same network, before", before),
            (title("1 step, after", fast_record), after),
        ],
    )
