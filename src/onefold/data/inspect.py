"""What is in a source, and what to do before training on it: a report, or a sheet of its images.

`inspect` reports; it does not raise on broken files or mixed sizes, for those are what it is asked about.
"""

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.decode import Shape, over_white, to_image
from onefold.data.listing import Listing, Unreadable, spread_indices
from onefold.data.messages import best_size, channels_text, count_text, shape_text
from onefold.data.parallel import Progress, map_indices
from onefold.data.source import list_source
from onefold.errors import UserError, printable

_MOST_TILES = 100
_GAP = 2

# Tiles are enlarged or reduced to about these sides: 8×8 digits stay visible, photographs do not fill a wall.
_SMALLEST, _LARGEST = 64, 256


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
    decoded_count: how many images were decoded: all, or an evenly spread sample.
    measured_count: how many of them `values` are over: those with the most frequent number of channels. `values` is
        None when nothing could be decoded.
    classes: how many images each class has, in the order of the labels; empty without classes.
    unreadable: the reason for each image, by name, that cannot be read. Damage beyond the header is found
        only in images that were decoded.
    notes: what else should be known, a line each, such as files that are not read as images.
    advice: what to do about it, a line each; empty when the source can be trained on as it is.
    """

    source: str
    count: int
    shapes: dict[Shape, int]
    decoded_count: int
    measured_count: int
    values: Values | None
    classes: dict[str, int]
    unreadable: dict[str, str]
    notes: tuple[str, ...]
    advice: tuple[str, ...]


def inspect(
    source: str | Path,
    *,
    sample: int | None = 2000,
    labels_from: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at every header of a source, and decode an evenly spread `sample` of its images (None: all).

    `labels_from` is as of `open_dataset`. `progress` is told of the headers. Raises UserError only when the source
    itself cannot be opened.
    """
    listing = list_source(source, labels_from)
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

    for found in map_indices(shape, range(len(listing)), progress):
        if isinstance(found, Unreadable):
            unreadable[found.name] = found.reason
        else:
            shapes[found] += 1
    histograms: dict[int, NDArray[np.int64]] = {}
    frequency: Counter[int] = Counter()
    for found in map_indices(histogram, spread_indices(len(listing), len(listing) if sample is None else sample)):
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
        decoded_count=frequency.total(),
        measured_count=measured,
        values=values,
        classes=dict(zip(listing.class_names, numbers, strict=False)),
        unreadable=unreadable,
        notes=(*listing.notes, *(f"test images: {listing.source}:{part}" for part in listing.test_parts[:1])),
        advice=tuple(advice),
    )


def describe(inspection: Inspection) -> list[str]:
    """Write an inspection as lines of plain text."""
    found = inspection
    lines = [f"{found.source}: {count_text(found.count)}"]
    sizes = [f"{shape_text(shape)} ({number:,})" for shape, number in found.shapes.items()]
    sizes[:1] = [size.replace(" ", " (height × width) ", 1) for size in sizes[:1]]
    lines.append("sizes: " + (_joined_text(sizes) or "none can be read"))
    if found.values is not None:
        channels = len(found.values.mean)
        part = "" if found.measured_count == found.decoded_count else f"{found.measured_count:,} of "
        which = f"those in {channels_text(channels)}" if part else channels_text(channels)
        lines.append(f"values over {part}{count_text(found.decoded_count)}, {which}:")
        for k in range(channels):
            low, high = found.values.minimum[k], found.values.maximum[k]
            mean, std = found.values.mean[k], found.values.std[k]
            lines.append(f"  channel {k}: {low} to {high}, mean {mean:.1f}, standard deviation {std:.1f}")
    classes = [f"{name} ({number:,})" for name, number in found.classes.items()]
    lines.append(f"classes: {len(classes)}" + (": " + _joined_text(classes) if classes else ""))
    lines.append(f"unreadable: {len(found.unreadable)}")
    reasons = [f"{name}: {reason}" for name, reason in found.unreadable.items()]
    lines += [f"  {line}" for line in _shorten(reasons)]
    lines += [f"note: {line}" for line in found.notes]
    return list(map(printable, lines + [f"advice: {line}" for line in found.advice]))


