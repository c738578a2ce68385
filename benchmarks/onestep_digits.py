"""One-step generators of trained runs of `digits`: one step, few steps and the verifier, compared with many steps.

    onefold train digits --out runs/digits0 --training.seed 0      # and so on for seeds 1 and 2
    python benchmarks/onestep_digits.py runs/digits0 runs/digits1 runs/digits2 --method ratio

Every number of up to four steps is the mean of three records, from samples with different seeds: a single evaluation of
so few images has a spread of a tenth of the distance. More steps cost more, and have one record. The evaluation is that
of `onefold evaluate`, with the same reference images, labels and seeds in all rows. A finished conversion is not
repeated; an interrupted one is continued.

The file has for each row the mean, standard deviation and values over runs of every number, and under "records" the
protocol and the subject of each run; the protocol's seed is that of the first of its three evaluations.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from tyro.conf import Positional

import command
import onefold
from onefold.evaluation import evaluate
from onefold.networks import Network, RatioNet
from onefold.objectives.one_step import Method
from onefold.sampling import Sampler
from onefold.training.conversion import converted
from onefold.training.phases import phases_of
from onefold.training.run import Run
from onefold.verifier import Verifier

COLUMNS = {
    "frechet_distance": "Fréchet distance",
    "frechet.floor": "of fresh images",
    "frechet.ratio": "÷ real halves",
    "test.frechet_distance": "to test images",
    "test.floor": "of training images",
    "class_accuracy": "class accuracy",
    "precision": "precision",
    "recall": "recall",
    "test.kid": "KID to test images",
    "test.precision": "precision, test",
    "test.recall": "recall, test",
    "memorisation.share": "near copies",
    "reconstruction.psnr": "PSNR, dB",
    "images_per_second": "images/s",
}

SEEDS = (0, 10_000, 20_000)
"""Seed of the first sample of each evaluation."""
CHEAP = 4
"""Steps up to which there is more than one evaluation."""


class Measured(NamedTuple):
    """A row of one run."""

    numbers: dict[str, float]
    """Mean over evaluations of each of `COLUMNS`."""
    about: dict[str, Any]
    """Protocol of the first evaluation, and subject."""


def measured(run: Run, sampler: Sampler | None = None, verifier: Any = None) -> Measured:
    """A row: the mean over evaluations of a run, of up to `CHEAP` steps with each of `SEEDS`."""
    seeds = SEEDS if (sampler or run.network.sampler).steps <= CHEAP else SEEDS[:1]
    records = [evaluate(run, sampler=sampler, seed=seed, verifier=verifier) for seed in seeds]
    numbers = {key: mean(record.numbers()[key] for record in records) for key in COLUMNS}
    return Measured(numbers, {name: records[0][name] for name in ("protocol", "subject")})


def summarised(found: list[dict[str, Measured]]) -> dict[str, dict[str, Any]]:
    """Rows over runs, printed as a table: mean, standard deviation and values of each column, and the records."""
    print(f"| {len(found)} seeds | {' | '.join(COLUMNS.values())} |\n|---|{'---:|' * len(COLUMNS)}")
    summary: dict[str, dict[str, Any]] = {}
    for row in found[0]:
        values = {key: [rows[row].numbers[key] for rows in found] for key in COLUMNS}
        spread = {key: stdev(seen) if len(seen) > 1 else None for key, seen in values.items()}
        summary[row] = {key: {"mean": mean(values[key]), "std": spread[key], "values": values[key]} for key in COLUMNS}
        summary[row]["records"] = [rows[row].about for rows in found]
        cells = [f"{mean(seen):.3g}" + (f" ± {spread[key]:.2g}" if spread[key] else "") for key, seen in values.items()]
        print(f"| {row} | {' | '.join(cells)} |")
    return summary


def rows_of(teacher: Run, fast: Run, *, brief: bool) -> dict[str, Measured]:
    """What is measured of one run and of its one-step generator, by row."""
    one = fast.network.sampler

    def chosen(choice: Any) -> Measured:
        def chooser(network: Network) -> Verifier:
            return Verifier(network, RatioNet.from_pretrained(fast.folder / "ratio"), 4, choice)

        return measured(fast, verifier=chooser)

    if brief:
        return {"1 step": measured(fast)}
    rows = {
        "50 steps, before": measured(teacher),
        "50 steps, after": measured(fast, Sampler(50)),
        "1 step, before": measured(teacher, one),
        "1 step": measured(fast),
        **{f"{steps} steps": measured(fast, one.with_options(steps=steps)) for steps in (2, 4, 8, 16)},
    }
    if (fast.folder / "ratio").exists():
        rows |= {"best of 4": chosen("best"), "resampled from 4": chosen("resample")}
    return rows


def updates_of(run: Run) -> int:
    """Updates of the generator in a whole run."""
    both = phases_of(run.config)[-1].parts[-1]
    return both.updates(run.length - 1, run.config.training.batch, both.start)


def main(
    runs: Positional[tuple[Path, ...]],
    /,
    method: Method = "ratio",
    rank: int | None = None,
    images: int | None = None,
    brief: bool = False,
    json_file: Path | None = None,
) -> None:
    """Convert by a method on so many images (default: as `onefold onestep`), evaluate and summarise.

    `brief`: only the row of one step.
    """
    found: list[dict[str, Measured]] = []
    minutes: list[float] = []
    updates = changed = 0
    for folder in runs:
        out = folder.with_name("-".join([folder.name, method, *(str(n) for n in (images, rank) if n is not None)]))
        begun = (out / "config.json").exists()
        config = converted(folder, images=images, method=method, rank=rank)
        fast = onefold.train(None, out, resume=True) if begun else onefold.train(config, out)
        written = (out / "curves.png").stat().st_mtime
        minutes.append((written - (out / "config.json").stat().st_mtime) / 60)
        updates, changed = updates_of(fast), fast.config.network.jump_rank
        found.append(rows_of(onefold.load_run(folder), fast, brief=brief))
    summary = summarised(found)
    print("\nminutes:", ", ".join(f"{m:.1f}" for m in minutes))
    if json_file is not None:
        about = {"onefold": onefold.__version__, "method": method, "minutes": minutes, "seeds of samples": SEEDS}
        about |= {"generator updates": updates, "rank": changed, "rows": summary}
        json_file.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main)
