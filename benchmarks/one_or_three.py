"""One network versus three on larger images than the digits, at a short and equal budget.

    python benchmarks/one_or_three.py --data cifar10-train.zip --out runs/one-or-three \
        --json-file docs/results/one-or-three-cifar10.json

The recipe `cifar10` on a network small enough for a laptop, trained on so few images that nothing converges: it shows
how fast each starts, not where it ends. It reports quality, parameters and arithmetic of one network, of three with as
many parameters in total, and of three with as much compute per role; `onefold estimate cifar10 --architecture …`
measures time and memory. An interrupted study is continued.
"""

import json
from pathlib import Path
from typing import Any

import command
from onefold.networks.base import build
from onefold.studies import collapse, run_study
from onefold.studies.table import trial_numbers
from onefold.training.phases import training_flops

ARMS = ("ema", "three-networks", "three-networks-compute")
SMALL = {"network.width": 128, "network.depth": 6, "training.batch": 64, "training.warmup": 3_200}
SMALL |= {"training.ema_half_lives": (5_000,), "sampler.steps": 25, "objective.decoder_noise": 0.5}

NUMBERS = ("frechet_distance", "class_accuracy", "recall", "reconstruction.psnr", "reconstruction.frechet_distance")


def main(
    data: str,
    out: Path = Path("runs/one-or-three"),
    budget: int = 25_600,
    seeds: int = 1,
    images: int = 1_000,
    jobs: int = 1,
    arms: tuple[str, ...] = ARMS,
    json_file: Path | None = None,
) -> None:
    """Train, evaluate and print.

    Args:
        data: Images to train on.
        out: Folder of the study.
        budget: Images that each network is trained on.
        seeds: Seeds of each arm.
        images: Generated and reference images per evaluation.
        jobs: Trainings at a time.
        arms: Arms of `onefold study collapse`; others serve to confirm a choice of defaults on colour images.
        json_file: Where to write all numbers.
    """
    study = collapse(data, budget=budget, seeds=seeds, arms=arms, draws=2, name="cifar10", images=images, changes=SMALL)
    rows: list[dict[str, Any]] = []
    for trial in run_study(study, out, jobs=jobs, say=print):
        config, numbers = trial.config, trial_numbers(trial)
        row: dict[str, Any] = {"arm": trial.arm.name, "seed": trial.seed}
        row["parameters"] = sum(p.numel() for p in build(config.network).parameters())
        row["training_flops_per_image"] = training_flops(config)
        rows.append(row | {name: numbers[name] for name in NUMBERS if name in numbers})
    titles = list(rows[0])
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if json_file is not None:
        about = {"budget": budget, "settings": SMALL, "images": images, "rows": rows}
        json_file.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
