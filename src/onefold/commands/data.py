"""`onefold data inspect`, `convert` and `stats`.

What needs torch is imported where it is used, so that `--help` does without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable, writing

__all__ = ["convert", "inspect", "stats"]


def inspect(
    source: Positional[str], /, all: bool = False, labels_from: str | None = None, sheet: Path | None = None
) -> None:
    """Say what is in a data source: shapes, ranges, classes, unreadable files, and what to do about them.

    Example: onefold data inspect photos/ --sheet photos.png

    Args:
        source: digits, digits:test, or the path of a folder or file; sizes may be mixed.
        all: Decode every image, not a sample of 2,000.
        labels_from: Where the labels are: a column or key; folders or dataset.json for image files; or none.
        sheet: Also write a contact sheet of 64 images to this PNG file.
    """
    import numpy as np

    from onefold import data
    from onefold.data.source import check_output
    from onefold.pictures.grids import save_png

    if sheet is not None:
        check_output(sheet, ".png", source)
    console.print("\n".join(data.describe(data.inspect(source, sample=None if all else 2000, labels_from=labels_from))))
    if sheet is not None:
        drawn, missing = data.contact_sheet(source, labels_from=labels_from)
        save_png(sheet, np.asarray(drawn))
        console.print(f"{sheet}: contact sheet")
        _report_skipped(missing)


def convert(
    source: Positional[str],
    out: Positional[Path],
    /,
    size: int,
    height: int | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    overwrite: bool = False,
    labels_from: str | None = None,
    quiet: bool = False,
) -> None:
    """Write a zip of PNG images of one size: resized with a filter against aliasing, cropped at the centre.

    Example: onefold data convert photos/ photos64.zip --size 64

    Args:
        source: The path of a folder or file; sizes may be mixed.
        out: The zip to write; never the source itself.
        size: Side of the square images, at most 8,192 pixels; the width, if --height is given too.
        height: Height, for images that are not square.
        unreadable: Stop at an image that cannot be read, or leave it out.
        overwrite: Replace an existing zip.
        labels_from: Where the labels are: a column or key; folders or dataset.json for image files; or none.
        quiet: No progress bar.
    """
    from onefold import data
    from onefold.data.messages import count_text, shape_text
    from onefold.training.progress import ImageProgress

    with ImageProgress("converting", 1, quiet=quiet) as bar:
        wanted = size if height is None else (height, size)
        done = data.convert(
            source,
            out,
            wanted,
            unreadable=unreadable,
            overwrite=overwrite,
            labels_from=labels_from,
            progress=bar.of,
        )
    console.print(f"{done.path}: {count_text(done.written_count)} of {shape_text(done.image_shape)} (height × width)")
    if done.enlarged_count:
        console.print(f"{done.enlarged_count:,} of them were smaller and have been enlarged")
    _report_skipped(done.skipped, done.notes)


def stats(
    source: Positional[str],
    /,
    out: Path = Path("stats.safetensors"),
    features: Path | None = None,
    run: Path | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    labels_from: str | None = None,
) -> None:
    """Store the feature statistics of a data source, for `onefold evaluate --reference`.

    Example: onefold data stats photos64.zip --run runs/photos --out photos64.stats.safetensors

    Args:
        source: digits, digits:test, or the path of a folder or file.
        out: File to write, ending in .safetensors; existing statistics are replaced.
        features: Feature extractor; default: a small classifier of the source.
        run: Take the features that `onefold evaluate` measures this run in: a small classifier of its training images.
        unreadable: Stop at an image that cannot be read, or leave it out.
        labels_from: Where the labels are: a column or key; folders or dataset.json for image files; or none.
    """
    import torch

    from onefold import data, metrics
    from onefold.data.messages import count_text
    from onefold.data.source import check_output
    from onefold.extractor import extractor_for
    from onefold.training.run import load_run

    if features is not None and run is not None:
        raise UserError("--run: cannot go with --features; choose one")
    check_output(out, ".safetensors", source)
    if out.exists():
        _check_statistics(out)
    dataset = data.open_dataset(source, unreadable=unreadable, labels_from=labels_from)
    learned_from = dataset if run is None else load_run(run).open_data(console.print)[0]
    if features is None:
        for _ in data.read_batches(dataset):  # before a classifier is trained: an image may be broken
            pass
    extractor = metrics.from_file(features) if features else extractor_for(learned_from, console.print)
    rows = torch.cat([extractor.features(x) for x, _ in data.read_batches(dataset)])
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        metrics.Moments.from_features(rows, extractor.sha256).save(out)
    console.print(f"{out}: mean and covariance of {extractor.width} features of {count_text(len(dataset))}")
    _report_skipped(dataset.skipped, dataset.notes)


def _check_statistics(path: Path) -> None:
    """Refuse to replace what is none: weights and feature extractors are .safetensors too."""
    from onefold import metrics

    try:
        metrics.Moments.load(path)
    except UserError as error:
        raise UserError(f"{path}: exists already and holds no statistics; choose another --out") from error


def _report_skipped(names: Sequence[str], notes: Sequence[str] = ()) -> None:
    from onefold.data.messages import count_text

    for note in notes:
        console.print(f"note: {note}")
    if names:
        console.print(f"{count_text(len(names), 'unreadable image')} left out: {', '.join(map(printable, names))}")
