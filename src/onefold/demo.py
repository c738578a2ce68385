"""The demo: train on the embedded digits, sample, evaluate, and say where the pictures are."""

import time
from pathlib import Path

from rich.console import Console

from onefold import tables
from onefold.data import open_dataset
from onefold.evaluation import evaluate
from onefold.recipes import recipe
from onefold.training.grids import sample_grid
from onefold.training.loop import train

__all__ = ["run_demo"]


def run_demo(out: Path, seed: int, console: Console, *, quiet: bool = False) -> None:
    """Train the recipe `digits` into `out`, or continue what is there, and show the results.

    Raises:
        UserError: `out` holds something else.
    """
    started = time.perf_counter()
    config = recipe("digits", **{"training.seed": seed})
    if (out / "config.json").exists():
        run = train(None, out, resume=True, quiet=quiet)
    else:
        console.print(
            f"One network of {config.network.depth} blocks learns to encode, denoise and decode "
            f"{len(open_dataset('digits')):,} handwritten digits, from random weights."
        )
        run = train(config, out, quiet=quiet)
    console.print(f"training and pictures: {tables.duration(time.perf_counter() - started)}")
    record = evaluate(run, say=lambda line: console.print(f"[dim]{line}"))
    record.write(out / "evaluation" / "demo.json")
    picture = out / "samples.png"
    sample_grid(run.network, picture, count=100, sampler=run.config.sampler, columns=10)
    tables.show_record(console, record)
    newest = sorted((out / "samples").glob("*-reconstructions.png"))[-1]
    console.print(f"samples, a column per class: {picture}")
    console.print(f"test images above their reconstructions: {newest}")
    console.print(f"the run: {out}; the record: {out / 'evaluation' / 'demo.json'}")
