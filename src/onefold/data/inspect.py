"""What is in a source, and what to do before training on it.

`inspect` reports; it does not raise on broken files or mixed sizes, for those are what it is asked about.
"""

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.decode import Shape, channels_text, shape_text
from onefold.data.listing import Listing, Unreadable
from onefold.data.parallel import Progress, each
from onefold.data.pictures import spread
from onefold.data.source import list_source


@dataclass(frozen=True)
class Values:
    """The values of the pixels, 0…255, a number per channel."""

    minimum: tuple[int, ...]
    maximum: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    count: images listed, readable or not.
    shapes: how many images have each (H, W, C), the most frequent first.
    decoded: how many images were decoded: all, or an evenly spread sample. `values` are over these, and over
        those with the most frequent number of channels only; None when nothing could be decoded.
    classes: how many images each class has, in the order of the labels; empty without classes.
    unreadable: the reason for each image, by name, that cannot be read. Damage beyond the header is found
        only in images that were decoded.
    advice: what to do about it, a line each; empty when the source can be trained on as it is.
    """

    source: str
    count: int
    shapes: dict[Shape, int]
    decoded: int
    values: Values | None
    classes: dict[str, int]
    unreadable: dict[str, str]
    advice: tuple[str, ...]


def inspect(source: str | Path, *, sample: int | None = 2000, progress: Progress | None = None) -> Inspection:
    """Look at every header of a source, and decode an evenly spread `sample` of its images (None: all).

    `progress` is told of the headers. Raises UserError only when the source itself cannot be opened.
    """
    listing = list_source(source)
    unreadable: dict[str, str] = {}
    shapes: Counter[Shape] = Counter()

    def shape(index: int) -> Shape | Unreadable:
        try:
            return listing.shape(index)
        except Unreadable as error:
            return error

    def histogram(index: int) -> NDArray[np.int64] | Unreadable:
        try:
            pixels = listing.image(index)
        except Unreadable as error:
            return error
        flat = pixels.reshape(-1, pixels.shape[2])
        return np.stack([np.bincount(channel, minlength=256) for channel in flat.T])

    for found in each(shape, range(len(listing)), progress):
        if isinstance(found, Unreadable):
            unreadable[found.name] = found.reason
        else:
            shapes[found] += 1
    histograms: dict[int, NDArray[np.int64]] = {}
    frequency: Counter[int] = Counter()
    for found in each(histogram, spread(len(listing), len(listing) if sample is None else sample)):
        if isinstance(found, Unreadable):
            unreadable[found.name] = found.reason
        else:
            channels = len(found)
            frequency[channels] += 1
            histograms[channels] = histograms.get(channels, 0) + found
    numbers = np.bincount(listing.labels, minlength=len(listing.class_names)).tolist()
    return Inspection(
        source=listing.source,
        count=len(listing),
        shapes=dict(shapes.most_common()),
        decoded=frequency.total(),
        values=_values(histograms[frequency.most_common(1)[0][0]]) if frequency else None,
        classes=dict(zip(listing.class_names, numbers, strict=False)),
        unreadable=unreadable,
        advice=tuple(_advice(listing, shapes, unreadable)),
    )


def describe(inspection: Inspection) -> list[str]:
    """Write an inspection as lines of plain text."""
    found = inspection
    lines = [f"{found.source}: {found.count:,} images"]
    sizes = [f"{shape_text(shape)} ({number:,})" for shape, number in found.shapes.items()]
    lines.append("sizes: " + (_some(sizes) or "none can be read"))
    if found.values is not None:
        channels = len(found.values.mean)
        lines.append(f"values over {found.decoded:,} images, {channels_text(channels)}:")
        for k in range(channels):
            low, high = found.values.minimum[k], found.values.maximum[k]
            mean, std = found.values.mean[k], found.values.std[k]
            lines.append(f"  channel {k}: {low} to {high}, mean {mean:.1f}, standard deviation {std:.1f}")
    classes = [f"{name} ({number:,})" for name, number in found.classes.items()]
    lines.append(f"classes: {len(classes)}" + (": " + _some(classes) if classes else ""))
    lines.append(f"unreadable: {len(found.unreadable)}")
    reasons = [f"{name}: {reason}" for name, reason in found.unreadable.items()]
    lines += [f"  {line}" for line in _first(reasons)]
    return lines + [f"advice: {line}" for line in found.advice]


def _values(histogram: NDArray[np.int64]) -> Values:
    """Exact statistics from counts of the 256 values, int64 (C, 256)."""
    value = np.arange(256)
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
    present = histogram > 0
    return Values(
        minimum=tuple(present.argmax(axis=1).tolist()),
        maximum=tuple((255 - present[:, ::-1].argmax(axis=1)).tolist()),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def _advice(listing: Listing, shapes: Counter[Shape], unreadable: dict[str, str]) -> list[str]:
    advice: list[str] = []
    if len(shapes) > 1:
        shorter = np.repeat([min(shape[:2]) for shape in shapes], list(shapes.values()))
        # A multiple of 8, so that the usual patches fit.
        size = max(8, int(np.median(shorter)) // 8 * 8)
        skip = " --unreadable skip" if unreadable else ""
        advice.append(
            "sizes or channels differ: make them alike with: onefold data convert "
            f"{shlex.quote(listing.source)} OUT.zip --size {size}{skip}"
        )
    if unreadable:
        advice.append(
            f"{len(unreadable)} images cannot be read: replace them, or leave them out with --unreadable skip"
        )
    return advice


def _some(texts: list[str]) -> str:
    return ", ".join(_first(texts))


def _first(texts: list[str], most: int = 20) -> list[str]:
    """Cut a long list short, and say so."""
    more = len(texts) - most
    return texts if more <= 0 else [*texts[:most], f"and {more:,} more"]
