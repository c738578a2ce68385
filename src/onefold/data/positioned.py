"""A file that any number of threads read at any place."""

import os
import threading
import weakref
from pathlib import Path

__all__ = ["PositionedFile"]


class PositionedFile:
    """An open file; closed when nobody holds it any more.

    Reads share no file offset (`pread`), so threads, and processes forked after opening, read at once, without a lock.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be opened."""
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
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
