"""Pictures of a run of real images, and whether it remembers its training images.

    python benchmarks/real_pictures.py runs/cifar10 docs/results/cifar10-1-step.png \
        --features features-cifar10.safetensors --out docs/results/cifar10 --json-file docs/results/cifar10-memory.json

The samples are those of a sheet that `real_images.py` drew. `OUT-curves.png` is the run's log over images seen and over
time. `OUT-nearest.png` has the first samples, none picked, above their two nearest training images in pixels and their
two nearest in features. `OUT-between.png` walks from seed to seed with one class a row, and from class to class with
one seed a row, by the run's own sampler.

Memory is measured in two ways.

**Whose is the nearest image?** Real images are put into groups as large as the test set: the test images are one, and
the training images are split at random into G others. A sample that owes nothing to single training images has its
nearest image in each of the G + 1 with the same probability, however smooth it is, for that brings it nearer to all. A
copy has it among training images. Distances are those of pixels, and of *patterns*: pixels without mean colour and
contrast. If a run mirrors its training images, mirror images count as images. Test images, each left out of its group,
are the control.

**Near copies**, as `onefold evaluate` counts them: what is nearer, in pixels, to the first group of training images
than all but a twentieth of the test images are. The same is counted of samples among the test images; of test images
that were filtered to the samples' power spectrum; and of test images as smooth as the samples, one for each.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tyro.conf import Positional

import command
import onefold
from onefold import metrics
from onefold.compute import resolve_device, sampling_context
from onefold.data import read_all
from onefold.evaluation import drawn
from onefold.extractor import extractor_for
from onefold.networks import Network
from onefold.pictures import curves
from onefold.pictures.grids import grid, save_png
from onefold.report.pictures import COLUMNS, between
from onefold.settings import Precision
from sheets import images_of

SHOWN, NEAREST = 30, 2
"""Samples that are shown with their nearest images, and how many of these."""
PANELS = ("losses", "reconstruction of test", "velocity loss", "generator", "samples relative", "Fréchet")
"""Curves that are drawn, by the beginning of their titles."""
QUANTILE = 0.05
BLOCK = 2048
GAP = 5
"""White pixels between the parts of a picture."""

Images = UInt8[Tensor, "n C H W"]
Picture = UInt8[np.ndarray, "H W C"]


# --- the nearest of many images ---------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The nearest rows of a pool, the nearest first: their distances, and their numbers in the pool."""

    distance: Float[Tensor, "n count"]
    index: Int64[Tensor, "n count"]


def nearest(rows: Tensor, pool: Tensor, count: int = 1, left_out: Tensor | None = None) -> Found:
    """The `count` nearest rows of a pool (m, d), number `left_out` of each excepted; in float32, exact to some 1e-5."""
    centre = pool.float().mean(0)
    x = rows.float() - centre
    found = Found(torch.full((len(x), count), torch.inf), torch.zeros(len(x), count, dtype=torch.int64))
    for start in range(0, len(pool), BLOCK):
        y = pool[start : start + BLOCK].float() - centre
        norms = x.square().sum(1)[:, None] + y.square().sum(1)
        distance = torch.addmm(norms, x, y.T, alpha=-2.0).clamp(min=0).sqrt()
        index = torch.arange(start, start + len(y)).expand(len(x), -1)
        if left_out is not None:
            distance = distance.where(index != left_out[:, None], torch.inf)
        least = torch.cat([found.distance, distance], 1).topk(count, largest=False)
        found = Found(least.values, torch.cat([found.index, index], 1).gather(1, least.indices))
    return found


def flat(x: Images) -> UInt8[Tensor, "n d"]:
    """Pixels."""
    return x.flatten(1)


def pattern(x: Images) -> Float[Tensor, "n d"]:
    """Pixels without mean colour and contrast: less the mean of each channel, of unit norm."""
    rows = (x.float() - x.float().mean((2, 3), keepdim=True)).flatten(1)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1)


