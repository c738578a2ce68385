"""What a data set is: numbered images of one shape, each with a class.

`Dataset` is all that training and evaluation know of data; a new kind of data is a new subclass. `Subset` is
a view of chosen images, and `holdout` cuts a data set into two such views.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onefold.data.decode import Pixels, Shape
from onefold.data.text import counted
from onefold.errors import UserError


class Dataset(ABC):
    """Numbered uint8 images of one shape, with classes.

    source: what was opened, as it was given.
    image_shape: (H, W, C) of every image.
    class_names: K names; none when the images have no classes.
    labels: int64 (n,), in 0…K−1; all 0 when K = 0.
    skipped: names of images that were left out because they cannot be read.
    """

    def __init__(
        self,
        source: str,
        image_shape: Shape,
        labels: NDArray[np.int64],
        class_names: tuple[str, ...] = (),
        skipped: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.image_shape = image_shape
        self.labels = labels
        self.class_names = class_names
        self.skipped = skipped
        self._digest: str | None = None

    @property
    def classes(self) -> int:
        """K, the number of classes; 0 when the images have none."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        """Give image `index` as uint8 (H, W, C), not to be written into, and its label (0 when K = 0).

        Safe to call from many threads. Raises UserError when the image cannot be read, and IndexError past
        the end.
        """

    @abstractmethod
    def _hash(self) -> str:
        """Compute what `digest` gives."""

    def digest(self) -> str:
        """SHA-256 of the images, their order and classes, in hexadecimal; computed once, by reading all."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest


class Subset(Dataset):
    """The images `indices` of a data set, in that order, as a data set of the same classes."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._indices = np.asarray(indices, dtype=np.int64)
        labels = dataset.labels[self._indices]
        super().__init__(dataset.source, dataset.image_shape, labels, dataset.class_names, dataset.skipped)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return self._dataset[int(self._indices[index])]

    def _hash(self) -> str:
        # Little-endian on every machine, so that the digest is the same too.
        chosen = self._indices.astype("<i8").tobytes()
        return hashlib.sha256(self._dataset.digest().encode() + chosen).hexdigest()


def holdout(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Cut a data set in two, (train, test), where test has the rounded `fraction` of the images.

    The cut is a permutation fixed by `seed` and the number of images; both views are shuffled.

    Raises UserError when one part would be empty.
    """
    count = len(dataset)
    held = round(count * fraction)
    if count < 2:
        raise UserError(
            f"{dataset.source}: holds {counted(count)}, but at least 2 are needed to hold one out for evaluation; "
            "add some, or give others with --test-data"
        )
    if not 0 < held < count:
        raise UserError(
            f"{dataset.source}: holding out a fraction {fraction} of {count:,} images leaves one part empty; "
            f"hold out one with --data.holdout {1 / count:.2g}, or more, or give other images with --test-data"
        )
    # The second number keeps this permutation apart from those of the epochs (see order.py).
    permutation = np.random.Generator(np.random.PCG64([seed, 0, 1])).permutation(count)
    return Subset(dataset, permutation[held:]), Subset(dataset, permutation[:held])
