"""The order of images in training: a pure function of (seed, images seen).

Position k of the endless sequence lies in epoch e = k // n, at place k % n of that epoch's permutation of the
n images, which is drawn from PCG64 with the seed (seed, e). There is no state to save: whoever knows how many
images were seen knows what comes next, however they were cut into batches.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def indices(length: int, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Give the images at positions start … start + count − 1 of the endless sequence, int64 (count,).

    `length` is the number of images; `seed` is not negative. Raises ValueError on numbers out of range.
    """
    if length < 1 or start < 0 or count < 0:
        raise ValueError(f"no order for length {length}, start {start} and count {count}")
    parts = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, place = divmod(start, length)
        part = _permutation(length, seed, epoch)[place : place + count]
        parts.append(part)
        start += len(part)
        count -= len(part)
    return np.concatenate(parts)


# A batch needs one epoch, or two where they meet; training and testing may take turns.
@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)
    permutation.flags.writeable = False
    return permutation
