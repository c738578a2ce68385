"""`onefold data inspect`, `convert` and `stats`."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from onefold import data, metrics
from onefold.commands.terminal import console
from onefold.errors import writing
from onefold.extractor import extractor_for
from onefold.training.log import ImageProgress

__all__ = ["convert", "inspect", "stats"]


def inspect(source: Positional[str], /, all: bool = False, sheet: Path | None = None) -> None:
    """Say what is in a data source: shapes, ranges, classes, unreadable files, and what to do about them.

    Example: onefold data inspect photos/ --sheet photos.png

    Args:
        source: digits, digits:test, a folder, .zip, .npz or .parquet.
        all: Decode every image, not a sample of 2,000.
        sheet: Also write a contact sheet of 64 images to this PNG file.
    """
    console.print("\n".join(data.describe(data.inspect(source, sample=None if all else 2000))))
    if sheet is not None:
        with writing(sheet):
            data.contact_sheet(data.open_dataset(source, unreadable="skip")).save(sheet, format="PNG")
        console.print(f"{sheet}: contact sheet")


def convert(
    source: Positional[str],
    out: Positional[Path],
    /,
    size: int,
    height: int | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Write a zip of PNG images of one size: resized with a filter against aliasing, cropped at the centre.

    Example: onefold data convert photos/ photos64.zip --size 64

    Args:
        source: A folder, .zip, .npz or .parquet; sizes may be mixed.
        out: The zip to write.
        size: Side of the square images; the width, if --height is given too.
        height: Height, for images that are not square.
        unreadable: Stop at an image that cannot be read, or leave it out.
        overwrite: Replace an existing zip.
        quiet: No progress bar.
    """
    with ImageProgress("converting", 1, quiet=quiet) as bar:
        wanted = size if height is None else (height, size)
        done = data.convert(source, out, wanted, unreadable=unreadable, overwrite=overwrite, progress=bar.of)
    height, width, channels = done.image_shape
    console.print(f"{done.path}: {done.written:,} images of {height}×{width}×{channels}")
    if done.enlarged:
        console.print(f"{done.enlarged:,} of them were smaller and have been enlarged")
    if done.skipped:
        console.print(f"{len(done.skipped):,} unreadable images left out: {', '.join(done.skipped)}")


def stats(source: Positional[str], /, out: Path = Path("stats.safetensors"), features: Path | None = None) -> None:
    """Store the feature statistics of a data source, for `onefold evaluate --reference`.

    Example: onefold data stats photos64.zip --out photos64.stats.safetensors

    Args:
        source: digits, digits:test, a folder, .zip, .npz or .parquet.
        out: File to write.
        features: Feature extractor; default: a small classifier of the source.
    """
    dataset = data.open_dataset(source)
    extractor = metrics.from_file(features) if features else extractor_for(dataset, console.print)
    images, _ = data.read_all(dataset)
    with writing(out):
        metrics.Moments.from_features(extractor.features(images), extractor.sha256).save(out)
    console.print(f"{out}: mean and covariance of {extractor.width} features of {len(dataset):,} images")
