"""Files of images as they are read: regular ones alone, of no more than a bounded size, by any number of threads."""

import os
import stat
import threading
import weakref
from pathlib import Path

__all__ = ["LARGEST", "PositionedFile", "open_regular", "read_file"]

LARGEST = 1 << 30
"""Bytes of an image's file, at most: what is larger is none, and would fill the memory."""


def open_regular(path: str | Path) -> int:
    """Open a file to read; gives its descriptor. Raises ValueError for a pipe or a device, which may never end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """Give a file's content, or its first `limit` bytes. Raises OSError, and ValueError for what is no image's file."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise ValueError(f"{size:,} bytes are too many for an image")
        return file.read(-1 if limit is None else limit)


class PositionedFile:
    """An open file; closed when nobody holds it any more.

    Reads share no file offset (`pread`), so threads, and processes forked after opening, read at once, without a lock.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be opened, and ValueError as `open_regular`."""
        descriptor = open_regular(path)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, descriptor)

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Give `size` bytes from `offset`. Raises ValueError when the file ends before."""
        if offset < 0 or size < 0 or offset + size > self.size:  # before room is made for them
            raise ValueError("the file is cut short")
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, size, offset)
        else:  # Windows: seek and read must not be torn apart
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                data = os.read(self._descriptor, size)
        if len(data) < size:
            raise ValueError("the file is cut short")
        return data
