"""What lies in a source, before anyone asks whether it is a data set.

A `Listing` names every image and its class and can read each one; sizes and channels may still differ, and
files may be broken. `open_dataset` builds a data set on it, `inspect` reports on it, `convert` mends it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import natural_key, number_labels
from onefold.data.decode import FORMATS_TEXT, Pixels, Shape, decode, read_header
from onefold.data.messages import best_size, convert_command, count_text
from onefold.errors import UserError, printable, reason

# Enough of a file to know its size: a camera's header with its preview has less than this.
_HEAD = 1 << 17

PARTS = ("train", "test", "val")
"""Parts that a source may hold, by the names that choose one: mnist.npz:test."""

HEADERS = 1000
"""Images whose headers tell, without reading all of a large set, what sizes there are."""


class Unreadable(UserError):
    """An image that cannot be read: `name` within its listing, and the `reason`.

    `cure` is set where the command at hand can leave such images out itself.
    """

    def __init__(self, listing: "Listing", name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason
        self.cure: str | None = None
        self._listing = listing

    def __str__(self) -> str:
        # Put together when it is read: the command comes from the other images, and most such errors are caught.
        cure = self.cure or self._listing.skip_advice()
        what = f"{self.name} cannot be read ({self.reason})"
        return printable(f"{self._listing.source}: {what}; replace it{cure and ', or ' + cure}")


class Listing(ABC):
    """The images of a source, in their fixed order.

    `names` tells them apart in messages; `labels` is int64 (n,), all 0 when `class_names` is empty, or a function
    that reads them when they are first asked for. `rest` are the names of files that lie
    there and are no images, and of folders, which end in a slash.
    """

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        labels: NDArray[np.int64] | Callable[[], NDArray[np.int64]],
        class_names: tuple[str, ...],
        rest: Sequence[str] = (),
    ) -> None:
        if len(names) == 0:
            files = [name for name in rest if not name.endswith("/")]
            others = f", and there are only others ({suffix_counts(files)})" if files else ""
            raise UserError(f"{source}: holds no images; onefold reads {FORMATS_TEXT} files{others}")
        self.source = source
        self.names = names
        self._labels = labels
        self.class_names = class_names
        self._rest = rest

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, int64 (n,), in 0…K−1; all 0 when K = 0."""
        return self._labels() if callable(self._labels) else self._labels

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """Read image `index` as uint8 (H, W, C), not to be written into. Raises `Unreadable`."""

    @property
    def notes(self) -> list[str]:
        """What should be said about a source before it is used, a line each: files left out, and classes with them."""
        files = [name for name in self._rest if not name.endswith("/")]
        lines: list[str] = []
        if files:
            number = count_text(len(files), "file")
            lines.append(f"{number} left out, for onefold does not read such files as images: {suffix_counts(files)}")
        used = {name.rpartition("/")[0] for name in self.names}
        depth = self.names[0].count("/")
        folders = {name.rpartition("/")[0] for name in self._rest if name.count("/") == depth}
        if empty := sorted(folders - used, key=natural_key):
            lines.append(f"no class is made of {_shortened(empty)}, where there are no images that onefold reads")
        return lines

    def item(self, index: int) -> tuple[Pixels, int]:
        """Read image `index` and its label. Raises `Unreadable`."""
        return self.image(index), int(self.labels[index])

    @abstractmethod
    def shape(self, index: int) -> Shape:
        """Give (H, W, C) of image `index` without decoding it. Raises `Unreadable`."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Give the bytes that image `index` is stored as. Raises `Unreadable`."""

    def convert_command(self, *, skip: bool = False) -> str | None:
        """Give the command that makes a data set of these images; None when none of them can be read."""
        shapes: list[Shape] = []
        for index in spread_indices(len(self), HEADERS):
            with suppress(Unreadable):
                shapes.append(self.shape(index))
        return convert_command(self.source, best_size(shapes), skip=skip) if shapes else None

    def skip_advice(self) -> str:
        """Say how images that cannot be read are left out, whatever the command; empty when no other can be read."""
        command = self.convert_command(skip=True)
        also = "train and data stats also take --unreadable skip"
        return f"leave such images out: {command} ({also})" if command else ""

    def digest(self, indices: Iterable[int]) -> str:
        """Hash the images `indices` with their classes, in that order: SHA-256 in hexadecimal.

        File names do not count, so a folder and a zip of it have one digest.
        """
        total = hashlib.sha256(json.dumps(self.class_names).encode())
        for index in indices:
            total.update(int(self.labels[index]).to_bytes(8, "little"))
            total.update(hashlib.sha256(self.content(index)).digest())
        return total.hexdigest()


ReadBytes: TypeAlias = Callable[[int, int | None], bytes]
"""Called with (index, limit): reads that file, or only its first `limit` bytes. Safe in many threads."""


