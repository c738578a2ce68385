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

from onefold.data.listing import ArrayListing, list_arrays, part_of
from onefold.errors import UserError

_BYTES = 8
_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


def list_idx(source: str, path: Path) -> ArrayListing:
    """Read a file of images, and the labels beside it if they are there. Raises UserError when it is broken."""
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
    notes = () if beside else (f"there are no labels, for there is no file {name} beside it",)
    return list_arrays(source, images, None if beside is None else _read(str(beside), beside), notes)


def list_idx_folder(source: str, path: Path) -> ArrayListing:
    """Read a part of a folder that `is_idx_folder`. Raises UserError when it is not there."""
    part = part_of(source) or "train"
    file = _images_of(path, part)
    if file is None:
        raise UserError(f"{source}: has no images of the part {part}; name another one")
    listing = list_idx(str(file), file)
    other = part_of(source) is None and _images_of(path, "test") is not None
    notes = ("of the parts train and test, train is read",) if other else ()
    return ArrayListing(source, listing.images, listing.labels, listing.class_names, (*listing.notes, *notes))


def is_idx_folder(path: Path) -> bool:
    """Whether a folder holds the training images of an IDX set."""
    return path.is_dir() and _images_of(path, "train") is not None


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