def contact_sheet(
    source: str | Path, count: int = 64, *, labels_from: str | None = None
) -> tuple[Image.Image, tuple[str, ...]]:
    """Draw `count` images (at most 100), evenly spread over a source, on one RGB sheet.

    Each fills its tile as far as its aspect ratio allows. Of images with other channels than grey, RGB or RGBA the
    first channel is drawn. Also gives the names of those images that cannot be read and so are left out.

    Raises UserError when `count` is less than 1, when the source cannot be opened, and when none can be read.
    """
    if count < 1:
        raise UserError(f"a contact sheet of {count} images: draw at least 1")
    listing = list_source(source, labels_from)
    chosen = spread_indices(len(listing), min(count, _MOST_TILES))
    sizes: list[tuple[int, int]] = []
    for index in chosen:
        with suppress(Unreadable):
            sizes.append(listing.shape(index)[:2])
    # Not rounded yet: images of one size then fill their tile to the pixel.
    tile_height = max((height * _tile_scale(height, width) for height, width in sizes), default=Fraction(1))
    tile_width = max((width * _tile_scale(height, width) for height, width in sizes), default=Fraction(1))

    def draw(index: int) -> Image.Image | None:
        try:
            pixels = listing.image(index)
        except Unreadable:
            return None
        image = to_image(pixels if pixels.shape[2] in (1, 3, 4) else pixels[:, :, :1])
        image = over_white(image) if image.mode == "RGBA" else image.convert("RGB")
        scale = min(tile_width / image.width, tile_height / image.height)
        whole = scale > 1 and scale.denominator == 1
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)

    drawn = dict(zip(chosen, map_indices(draw, chosen, chunk=1), strict=True))
    images = [image for image in drawn.values() if image is not None]
    if not images:
        raise UserError(f"{listing.source}: none of the images drawn can be read; check the files")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(1, round(tile_width)), max(1, round(tile_height))
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        left = _GAP + column * (width + _GAP) + (width - image.width) // 2
        top = _GAP + row * (height + _GAP) + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet, tuple(listing.names[index] for index, image in drawn.items() if image is None)


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
    command = listing.convert_command(skip=bool(unreadable))
    height, width, channels = shapes[0]
    if len(shapes) > 1:
        advice.append(f"sizes or channels differ: make them alike: {command}")
    elif height % 2 or width % 2:
        if channels not in (1, 3, 4):
            command = "store arrays of {}×{}".format(*best_size(shapes))
        advice.append(f"{height}×{width}: no recipe takes an odd height or width, for its patches: {command}")
    if unreadable:
        them = "it" if len(unreadable) == 1 else "them"
        cure = f"; this command leaves {them} out" if advice else f", or {listing.skip_advice()}"
        advice.append(f"{count_text(len(unreadable))} cannot be read: replace {them}{cure}")
    if alone and values.minimum == values.maximum:
        advice.append("all images are alike, of one colour: there is nothing to learn from them; check the files")
    return advice


def _joined_text(texts: list[str]) -> str:
    return ", ".join(_shorten(texts))


def _shorten(texts: list[str], most: int = 20) -> list[str]:
    """Cut a long list short, and say so."""
    more = len(texts) - most
    return texts if more <= 0 else [*texts[:most], f"and {more:,} more"]


def _tile_scale(height: int, width: int) -> Fraction:
    """What an image is enlarged by, a whole number, or reduced by, when all images are like it."""
    longer = max(height, width)
    if longer < _SMALLEST:
        return Fraction(math.ceil(_SMALLEST / longer))
    return min(Fraction(1), Fraction(_LARGEST, longer))
