"""What is in a source, and what to do before training on it.

`inspect` reports; it does not raise on broken files or mixed sizes, for those are what it is asked about.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.advice import fitting_size
from onefold.data.decode import Shape
from onefold.data.listing import Listing, Unreadable, spread
from onefold.data.parallel import Progress, each
from onefold.data.source import list_source
from onefold.data.text import channels_text, counted, shape_text


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
    decoded: how many images were decoded: all, or an evenly spread sample.
    measured: how many of them `values` are over: those with the most frequent number of channels. `values` is None
        when nothing could be decoded.
    classes: how many images each class has, in the order of the labels; empty without classes.
    unreadable: the reason for each image, by name, that cannot be read. Damage beyond the header is found
        only in images that were decoded.
    advice: what to do about it, a line each; empty when the source can be trained on as it is.
    """

    source: str
    count: int
    shapes: dict[Shape, int]
    decoded: int
    measured: int
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
    channels, measured = frequency.most_common(1)[0] if frequency else (0, 0)
    values = _values(histograms[channels]) if frequency else None
    advice = _advice(listing, list(shapes), unreadable, values, alone=measured == frequency.total())
    numbers = np.bincount(listing.labels, minlength=len(listing.class_names)).tolist()
    return Inspection(
        source=listing.source,
        count=len(listing),
        shapes=dict(shapes.most_common()),
        decoded=frequency.total(),
        measured=measured,
        values=values,
        classes=dict(zip(listing.class_names, numbers, strict=False)),
        unreadable=unreadable,
        advice=tuple(advice),
    )


def describe(inspection: Inspection) -> list[str]:
    """Write an inspection as lines of plain text."""
    found = inspection
    lines = [f"{found.source}: {counted(found.count)}"]
    sizes = [f"{shape_text(shape)} ({number:,})" for shape, number in found.shapes.items()]
    sizes[:1] = [size.replace(" ", " (height × width) ", 1) for size in sizes[:1]]
    lines.append("sizes: " + (_some(sizes) or "none can be read"))
    if found.values is not None:
        channels = len(found.values.mean)
        part = "" if found.measured == found.decoded else f"{found.measured:,} of "
        which = f"those in {channels_text(channels)}" if part else channels_text(channels)
        lines.append(f"values over {part}{counted(found.decoded)}, {which}:")
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


def _advice(
    listing: Listing, shapes: list[Shape], unreadable: dict[str, str], values: Values | None, *, alone: bool
) -> list[str]:
    """What to do, a line each; `values` are of all that was decoded if `alone`."""
    if values is None:
        return ["none of the images can be read: check the files"]
    advice: list[str] = []
    command = listing.conversion(skip=bool(unreadable))
    height, width, channels = shapes[0]
    if len(shapes) > 1:
        advice.append(f"sizes or channels differ: make them alike: {command}")
    elif height % 2 or width % 2:
        if channels not in (1, 3, 4):
            command = "store arrays of {}×{}".format(*fitting_size(shapes))
        advice.append(f"{height}×{width}: no recipe takes an odd height or width, for its patches: {command}")
    if unreadable:
        them = "it" if len(unreadable) == 1 else "them"
        cure = f"; this command leaves {them} out" if advice else f", or {listing.leaving_out()}"
        advice.append(f"{counted(len(unreadable))} cannot be read: replace {them}{cure}")
    if alone and values.minimum == values.maximum:
        advice.append("all images are alike, of one colour: there is nothing to learn from them; check the files")
    return advice


def _some(texts: list[str]) -> str:
    return ", ".join(_first(texts))


def _first(texts: list[str], most: int = 20) -> list[str]:
    """Cut a long list short, and say so."""
    more = len(texts) - most
    return texts if more <= 0 else [*texts[:most], f"and {more:,} more"]
