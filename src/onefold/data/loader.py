"""Batches for training, without end, in an order that is a pure function of (seed, images seen).

Position k of the endless sequence lies in epoch e = k // n, at place k % n of that epoch's permutation of the
n images, which is drawn from PCG64 with the seed (seed, e). There is no state to save: whoever knows how many
images were seen knows what comes next, however they were cut into batches.

A small data set is read into memory once; a large one is decoded batch by batch, by threads that work ahead.
Either way, and for any number of threads, the batches are the same.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache
from itertools import count
from types import TracebackType
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from onefold.data.dataset import Dataset
from onefold.data.parallel import Progress, map_indices, map_ordered
from onefold.errors import UserError

Batch: TypeAlias = tuple[UInt8[Tensor, "B C H W"], Int64[Tensor, "B"]]
"""Images and labels."""

IN_MEMORY = 1 << 30
"""Bytes of a data set up to which it is read at once, and stays on the device."""


class Loader:
    """An endless iterator of batches; `seen` is the position of the next image, from which to resume.

    Close it, or use it in a `with` statement, to end its threads at once; dropping it ends them too.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        seed: int,
        start: int = 0,
        workers: int = 0,
        in_memory: bool | None = None,
        progress: Progress | None = None,
        device: torch.device | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Begin at image position `start` of the order given by `seed`, with `batch` images at a time.

        Of each batch, only images `part`[0] to `part`[1] are read and given, if there is one.

        `in_memory` None means: read all images now if they take at most 1 GiB; they then stay, as uint8, on the
        `device` to which batches go (default: the CPU). `progress` is told of that reading. Otherwise `workers`
        threads decode ahead; 0 decodes when asked.

        Raises UserError when an image cannot be read: here if in memory, else from the iteration.
        """
        if batch < 1 or start < 0 or workers < 0:
            raise UserError(f"batch {batch}, start {start}, workers {workers}: batch must be at least 1, the others 0")
        self.seen = start
        self._batch = batch
        length = len(dataset)
        if in_memory is None:
            in_memory = length * int(np.prod(dataset.image_shape)) <= IN_MEMORY
        to = device or torch.device("cpu")
        memory = [part.to(to) for part in read_all(dataset, progress=progress)] if in_memory else None

        # It must not hold `self`: then dropping the loader would not end its threads.
        def read(position: int) -> Batch:
            chosen = indices(length, seed, position, batch)[slice(*(part or (None,)))]
            if memory is None:
                images, labels = _read(dataset, chosen)
                return _to_device(images, to), _to_device(labels, to)
            images, labels = memory
            where = _to_device(torch.from_numpy(chosen), to)
            return images[where], labels[where]

        self._read_batch = read
        # Gathering a batch from memory is quicker than handing it from one thread to another.
        self._workers = 0 if in_memory else workers
        self._batches = self._batches_from(start)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.seen += self._batch
        return batch

    def restart(self, start: int) -> None:
        """Go to image position `start`, forwards or back; images in memory stay there.

        The batches that follow are those of a new loader that begins there. What threads had read ahead is dropped;
        they end, and others begin. It also goes on after an error, and after `close`.

        Raises UserError when `start` is negative.
        """
        if start < 0:
            raise UserError(f"start {start}: an image position must be at least 0")
        self._batches.close()
        self._batches = self._batches_from(start)
        self.seen = start

    def close(self) -> None:
        """End the threads. There are no batches afterwards."""
        self._batches.close()

    def _batches_from(self, start: int) -> Generator[Batch]:
        return map_ordered(self._read_batch, count(start, self._batch), workers=self._workers)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_all(
    dataset: Dataset,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> Batch:
    """Read all images, or those at `indices`: uint8 (n, C, H, W) and labels int64 (n,).

    Raises UserError with the name of the first image that cannot be read.
    """
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    images, labels = _empty_batch(dataset, len(chosen))

    def fill(place: int) -> None:
        image, labels[place] = dataset[int(chosen[place])]
        images[place] = image.transpose(2, 0, 1)

    for _ in map_indices(fill, range(len(chosen)), progress):
        pass
    return torch.from_numpy(images), torch.from_numpy(labels)


def read_batches(
    dataset: Dataset, indices: Sequence[int] | NDArray[np.int64] | None = None, batch: int = 256
) -> Iterator[Batch]:
    """Read images as `read_all` does, but `batch` at a time, so that no more are held than are at work."""
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    return (read_all(dataset, chosen[start : start + batch]) for start in range(0, len(chosen), batch))


def _read(dataset: Dataset, chosen: NDArray[np.int64]) -> Batch:
    """Read one batch in the thread that calls."""
    images, labels = _empty_batch(dataset, len(chosen))
    for place, index in enumerate(chosen.tolist()):
        image, labels[place] = dataset[index]
        images[place] = image.transpose(2, 0, 1)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """On the device; what copies it to a GPU does not keep the caller waiting."""
    if device.type != "cuda":
        return x.to(device)
    with torch.cuda.device(
        device
    ):  # threads begin on the first one, which is another process's where there are several
        return x.pin_memory().to(device, non_blocking=True)


def _empty_batch(dataset: Dataset, images: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    height, width, channels = dataset.image_shape
    return np.empty((images, channels, height, width), dtype=np.uint8), np.empty(images, dtype=np.int64)


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
        parts.append(part.astype(np.int64))
        start += len(part)
        count -= len(part)
    return np.concatenate(parts)


# A batch needs one epoch, or two where they meet; training and testing may take turns.
@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> NDArray[np.integer]:
    permutation = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)
    if length < 1 << 32:  # half the memory, for as long as it is kept
        permutation = permutation.astype(np.uint32)
    permutation.flags.writeable = False
    return permutation
