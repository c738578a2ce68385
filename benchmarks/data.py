"""Speed of reading images from every kind of source, compared with what a training step needs.

    python benchmarks/data.py --recipe cifar10 --json-file docs/results/data.json
    python benchmarks/data.py --recipe imagenet256-s --count 512 --device cuda

Images are generated at the recipe's size, or at `--size`, and written to a temporary folder: as PNG files (a folder, a
zip, a parquet table) and as an array (npz). They are smooth with a little noise, so that they compress about as well as
photographs; pure noise does not compress, and flat colour compresses too well. Each source is read by `data.Loader`
batch by batch: decoded on demand, decoded ahead by the recipe's threads, and gathered from memory, which is what
training does with up to 1 GiB of pixels. The digits are the embedded ones, at their own size.

The files have just been written and so lie in the system's cache: this measures decoding, not a disk. The need is that
of the recipe's training step on this device, measured in the same process, or `--need`. Decoding threads take turns
with a step that runs on the same cores, so on a CPU a source that delivers k times the need costs about 1/k of the
training time.
"""

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import command
import onefold
from onefold.compute import resolve_device
from onefold.data import Loader, open_dataset
from onefold.estimate import measure
from timing import machine, seconds_of, table, taking_turns, write

CLASSES = 10


def generated(count: int, size: int, channels: int, seed: int = 0) -> np.ndarray:
    """Smooth images with about 2 % noise: uint8 (count, size, size, channels)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    coarse = generator.integers(0, 256, (count, channels, 8, 8)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (size, size), mode="bicubic").numpy()
    noisy = smooth + 4 * generator.standard_normal(smooth.shape, dtype=np.float32)
    return noisy.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def png(image: np.ndarray) -> bytes:
    """One image (H, W, C) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def write_sources(images: np.ndarray, folder: Path) -> dict[str, str]:
    """The same images as every kind of source; parquet only where pyarrow is installed."""
    files = [png(image) for image in images]
    names = [f"{k % CLASSES}/{k:06d}.png" for k in range(len(files))]
    labels = np.arange(len(files)) % CLASSES
    for name, content in zip(names, files, strict=True):
        path = folder / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in zip(names, files, strict=True):
            archive.writestr(name, content)
    np.savez(folder / "images.npz", images=images, labels=labels)
    sources = {"folder": "folder", "zip": "images.zip", "npz": "images.npz"}
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        print("parquet is left out: pip install 'onefold[parquet]'")
    else:
        pq.write_table(pa.table({"image": files, "label": labels}), folder / "images.parquet")
        sources["parquet"] = "images.parquet"
    return {kind: str(folder / name) for kind, name in sources.items()}


def measured(sources: dict[str, str], workers: int, batch: int, batches: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Images/s of each source for each way of reading."""
    ways: dict[str, dict[str, Any]] = {
        "when asked": {"workers": 0, "in_memory": False},
        f"{workers} threads ahead": {"workers": workers, "in_memory": False},
        "from memory": {"in_memory": True},
    }

    def turn(loader: Loader, ahead: int) -> float:
        for _ in range(ahead):  # what was decoded while other sources were read must not count
            next(loader)
        return seconds_of(lambda: [next(loader) for _ in range(batches)], torch.device("cpu"))

    with contextlib.ExitStack() as stack:
        turns: dict[str, Callable[[], float]] = {}
        for kind, source in sources.items():
            dataset = open_dataset(source)
            for way, options in ways.items():
                loader = stack.enter_context(Loader(dataset, batch=batch, seed=0, **options))
                turns[f"{kind}, {way}"] = partial(turn, loader, 2 * options.get("workers", 0))
        times = taking_turns(turns, rounds)
    speeds = {name: batch * batches / median(seconds) for name, seconds in times.items()}
    return {kind: {way: speeds[f"{kind}, {way}"] for way in ways} for kind in sources}


def main(
    recipe: str = "cifar10",
    size: int | None = None,
    count: int = 2048,
    batch: int = 64,
    batches: int = 8,
    rounds: int = 5,
    workers: int | None = None,
    device: str = "auto",
    seconds: float = 20.0,
    need: float | None = None,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        recipe: A recipe, for its image size and its training step.
        size: Side of the images. Default: the recipe's.
        count: Images to generate.
        batch: Images per batch.
        batches: Batches per source and round.
        rounds: Rounds that count.
        workers: Threads that decode ahead. Default: the recipe's.
        device: Device of the training step: auto, cpu, cuda, …
        seconds: Length of the measurement of the training step.
        need: Images/s of a training step, if measured elsewhere.
        json_file: Where to write all numbers.
    """
    config = onefold.recipe(recipe, training={"device": device})
    network, where = config.network, machine(resolve_device(device))
    side = size or network.image_size[0]
    workers = config.data.workers if workers is None else workers
    if need is None:
        sized = replace(config, network=replace(network, image_size=(side, side)))
        need = measure(sized, seconds).images_per_second
    with tempfile.TemporaryDirectory() as folder:
        images = generated(count, side, network.channels)
        sources = {"digits": "digits", **write_sources(images, Path(folder))}
        packed = sum(path.stat().st_size for path in Path(folder, "folder").rglob("*.png")) / images.nbytes
        found = measured(sources, workers, batch, batches, rounds)
    print(f"{count:,} images of {side}×{side}×{network.channels}, PNG files {packed:.2f} of the pixels' size; ", end="")
    print(f"{recipe}'s training step takes {need:,.1f} images/s; load before {where['load']:.1f}\n")
    ways = list(found["digits"])
    rows = [
        [kind, *(f"{speed:,.0f} ({speed / need:,.1f})" for speed in speeds.values())] for kind, speeds in found.items()
    ]
    print(table(["source: images/s (times the need)", *ways], rows))
    settings = {"recipe": recipe, "size": side, "count": count, "batch": batch, "workers": workers, "packed": packed}
    write({**where, **settings, "need": need, "images_per_second": found}, json_file)


if __name__ == "__main__":
    command.run(main)
