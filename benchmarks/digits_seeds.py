"""The recipe `digits` over several seeds: mean and spread of every number, as JSON and as a Markdown table.

    python benchmarks/digits_seeds.py --seeds 3 --out runs/digits-seeds --json-file docs/results/digits.json

A finished seed is not trained again; an interrupted one is continued. Beside every number with its mean, standard
deviation and values, the file has under "records" the protocol and the subject of each seed.
"""

import json
from pathlib import Path
from statistics import mean, stdev

import command
import onefold
from onefold.evaluation import evaluate
from onefold.metrics import Record

ROWS = {
    "frechet.ratio": "Fréchet distance ÷ that of real halves",
    "frechet.matched": "Fréchet distance, 718 generated to 718 real",
    "frechet.halves": "Fréchet distance, 718 real to 718 real",
    "frechet_distance": "Fréchet distance, 1,437 to 1,437",
    "frechet.floor": "the same of 1,437 fresh real images",
    "test.frechet_distance": "Fréchet distance to the 360 test images",
    "test.floor": "the same of the 1,437 training images",
    "test.kid": "kernel distance (KID) to the test images",
    "test.precision": "precision, against the test images",
    "test.recall": "recall, against the test images",
    "kid": "kernel distance (KID)",
    "class_accuracy": "class accuracy of samples",
    "class_accuracy_real": "class accuracy of real test images",
    "precision": "precision",
    "recall": "recall",
    "memorisation.share": "share of near copies (0.05 by chance)",
    "reconstruction.psnr": "PSNR of test images, dB",
    "reconstruction.ssim": "SSIM of test images",
    "latent.effective_rank": "effective rank of latents, of 4 per token",
    "latent.std": "standard deviation of latents",
    "minutes": "minutes of training, pictures and compilation",
}


def record_of(folder: Path, seed: int) -> Record:
    """Train (or continue) one seed, evaluate it, and return its record."""
    if (folder / "config.json").exists():
        run = onefold.train(None, folder, resume=True)
    else:
        run = onefold.train(onefold.recipe("digits", training={"seed": seed}), folder)
    record = evaluate(run)
    record.write(folder / "evaluation" / "demo.json")
    written = (folder / "model" / "model.safetensors").stat().st_mtime
    record["minutes"] = (written - (folder / "config.json").stat().st_mtime) / 60
    return record


def main(seeds: int = 3, out: Path = Path("runs/digits-seeds"), json_file: Path | None = None) -> None:
    """Train, evaluate and summarise."""
    command.check_out(out)
    records = [record_of(out / f"seed{seed}", seed) for seed in range(seeds)]
    numbers = [record.numbers() for record in records]
    summary = {
        name: {"mean": mean(values), "std": stdev(values), "values": values}
        for name in ROWS
        for values in [[found[name] for found in numbers]]
    }
    print(f"| {seeds} seeds | mean | standard deviation |\n|---|---|---|")
    for name, title in ROWS.items():
        print(f"| {title} | {summary[name]['mean']:.3f} | {summary[name]['std']:.3f} |")
    if json_file is not None:
        about = [{name: record[name] for name in ("protocol", "subject")} for record in records]
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"records": about, **summary}, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
