"""Arrays of images in a .npz or .npy file: any number of channels, with or without labels.

Images are uint8 (n, H, W, C) or (n, H, W); labels are optional: n integers or words, also as (n, 1) or one-hot. An
.npz names them `images` and `labels`, or as `numpy.savez`, Keras and MedMNIST do (see `_PAIRS`). Where it has parts to
train, test and validate, the training part is read, or the one named after a colon: mnist.npz:test. Nothing is ever
unpickled.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from onefold.data.listing import ArrayListing, list_arrays, part_of
from onefold.errors import UserError

_PAIRS = (
    ("images", ("labels", "label", "targets")),
    ("x", ("y",)),
    ("arr_0", ("arr_1",)),
    ("data", ("labels", "label", "targets")),
)

# Parts, each by the keys of Keras and of MedMNIST.
_PARTS = {
    part: ((f"x_{part}", (f"y_{part}",)), (f"{part}_images", (f"{part}_labels",))) for part in ("train", "test", "val")
}

# What numpy raises on files that hold no plain arrays.
_NO_ARRAYS = (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


def list_npz(source: str, path: Path) -> ArrayListing:
    """Read the arrays. Raises UserError when they are missing, not uint8, or of shapes that do not fit."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            keys = list(file.files)
            images, labels, notes = _chosen_keys(source, keys)
            arrays = file[images], None if labels is None else file[labels]
    except UserError:
        raise
    except _NO_ARRAYS as error:
        raise UserError(f"{source}: not a .npz file of plain arrays; write it with numpy.savez") from error
    return list_arrays(source, *arrays, notes)


def list_npy(source: str, path: Path) -> ArrayListing:
    """Read one array of images, without labels. Raises UserError like `list_npz`."""
    try:
        with path.open("rb") as opened:
            images = np.load(opened, allow_pickle=False)
            if not isinstance(images, np.ndarray):
                raise ValueError("an archive")
    except _NO_ARRAYS as error:
        raise UserError(f"{source}: not a .npy file of a plain array; write it with numpy.save") from error
    return list_arrays(source, images)


def _chosen_keys(source: str, keys: list[str]) -> tuple[str, str | None, tuple[str, ...]]:
    """Give the names of the images and the labels, and what is to be said about it."""
    found = ", ".join(keys) or "none"
    there = [part for part, pairs in _PARTS.items() if any(images in keys for images, _ in pairs)]
    asked = part_of(source)
    if asked is not None and asked not in there:
        raise UserError(f"{source}: has no images of the part {asked} (found: {found}); name another one")
    for pairs in (_PAIRS if asked is None else (), *(_PARTS[part] for part in ([asked] if asked else there[:1]))):
        for images, labels in pairs:
            if images in keys:
                several = asked is None and pairs is not _PAIRS and len(there) > 1
                notes = (f"of the parts {', '.join(there)}, {there[0]} is read",) if several else ()
                return images, next((key for key in labels if key in keys), None), notes
    raise UserError(f"{source}: holds no array named images (found: {found}); rename the one that is meant")