def contest(
    images: Images, groups: Sequence[Images], of: Callable[[Images], Tensor], *, mirrors: bool, own: bool = False
) -> dict[str, Any]:
    """The share of images whose nearest is in each group, and of those that have it twice as near as all other groups.

    Args:
        images: Whose nearest ones are looked for.
        groups: Of as many images each, those of the test the last.
        of: What is compared.
        mirrors: Whether the mirror images of the groups belong to them.
        own: The images are the first of the last group, and none is its own neighbour.
    """
    rows, last = of(images), len(groups) - 1
    reached: list[Tensor] = []
    for k, group in enumerate(groups):
        left_out = torch.arange(len(rows)) if own and k == last else None
        sides = (group, group.flip(3)) if mirrors else (group,)
        near = [nearest(rows, of(side), left_out=left_out).distance[:, 0] for side in sides]
        reached.append(torch.stack(near).amin(0))
    distances = torch.stack(reached, 1)
    shares = torch.bincount(distances.argmin(1), minlength=len(groups)).double() / len(rows)
    first, second = distances.sort(1).values[:, :2].unbind(1)
    twice = (2 * first <= second).double().mean().item()
    return {"test": shares[last].item(), "training": shares[:last].tolist(), "twice_as_near": twice}


# --- smoothness -------------------------------------------------------------------------------------------------------


def smoothness(x: Images) -> Float[Tensor, "n 2"]:
    """Contrast and sharpness of each image, in grey levels.

    Contrast is the standard deviation of pixels about their channels' means, sharpness the root mean square of the
    differences between neighbours.
    """
    values = x.float()
    contrast = (values - values.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    steps = [values.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3)]
    return torch.stack([contrast, (steps[0] + steps[1]) / 2], 1).sqrt()


def alike(x: Images, pool: Images) -> Int64[Tensor, " n"]:
    """For each image the number of the one in the pool with the most similar logarithms of contrast and sharpness."""
    a, b = (smoothness(images).log1p() for images in (x, pool))
    return nearest(a / b.std(0), b / b.std(0)).index[:, 0]


def filtered(x: Images, like: Images) -> Images:
    """The images, each frequency of each channel scaled so that its mean power is that of the images `like`."""
    means = [images.float().mean((0, 2, 3), keepdim=True) for images in (x, like)]
    waves = [torch.fft.rfft2(images.float() - mean) for images, mean in zip((x, like), means, strict=True)]
    own, wanted = (each.abs().square().mean(0) for each in waves)
    gain = (wanted / own.clamp(min=1e-12)).sqrt()
    new = torch.fft.irfft2(waves[0] * gain, s=x.shape[2:]) + means[1]
    return new.round().clamp(0, 255).to(torch.uint8)


def near_copies(samples: Images, train: Images, test: Images) -> dict[str, dict[str, float]]:
    """Shares of near copies, with contrast and sharpness: of samples, and of test images, which cannot remember."""
    rows, pool, held_out = samples.flatten(1), train.flatten(1), test.flatten(1)
    real = nearest(held_out, pool).distance
    smooth, spectral = test[alike(samples, test)], filtered(test[: len(samples)], samples)
    found = {
        "samples": (samples, nearest(rows, pool).distance),
        "samples, among test images": (samples, nearest(rows, held_out).distance),
        "test images": (test, real),
        "test images with the samples' spectrum": (spectral, nearest(spectral.flatten(1), pool).distance),
        "test images as smooth as the samples": (smooth, nearest(smooth.flatten(1), pool).distance),
    }
    threshold = real.quantile(QUANTILE)
    told: dict[str, dict[str, float]] = {}
    for name, (images, distances) in found.items():
        contrast, sharpness = smoothness(images).mean(0).tolist()
        share = (distances <= threshold).double().mean().item()
        told[name] = {"share": share, "contrast": contrast, "sharpness": sharpness}
    return told


# --- pictures ---------------------------------------------------------------------------------------------------------


def pixels(x: Images) -> UInt8[np.ndarray, "n H W C"]:
    return x.permute(0, 2, 3, 1).numpy()


def together(parts: Sequence[Picture], axis: int) -> Picture:
    """Pictures of the same height (axis 1) or width (axis 0), with white between them."""
    shape = list(parts[0].shape)
    shape[axis] = GAP
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([piece for part in parts for piece in (part, white)][:-1], axis)


def above(samples: Images, pool: Images, of: Callable[[Images], Tensor]) -> Picture:
    """A row of the nearest images of a pool, and one of the second nearest."""
    index = nearest(of(samples), of(pool), NEAREST).index
    return grid(pixels(pool[index.T.flatten()]), columns=len(samples), scale=1)


