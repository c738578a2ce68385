"""Images in IDX files, the format of MNIST: a file, packed by gzip or not, or the folder of the four files.

A file is 0, 0, 8 (for bytes), the number d of dimensions, d big-endian sizes of 4 bytes, and the values (LeCun, Cortes
and Burges, http://yann.lecun.com/exdb/mnist). Labels lie beside the images, in a file whose name has labels for images
and idx1 for idx3. Of a folder the training images are read, or those of the part named after a colon: mnist:test.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.listing import ArrayListing, list_arrays
from onefold.data.parts import PARTS, choose_part
from onefold.errors import UserError

_BYTES = 8
_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def list_idx(source: str, path: Path, labels_from: str | None = None) -> ArrayListing:
    """Read a file of images, and the labels beside it if they are there. Raises UserError when it is broken."""
    if labels_from not in (None, "none"):
        raise UserError(
            f"--labels-from {labels_from}: an IDX file has no columns; its labels lie beside it, or say none"
        )
    images = _read(source, path)
    if images.ndim < 3:
        raise UserError(f"{source}: holds no images, but values of shape {images.shape}; give the file of the images")
    name = path.name.replace("images", "labels").replace(f"idx{images.ndim}", "idx1")
    beside = next(
        (
            path.with_name(other)
            for other in (name, f"{name}.gz", name.removesuffix(".gz"))
            if other != path.name and path.with_name(other).is_file()
        ),
        None,
    )
    notes = () if beside or labels_from == "none" else (f"there are no labels, for there is no file {name} beside it",)
    values = None if beside is None or labels_from == "none" else _read(str(beside), beside)
    listing = list_arrays(source, images, values, notes)
    listing.files = lambda: [path]
    return listing


def list_idx_folder(source: str, path: Path, labels_from: str | None = None) -> ArrayListing:
    """Read a part of a folder that `is_idx_folder`. Raises UserError when it is not there."""
    there = {part: file for part in PARTS if (file := _images_of(path, part)) is not None}
    choice = choose_part(source, there)
    listing = list_idx(str(there[choice.part]), there[choice.part], labels_from)
    notes = (*listing.notes, *choice.notes)
    chosen = ArrayListing(source, listing.images, listing.labels, listing.class_names, notes, choice.tests)
    chosen.files = listing.files
    return chosen


def is_idx_folder(path: Path) -> bool:
    """Whether a folder holds the images of an IDX set, or of a part of it."""
    return path.is_dir() and any(_images_of(path, part) is not None for part in PARTS)


def _images_of(folder: Path, part: str) -> Path | None:
    for prefix in _PREFIXES.get(part, ()):
        for suffix in ("-images-idx3-ubyte", "-images-idx3-ubyte.gz", "-images.idx3-ubyte", "-images.idx3-ubyte.gz"):
            if (folder / f"{prefix}{suffix}").is_file():
                return folder / f"{prefix}{suffix}"
    return None


def _read(source: str, path: Path) -> NDArray[np.uint8]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
            if (zeros, kind) != (0, _BYTES):
                raise ValueError("it does not begin as an IDX file of bytes")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            values = file.read(math.prod(shape))
        return np.frombuffer(values, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, struct.error, zlib.error) as error:
        raise UserError(f"{source}: not a whole IDX file of bytes; copy or pack it again") from error