class FileListing(Listing):
    """Images that are encoded files, wherever `read` finds them."""

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
        read: ReadBytes,
        rest: Sequence[str] = (),
    ) -> None:
        super().__init__(source, names, labels, class_names, rest)
        self._read = read
        self._is_deep = False

    @property
    def notes(self) -> list[str]:
        deep = ["images with 16 bits per channel are read with 8"] if self._is_deep else []
        return super().notes + deep

    def image(self, index: int) -> Pixels:
        # Decoders fail in many ways on broken data; for whoever reads the message they are all one.
        try:
            return decode(self._read(index, None))
        except MemoryError:
            raise
        except Exception as error:
            raise Unreadable(self, self.names[index], reason(error)) from error

    def shape(self, index: int) -> Shape:
        try:
            try:
                header = read_header(self._read(index, _HEAD))
            except Exception:  # broken, or a header longer than the head: the whole file will tell
                header = read_header(self._read(index, None))
        except Exception as error:
            raise Unreadable(self, self.names[index], reason(error)) from error
        self._is_deep |= header.is_deep
        return header.shape

    def content(self, index: int) -> bytes:
        try:
            return self._read(index, None)
        except Exception as error:
            raise Unreadable(self, self.names[index], reason(error)) from error


class ArrayListing(Listing):
    """Images that are an array already: uint8 (n, H, W, C)."""

    def __init__(
        self,
        source: str,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(source, [f"image {k}" for k in range(len(images))], labels, class_names)
        self.images = images
        self._notes = notes

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def image(self, index: int) -> Pixels:
        return self.images[index]

    def shape(self, index: int) -> Shape:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def content(self, index: int) -> bytes:
        # The shape is part of it: 2×8 pixels are not 4×4 pixels.
        return str(self.shape(index)).encode() + self.images[index].tobytes()


def list_arrays(
    source: str, images: NDArray[np.generic], values: object = None, notes: Sequence[str] = ()
) -> ArrayListing:
    """List the images of an array, uint8 (n, H, W, C) or (n, H, W); `values` are n integers or words, or None.

    They may also be (n, 1), or one-hot: (n, K) with a single 1 in each row.

    Raises UserError when they are not uint8, or of shapes that do not fit.
    """
    if images.dtype != np.uint8:
        raise UserError(f"{source}: images are {images.dtype}; store them as uint8 with values from 0 to 255")
    array = np.asarray(images, dtype=np.uint8)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape[1:]:
        raise UserError(f"{source}: images have shape {array.shape}; store them as (n, H, W, C)")
    if len(array) == 0:
        raise UserError(f"{source}: holds no images, for their array has shape {array.shape}; store at least one")
    if is_channels_first(array.shape[1:]):
        raise UserError(
            f"{source}: images of shape {array.shape} look channels first; store them as (n, H, W, C), "
            "by images.transpose(0, 2, 3, 1)"
        )
    return ArrayListing(source, array, *_classes_of(source, len(array), values), notes)


def list_encoded(source: str, files: Sequence[bytes], values: object = None) -> FileListing:
    """List images that are encoded files in memory; `values` are n integers or words, or None.

    Raises UserError when there are none, or another number of labels.
    """
    labels, class_names = _classes_of(source, len(files), values)

    def read(index: int, limit: int | None) -> bytes:
        return files[index][:limit]

    return FileListing(source, [f"image {k}" for k in range(len(files))], labels, class_names, read)


def is_channels_first(shape: Sequence[int]) -> bool:
    """Whether the shape of an image, given as (H, W, C), is more likely (C, H, W)."""
    first, *sides = shape
    # Few channels before two sides; or more, as satellites have, before equal and larger ones.
    return first <= 4 < min(sides) or first < sides[0] == sides[1] > 4


def _classes_of(source: str, count: int, values: object) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number the classes of `count` images. Raises UserError when `values` are not one for each."""
    if values is None:
        return np.zeros(count, dtype=np.int64), ()
    array = np.asarray(values) if isinstance(values, np.ndarray) else None
    if array is not None and array.ndim == 2 and array.shape[1] == 1:
        values = array[:, 0]
    if array is not None and array.ndim == 2 and array.shape[1] > 1 and _is_one_hot(array):
        labels, class_names = array.argmax(axis=1).astype(np.int64), tuple(map(str, range(array.shape[1])))
    else:
        labels, class_names = number_labels(source, values)
    if len(labels) != count:
        raise UserError(
            f"{source}: {count_text(count)} but {count_text(len(labels), 'label')}; store one label per image"
        )
    return labels, class_names


def _is_one_hot(array: NDArray[np.generic]) -> bool:
    numbers = array.dtype.kind in "biuf"
    return numbers and bool(((array == 0) | (array == 1)).all() and (array.sum(axis=1, dtype=np.float64) == 1).all())


def part_of(source: str) -> str | None:
    """Give the part of a source that is named after a colon, such as test in mnist.npz:test."""
    _, colon, part = source.rpartition(":")
    return part if colon and part in PARTS else None


def suffix_counts(names: Sequence[str]) -> str:
    """Say how many files have which suffix, such as ".heic (20), .txt (1), no suffix (3)"."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    return _shortened([f"{suffix} ({number:,})" for suffix, number in counts.most_common()])


def _shortened(words: Sequence[str], most: int = 10) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


def spread_indices(count: int, most: int) -> list[int]:
    """Choose `most` of the numbers 0…count−1 (all, if there are fewer), evenly spread, the first included."""
    chosen = min(count, most)
    return [k * count // chosen for k in range(chosen)]
