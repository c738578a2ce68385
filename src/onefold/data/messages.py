"""What messages share: how shapes and numbers are said, and the command that makes a data set of images that are none.

Height stands before width, as in (H, W, C); one image, two images.
"""

from collections.abc import Sequence

import numpy as np

from onefold.data.decode import Shape
from onefold.errors import quoted

LARGEST = 8192
"""Most pixels of a side that images are converted to."""

# The smallest patch of a recipe, and one that all the smaller patches divide.
_PATCH, _LARGER_PATCH = 2, 8

_CHANNEL_NAMES = {1: "grey", 3: "RGB", 4: "RGBA"}


def shape_text(shape: Shape) -> str:
    """Say (H, W, C) as height × width and the kind of channels, such as "480×640 RGB"."""
    height, width, channels = shape
    return f"{height}×{width} {channels_text(channels)}"


def channels_text(channels: int) -> str:
    return _CHANNEL_NAMES.get(channels, f"{channels} channels")


def count_text(number: int, noun: str = "image", plural: str | None = None) -> str:
    """Say a number of things, such as "1 image" or "1,437 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def shortened(words: Sequence[str], most: int = 10) -> str:
    """Join words, those beyond the first `most` as a number."""
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


def best_size(shapes: Sequence[Shape]) -> tuple[int, int]:
    """Choose the (H, W) that images of these shapes, at least one, are best converted to.

    Images of one size keep it, but for an odd row or column. Others become squares: the median of their shorter
    sides, rounded down to a multiple of 8 where it is larger than that.
    """
    sizes = {shape[:2] for shape in shapes}
    if len(sizes) == 1:
        height, width = sizes.pop()
        return _even(height), _even(width)
    side = _even(int(np.median([min(shape[:2]) for shape in shapes])))
    side = side if side < _LARGER_PATCH else side // _LARGER_PATCH * _LARGER_PATCH
    return side, side


def convert_command(source: str, size: tuple[int, int], *, skip: bool = False) -> str:
    """Write the command that converts a source to this (H, W); `skip` leaves out what cannot be read."""
    height, width = size
    sides = f"--size {width}" if height == width else f"--size {width} --height {height}"
    return f"onefold data convert {quoted(source)} OUT.zip {sides}" + (" --unreadable skip" if skip else "")


def _even(side: int) -> int:
    return max(_PATCH, min(side, LARGEST) // _PATCH * _PATCH)
