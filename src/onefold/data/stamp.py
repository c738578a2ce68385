"""Digests that are remembered, so that a large data set is not read again each time that a record names it.

The SHA-256 of a set of `LEAST` bytes or more is kept in the cache folder, under its *stamp*: a hash of the number
(inode), size and times of modification and of change (mtime and ctime, in nanoseconds) of every file, of all labels, of
the class names and of which images are meant. Whatever touches a file gives it another ctime, even if its mtime is set
back, and so another stamp, under which nothing is remembered. Two cases are not certain and are not remembered: files
that were touched less than `RACY` seconds before they were read, which may change again within one tick of the file
system's clock, and files whose stamp has changed while they were read.
"""

import contextlib
import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.listing import Listing
from onefold.files import cache_folder, write_whole

LEAST = 1 << 26
"""Bytes of files from which on a digest is remembered: 64 MiB, which are read in a moment."""
RACY = 2.0
"""Seconds for which a file must have been left alone."""


def digest_of(listing: Listing, kept: NDArray[np.int64]) -> str:
    """What `listing.digest(kept)` gives, remembered or by reading all. Raises `Unreadable`."""
    before = stamp(listing, kept)
    path = cache_folder() / "digests" / str(before)
    with contextlib.suppress(OSError, ValueError):
        if before and re.fullmatch("[0-9a-f]{64}", found := path.read_text(encoding="ascii").strip()):
            return found
    found = listing.digest(map(int, kept))
    if before and stamp(listing, kept) == before:
        with contextlib.suppress(OSError):
            write_whole(path, found + "\n")
    return found


def stamp(listing: Listing, kept: NDArray[np.int64]) -> str | None:
    """What tells whether files have changed without reading them; None of small sets, and where it is not certain."""
    if listing.files is None:
        return None
    total, size, latest = hashlib.sha256(b"digest 1 "), 0, 0.0
    try:
        for path in listing.files():
            status = Path(path).stat()
            which = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            total.update(repr(which).encode())
            size, latest = size + status.st_size, max(latest, status.st_mtime, status.st_ctime)
    except OSError:
        return None
    if size < LEAST or latest > time.time() - RACY:
        return None
    total.update(json.dumps(listing.class_names).encode() + kept.astype("<i8").tobytes())
    total.update(listing.labels.astype("<i8").tobytes())
    return total.hexdigest()