@torch.no_grad()
def between_classes(network: Network, pairs: Sequence[tuple[int, int]]) -> UInt8[np.ndarray, "n H W C"]:
    """For each pair, the images of one seed while the class vector goes straight from one class's to the other's."""
    labels = network.get_submodule("labels")
    table: Tensor = labels.get_parameter("weight")
    way = torch.linspace(0, 1, COLUMNS, device=table.device)[:, None]
    vectors = torch.cat([torch.lerp(table[a], table[b], way) for a, b in pairs])
    seeds = [k for k in range(len(pairs)) for _ in range(COLUMNS)]
    hook = labels.register_forward_hook(lambda module, y, vector: vectors)
    try:
        return network.pictures(network.sample_latents(seeds, [0] * len(seeds), network.sampler, batch=len(seeds)))
    finally:
        hook.remove()


def walks(network: Network) -> Picture:
    """Between seeds, with classes 0 to 4 and 5 to 9, one a row; and between classes 0 and 1, 2 and 3, …"""
    rows, classes = COLUMNS // 2, network.config.classes
    blocks = np.split(between(network, rows=2 * rows), 2)
    if classes > 1:
        blocks.append(between_classes(network, [(2 * k % classes, (2 * k + 1) % classes) for k in range(rows)]))
    return together([grid(images, columns=COLUMNS, scale=1) for images in blocks], axis=1)


def main(
    run: Positional[Path],
    sheet: Positional[Path],
    /,
    out: Path,
    features: Path | None = None,
    json_file: Path | None = None,
    searched: int = 2000,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Draw the pictures; print, and write, the numbers.

    Args:
        run: The run's folder.
        sheet: Samples of the run, as `real_images.py` draws them.
        out: Where to write; endings are added.
        features: File of the feature extractor. Default: a small classifier, as in `onefold evaluate`.
        json_file: Where to write the numbers.
        searched: Training images in which neighbours in features are looked for.
        device: auto, cpu, cuda, …
        precision: Of matrix products of sampling.
    """
    found, on = onefold.load_run(run), resolve_device(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = [panel for panel in curves.PANELS if panel.title.startswith(PANELS)]
    curves.write(found.history, out.with_name(f"{out.name}-curves.png"), shown)
    with sampling_context(found.network, on, precision=precision):
        save_png(out.with_name(f"{out.name}-between.png"), walks(found.network))

    train_data, test_data = found.open_data()
    samples = images_of(sheet, train_data.image_shape)
    test = read_all(test_data, drawn(test_data, len(test_data), 0))[0]
    train = read_all(train_data, drawn(train_data, len(train_data), 0))[
        0
    ]  # the first: as `onefold evaluate` draws them
    extractor = extractor_for(train_data, device=on) if features is None else metrics.from_file(features, device=on)
    first = samples[:SHOWN]
    rows = [grid(pixels(first), columns=SHOWN, scale=1), above(first, train, flat)]
    rows.append(above(first, train[:searched], extractor.features))
    save_png(out.with_name(f"{out.name}-nearest.png"), together(rows, axis=0))

    record: dict[str, Any] = {
        "images": len(samples),
        "model_sha256": found.model_sha256,
        "data_sha256": train_data.digest(),
        "test_data_sha256": test_data.digest(),
        **measured(samples, train, test, mirrors=found.config.objective.flip),
    }
    print(json.dumps(record, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def measured(samples: Images, train: Images, test: Images, *, mirrors: bool) -> dict[str, Any]:
    """The numbers of a record; training images beyond whole groups are left out."""
    groups = [train[start : start + len(test)] for start in range(0, len(train) - len(test) + 1, len(test))]
    told: dict[str, Any] = {"group": len(test), "expected": 1 / (1 + len(groups))}
    told["near"] = near_copies(samples, groups[0], test)
    for name, of in (("pixels", flat), ("pattern", pattern)):
        told[name] = {
            "samples": contest(samples, [*groups, test], of, mirrors=mirrors),
            "test images": contest(test[: len(samples)], [*groups, test], of, mirrors=mirrors, own=True),
        }
    return told


if __name__ == "__main__":
    command.run(main)
