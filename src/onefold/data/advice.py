"""The conversion that makes a data set of images that are none: one size, and one command, in all messages."""

import shlex
from collections.abc import Sequence

import numpy as np

from onefold.data.decode import Shape

LARGEST = 8192
"""Most pixels of a side that images are converted to."""

# The smallest patch of a recipe, and one that all the smaller patches divide.
_PATCH, _LARGER_PATCH = 2, 8


def fitting_size(shapes: Sequence[Shape]) -> tuple[int, int]:
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


def conversion(source: str, size: tuple[int, int], *, skip: bool = False) -> str:
    """Write the command that converts a source to this (H, W); `skip` leaves out what cannot be read."""
    height, width = size
    sides = f"--size {width}" if height == width else f"--size {width} --height {height}"
    return f"onefold data convert {shlex.quote(source)} OUT.zip {sides}" + (" --unreadable skip" if skip else "")


def _even(side: int) -> int:
    return max(_PATCH, min(side, LARGEST) // _PATCH * _PATCH)
