"""What lies in a source, before anyone asks whether it is a data set.

A `Listing` names every image and its class and can read each one; sizes and channels may still differ, and
files may be broken. `open_dataset` builds a data set on it, `inspect` reports on it, `convert` mends it.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onefold.data.decode import Pixels, Shape, decode, header_shape, reason
from onefold.errors import UserError

# Enough of a file to know its size: a camera's header with its preview has less than this.
_HEAD = 1 << 17


class Unreadable(UserError):
    """An image that cannot be read: `name` within `source`, and the `reason`."""

    def __init__(self, source: str, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(
            f"{source}: {name} cannot be read ({reason}); replace it, or leave such images out with --unreadable skip"
        )


class Listing(ABC):
    """The images of a source, in their fixed order.

    `names` tells them apart in messages; `labels` is int64 (n,), all 0 when `class_names` is empty.
    """

    def __init__(
        self, source: str, names: Sequence[str], labels: NDArray[np.int64], class_names: tuple[str, ...]
    ) -> None:
        if len(names) == 0:
            raise UserError(f"{source}: holds no images; onefold reads JPEG, PNG, WebP and BMP files")
        self.source = source
        self.names = names
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """Read image `index` as uint8 (H, W, C), not to be written into. Raises `Unreadable`."""

    @abstractmethod
    def shape(self, index: int) -> Shape:
        """Give (H, W, C) of image `index` without decoding it. Raises `Unreadable`."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """Give the bytes that image `index` is stored as. Raises `Unreadable`."""

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
    ) -> None:
        super().__init__(source, names, labels, class_names)
        self._read = read

    def image(self, index: int) -> Pixels:
        # Decoders fail in many ways on broken data; for whoever reads the message they are all one.
        try:
            return decode(self._bytes(index))
        except MemoryError:
            raise
        except Exception as error:
            raise Unreadable(self.source, self.names[index], reason(error)) from error

    def shape(self, index: int) -> Shape:
        with suppress(Exception):  # broken, or a header longer than the head: the whole file will tell
            return header_shape(self._read(index, _HEAD))
        try:
            return header_shape(self._bytes(index))
        except Exception as error:
            raise Unreadable(self.source, self.names[index], reason(error)) from error

    def content(self, index: int) -> bytes:
        try:
            return self._read(index, None)
        except Exception as error:
            raise Unreadable(self.source, self.names[index], reason(error)) from error

    def _bytes(self, index: int) -> bytes:
        data = self._read(index, None)
        if not data:
            raise ValueError("the file is empty")
        return data


class ArrayListing(Listing):
    """Images that are an array already: uint8 (n, H, W, C)."""

    def __init__(
        self, source: str, images: NDArray[np.uint8], labels: NDArray[np.int64], class_names: tuple[str, ...]
    ) -> None:
        super().__init__(source, [f"image {k}" for k in range(len(images))], labels, class_names)
        self._images = images

    def image(self, index: int) -> Pixels:
        return self._images[index]

    def shape(self, index: int) -> Shape:
        height, width, channels = self._images.shape[1:]
        return height, width, channels

    def content(self, index: int) -> bytes:
        # The shape is part of it: 2×8 pixels are not 4×4 pixels.
        return str(self.shape(index)).encode() + self._images[index].tobytes()
