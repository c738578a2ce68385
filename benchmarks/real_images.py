"""What a run of real images has come to: its numbers in one step and in more, and sheets of 1,000 samples.

    python benchmarks/real_images.py runs/cifar10 --features features-cifar10.safetensors --out docs/results/cifar10

Each row is the record of `onefold evaluate` with 10,000 images: against as many training images and all test images,
unguided, with the last average, seed 0. Reconstructions, which no sampler changes, are measured once. `OUT.json` has
the rows with protocol and subject; more steps can be measured later, into the same file. Each row has a sheet of
samples of the seeds 0 to 999, with classes in turn, 40 in a line, without gaps, lossless: `OUT-1-step.png`,
`OUT-4-steps-refined.png`, and of the denoiser `OUT-50-steps.png`.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tyro.conf import Positional

import command
import onefold
from onefold import metrics
from onefold.compute import resolve_device, sampling_context
from onefold.evaluation import evaluate
from onefold.extractor import extractor_for
from onefold.pictures.grids import grid, save_png
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.training.run import Run

SHEET, COLUMNS = 1000, 40


def samplers(run: Run, steps: tuple[int, ...], *, denoiser: bool) -> dict[str, Sampler]:
    """How each row samples, by name: a one-step generator's own way in so many steps, and the denoiser in 50."""
    own = run.network.sampler
    rows = {f"{k} step" if k == 1 else f"{k} steps": own.with_options(steps=k) for k in steps if own.jumps}
    return {**rows, "denoiser, 50 steps": Sampler(50)} if denoiser else rows


def ending(row: str) -> str:
    """A row's name as the ending of its sheet's file."""
    words = row.removeprefix("denoiser, ") if row.startswith("denoiser") or row == "1 step" else f"{row} refined"
    return words.replace(", guidance ", "-guided-").replace(" ", "-")


def rows_before(json_file: Path, model: str, extractor: str, images: int) -> dict[str, Any]:
    """The rows of an earlier call, which must be of the same network, features and number of images."""
    rows: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {}
    for name, row in rows.items():
        found = row["subject"]["model_sha256"], row["protocol"]["extractor_sha256"], row["protocol"]["generated_images"]
        if found != (model, extractor, images):
            raise SystemExit(
                f"{json_file}: its row {name!r} is of another network, features or --images; choose another --out"
            )
    return rows


def sheet(run: Run, sampler: Sampler, device: torch.device, precision: Precision) -> np.ndarray:
    """Samples of the seeds 0 to 999, with classes in turn, side by side."""
    network, classes = run.network.to(device), run.network.config.classes
    labels = [k % classes for k in range(SHEET)] if classes else None
    with sampling_context(network, device, precision=precision):
        images = network.pictures(network.sample_latents(range(SHEET), labels, sampler, batch=500))
    return grid(images, columns=COLUMNS, scale=1, gap=0)


def main(
    run: Positional[Path],
    /,
    out: Path,
    features: Path | None = None,
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50),
    images: int = 10_000,
    denoiser: bool = True,
    guidance: float | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Evaluate a run, and draw its sheets.

    Args:
        run: The run's folder.
        out: Where to write; endings are added.
        features: File of the feature extractor. Default: a small classifier, as in `onefold evaluate`.
        steps: Rows of a one-step generator.
        images: Samples of each row.
        denoiser: Also a row of the denoiser in 50 steps.
        guidance: Also a row of the denoiser with this guidance.
        device: auto, cpu, cuda, …
        precision: Of matrix products of sampling.
    """
    found, on = onefold.load_run(run), resolve_device(device)
    data = found.open_data()[0]
    extractor = extractor_for(data, print, on) if features is None else metrics.from_file(features, device=str(on))
    ways = samplers(found, steps, denoiser=denoiser)
    if guidance is not None:
        ways[f"denoiser, 50 steps, guidance {guidance:g}"] = Sampler(50, guidance=guidance)
    out.parent.mkdir(parents=True, exist_ok=True)
    json_file = out.with_name(f"{out.name}.json")
    rows = rows_before(json_file, found.model_sha256, extractor.sha256, min(images, len(data)))
    record = None
    for name, sampler in ways.items():
        if name in rows:
            print(f"{name}: kept, as it is in {json_file}")
            continue
        start = time.perf_counter()
        record = evaluate(
            found,
            sampler=sampler,
            images=images,
            extractor=extractor,
            batch=500,
            device=on,
            precision=precision,
            reconstructions=record,
        )
        rows[name] = record
        json_file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        numbers = record.numbers()
        shown = ("frechet_distance", "test.frechet_distance", "class_accuracy", "precision", "recall")
        told = ", ".join(f"{key} {numbers[key]:.3f}" for key in shown if key in numbers)
        print(f"{name}: {told}; {time.perf_counter() - start:.0f} s", flush=True)
        about = {"seeds": f"0 to {SHEET - 1}", "classes": "in turn", "model": record["subject"]["model_sha256"]}
        save_png(out.with_name(f"{out.name}-{ending(name)}.png"), sheet(found, sampler, on, precision), about)


if __name__ == "__main__":
    command.run(main)
