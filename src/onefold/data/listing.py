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
from pathlib import Path, PurePosixPath
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import classes_of, natural_key
from onefold.data.decode import FORMATS_TEXT, Pixels, Shape, decode, read_header
from onefold.data.messages import best_size, convert_command, count_text, shortened
from onefold.errors import UserError, printable, reason

# Enough of a file to know its size: a camera's header with its preview has less than this.
_HEAD = 1 << 17

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


class Names(Sequence[str]):
    """Names of images that are made when they are asked for: of a large set they would fill the memory."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self._name(k) for k in range(self._count)[index]]
        return self._name(range(self._count)[index])


class Listing(ABC):
    """The images of a source, in their fixed order.

    `names` tells them apart in messages; `labels` is int64 (n,), all 0 when `class_names` is empty, or a function
    that reads them when they are first asked for. `rest` are the names of files that lie
    there and are no images, and of folders, which end in a slash. `notes` are what the reader has to say.

    test_parts: parts of the source beside the one that is read, whose images training may be tested on.
    is_stored: whether an image is the same whenever it is read, and its label known without reading it.
    is_numbered: whether classes have no names, so that a number is that of a class of whatever data it is used with.
    files: gives the files that the images are stored in, all of them; None where there are others, or none.
    damaged: files of many images, of which one or more cannot be reached: (name, reason) of each.
    """

    is_stored = True
    is_numbered = False
    files: Callable[[], Iterable[str | Path]] | None = None
    damaged: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        source: str,
        names: Sequence[str],
        labels: NDArray[np.int64] | Callable[[], NDArray[np.int64]],
        class_names: tuple[str, ...],
        rest: Sequence[str] = (),
        notes: Sequence[str] = (),
        test_parts: tuple[str, ...] = (),
    ) -> None:
        if len(names) == 0:
            files = [name for name in rest if not name.endswith("/")]
            others = f", and there are only others ({suffix_counts(files)})" if files else ""
            raise UserError(f"{source}: holds no images; onefold reads {FORMATS_TEXT} files{others}")
        self.source = source
        self.names = names
        self._labels = labels
        self.class_names = class_names
        self.test_parts = test_parts
        self._rest = rest
        self._notes = notes

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
        lines = list(self._notes)
        if files:
            number = count_text(len(files), "file")
            lines.append(f"{number} left out, for onefold does not read such files as images: {suffix_counts(files)}")
        lines += [f"{name} is damaged ({why}): images in it are missing" for name, why in self.damaged]
        depth = self.names[0].count("/")
        folders = {name.rpartition("/")[0] for name in self._rest if name.count("/") == depth}
        used = {name.rpartition("/")[0] for name in self.names} if folders else set[str]()
        if empty := sorted(folders - used, key=natural_key):
            lines.append(f"no class is made of {shortened(empty)}, where there are no images that onefold reads")
        return lines

    def refuse_damaged(self) -> None:
        """Raise a UserError where a file of many images is damaged."""
        for name, why in self.damaged:
            raise UserError(
                f"{self.source}: {name} is damaged ({why}); copy it again, or leave out what cannot be reached with "
                "--unreadable skip"
            )

    def without_labels(self) -> "Listing":
        """Forget the classes, before anyone has asked for a label; gives itself."""
        self.class_names, self._labels = (), np.zeros(len(self), dtype=np.int64)
        return self

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
        notes: Sequence[str] = (),
        test_parts: tuple[str, ...] = (),
    ) -> None:
        super().__init__(source, names, labels, class_names, rest, notes, test_parts)
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
        test_parts: tuple[str, ...] = (),
    ) -> None:
        names = Names(len(images), lambda k: f"image {k}")
        super().__init__(source, names, labels, class_names, notes=notes, test_parts=test_parts)
        self.images = images

    def image(self, index: int) -> Pixels:
        return self.images[index]

    def shape(self, index: int) -> Shape:
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def content(self, index: int) -> bytes:
        # The shape is part of it: 2×8 pixels are not 4×4 pixels.
        return str(self.shape(index)).encode() + self.images[index].tobytes()


def list_arrays(
    source: str,
    images: NDArray[np.generic],
    values: object = None,
    notes: Sequence[str] = (),
    test_parts: tuple[str, ...] = (),
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
    return ArrayListing(source, array, *classes_of(source, len(array), values), notes, test_parts)


def list_encoded(source: str, files: Sequence[bytes], values: object = None) -> FileListing:
    """List images that are encoded files in memory; `values` are n integers or words, or None.

    Raises UserError when there are none, or another number of labels.
    """
    labels, class_names = classes_of(source, len(files), values)

    def read(index: int, limit: int | None) -> bytes:
        return files[index][:limit]

    return FileListing(source, [f"image {k}" for k in range(len(files))], labels, class_names, read)


def is_channels_first(shape: Sequence[int]) -> bool:
    """Whether the shape of an image, given as (H, W, C), is more likely (C, H, W)."""
    first, *sides = shape
    # Few channels before two sides; or more, as satellites have, before equal and larger ones.
    return first <= 4 < min(sides) or first < sides[0] == sides[1] > 4


def suffix_counts(names: Sequence[str]) -> str:
    """Say how many files have which suffix, such as ".heic (20), .txt (1), no suffix (3)"."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    return shortened([f"{suffix} ({number:,})" for suffix, number in counts.most_common()])


def spread_indices(count: int, most: int) -> list[int]:
    """Choose `most` of the numbers 0…count−1 (all, if there are fewer), evenly spread, the first included."""
    chosen = min(count, most)
    return [k * count // chosen for k in range(chosen)]
