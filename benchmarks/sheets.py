"""Measure sheets of samples, as `real_images.py` draws them, by class accuracy and distance to test images.

    python benchmarks/sheets.py cifar10-1-step.png cifar10-50-steps.png --test cifar10-test.zip \
        --features features-cifar10.safetensors --json-file docs/results/cifar10-sheets.json

Image k of a sheet, 40 in a line, has class k mod K. As many test images, drawn at random and measured against the rest,
are the last row: of so few images, distances are far above those of 10,000, and compare only with each other.
"""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tyro.conf import Positional

import command
from onefold import metrics
from onefold.data import open_dataset, read_all
from real_images import COLUMNS, SHEET


def images_of(sheet: Path, shape: tuple[int, int, int]) -> UInt8[Tensor, "n C H W"]:
    """The images of a sheet, of this (H, W, C), row by row."""
    height, width, channels = shape
    pixels = np.array(Image.open(sheet)).reshape(SHEET // COLUMNS, height, COLUMNS, width, channels)
    return torch.from_numpy(pixels.transpose(0, 2, 4, 1, 3).reshape(SHEET, channels, height, width).copy())


def main(sheets: Positional[tuple[Path, ...]], /, test: str, features: Path, json_file: Path | None = None) -> None:
    """Print, and write, the numbers of each sheet."""
    data, extractor = open_dataset(test), metrics.from_file(features)
    x, y = read_all(data)
    real = extractor.features(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    few, rest = order[:SHEET], order[SHEET:]
    found = {"test images": _numbers(extractor, x[few], y[few], real[rest])}
    labels = torch.arange(SHEET) % data.classes
    for sheet in sheets:
        found[sheet.stem] = _numbers(extractor, images_of(sheet, data.image_shape), labels, real)
    for name, numbers in found.items():
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    if json_file is not None:
        about = {"test_data_sha256": data.digest(), "extractor_sha256": extractor.sha256, "images": SHEET}
        json_file.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


def _numbers(extractor: metrics.FeatureExtractor, x: Tensor, y: Tensor, real: Tensor) -> dict[str, float]:
    distance = metrics.frechet_distance(real, extractor.features(x))
    return {"class_accuracy": metrics.class_accuracy(extractor, x, y), "frechet_distance": distance}


if __name__ == "__main__":
    command.run(main)
