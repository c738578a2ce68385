"""What a data set is: numbered images of one shape, each with a class.

`Dataset` is all that training and evaluation know of data. `ListingDataset` is one that keeps this promise about the
images of a source, which may not: one shape, and no image that was found to be broken. `Subset` is a view of
chosen images, and `holdout` cuts a data set into two such views.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onefold.data.decode import Pixels, Shape
from onefold.data.listing import HEADERS, Listing, Unreadable, spread_indices
from onefold.data.messages import count_text, shape_text, shortened
from onefold.data.parallel import map_indices
from onefold.data.stamp import digest_of
from onefold.errors import UserError, printable


class Dataset(ABC):
    """Numbered uint8 images of one shape, with classes.

    source: what was opened, as it was given.
    image_shape: (H, W, C) of every image.
    class_names: K names; none when the images have no classes.
    skipped: names of images that were left out because they cannot be read.
    notes: what should be said before the data are used, a line each, such as files that are not read as images.
    test_sources: parts of the same source, to open by these names, that training may be tested on; the best first.
    is_numbered: whether the classes have no names, only numbers.
    """

    test_sources: tuple[str, ...] = ()
    is_numbered = False

    def __init__(
        self,
        source: str,
        image_shape: Shape,
        class_names: tuple[str, ...] = (),
        skipped: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.image_shape = image_shape
        self.class_names = class_names
        self.skipped = skipped
        self.notes = tuple(map(printable, notes))
        self._digest: str | None = None

    @property
    def classes(self) -> int:
        """K, the number of classes; 0 when the images have none."""
        return len(self.class_names)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, int64 (n,), in 0…K−1; all 0 when K = 0."""
        return self._read_labels()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        """Give image `index` as uint8 (H, W, C), not to be written into, and its label (0 when K = 0).

        Safe to call from many threads. Raises UserError when the image cannot be read, and IndexError past
        the end.
        """

    @abstractmethod
    def _read_labels(self) -> NDArray[np.int64]:
        """Give what `labels` gives; asked once, and only if somebody wants to know."""

    @abstractmethod
    def _hash(self) -> str:
        """Compute what `digest` gives."""

    def digest(self) -> str:
        """SHA-256 of the images, their order and classes, in hexadecimal.

        Computed once, by reading all; of a large set in files it is remembered until one of them is touched (`stamp`).
        """
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def fingerprint(self) -> str | None:
        """SHA-256 that tells another data set without reading all of it, None where that cannot be had.

        Hashed are the number of images, the names of the classes, all labels, and what up to 1,000 images, evenly
        spread, are stored as. None of an object in memory, whose images may differ whenever they are read.
        """
        return None


class ListingDataset(Dataset):
    """The readable images of a listing, all of one shape.

    Raises UserError when shapes differ, when nothing can be read, or (`unreadable` = "refuse") when an image
    cannot be.
    """

    def __init__(self, listing: Listing, unreadable: Literal["refuse", "skip"] = "refuse") -> None:
        self._listing = listing
        everything = np.arange(len(listing), dtype=np.int64)
        if unreadable == "refuse":
            listing.refuse_damaged()
        if unreadable == "skip":
            shapes = _readable_shapes(listing)
            kept = np.array(list(shapes), dtype=np.int64)
        else:
            # All of a small set; of a large one enough to find out early that it is mixed, while opening stays
            # quick. Whatever slips through is found when it is read.
            shapes = {index: listing.shape(index) for index in spread_indices(len(listing), HEADERS)}
            kept = everything
        if len(kept) == 0:
            raise UserError(f"{listing.source}: none of its images can be read; check the files")
        self._kept = kept
        self._first, shape = next(iter(shapes.items()))
        left_out = np.setdiff1d(everything, kept) if len(kept) < len(everything) else []
        skipped = (*(name for name, _ in listing.damaged), *(listing.names[int(k)] for k in left_out))
        super().__init__(listing.source, shape, listing.class_names, skipped, tuple(listing.notes))
        self.is_numbered = listing.is_numbered
        self.test_sources = tuple(f"{listing.source}:{part}" for part in listing.test_parts)
        for index, other in shapes.items():
            self._check(index, other)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        place = int(self._kept[index])
        pixels, label = self._listing.item(place)
        height, width, channels = pixels.shape
        self._check(place, (height, width, channels))
        return pixels, label

    def _read_labels(self) -> NDArray[np.int64]:
        labels = self._listing.labels
        return labels if len(self._kept) == len(labels) else labels[self._kept]

    def _hash(self) -> str:
        return digest_of(self._listing, self._kept)

    def fingerprint(self) -> str | None:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str | None:
        if not self._listing.is_stored:
            return None
        kept = self._kept
        total = hashlib.sha256(f"{len(kept)} ".encode() + self.labels.astype("<i8").tobytes())
        total.update(self._listing.digest([int(kept[k]) for k in spread_indices(len(kept), HEADERS)]).encode())
        return total.hexdigest()

    def _check(self, index: int, shape: Shape) -> None:
        if shape == self.image_shape:
            return
        names = self._listing.names
        raise UserError(
            f"{self.source}: {names[index]} is {shape_text(shape)} but {names[self._first]} is "
            f"{shape_text(self.image_shape)}; make them alike: {self._listing.convert_command(skip=bool(self.skipped))}"
        )


class Subset(Dataset):
    """The images `indices` of a data set, in that order, as a data set of the same classes."""

    def __init__(self, dataset: Dataset, indices: Sequence[int] | NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._indices = np.arange(len(dataset), dtype=np.int64)[np.asarray(indices, dtype=np.int64)]
        super().__init__(dataset.source, dataset.image_shape, dataset.class_names, dataset.skipped, dataset.notes)

    @property
    def whole(self) -> Dataset:
        """The data set that it is a part of."""
        return self._dataset

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return self._dataset[int(self._indices[index])]

    def _read_labels(self) -> NDArray[np.int64]:
        return self._dataset.labels[self._indices]

    def _hash(self) -> str:
        return self._with_indices(self._dataset.digest())

    def fingerprint(self) -> str | None:
        whole = self._dataset.fingerprint()
        return None if whole is None else self._with_indices(whole)

    def _with_indices(self, digest: str) -> str:
        # Little-endian on every machine, so that the digest is the same too.
        return hashlib.sha256(digest.encode() + self._indices.astype("<i8").tobytes()).hexdigest()


class Renumbered(Dataset):
    """A data set whose classes have other names, and their numbers among these."""

    def __init__(
        self, dataset: Dataset, class_names: tuple[str, ...], numbers: Sequence[int], notes: tuple[str, ...] = ()
    ) -> None:
        """Class k of `dataset` is class `numbers[k]` of `class_names`."""
        self._dataset = dataset
        self._number = np.array(numbers, dtype=np.int64)
        super().__init__(dataset.source, dataset.image_shape, class_names, dataset.skipped, (*dataset.notes, *notes))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        image, label = self._dataset[index]
        return image, int(self._number[label])

    def _read_labels(self) -> NDArray[np.int64]:
        return self._number[self._dataset.labels]

    def _hash(self) -> str:
        return self._with_names(self._dataset.digest())

    def fingerprint(self) -> str | None:
        own = self._dataset.fingerprint()
        return None if own is None else self._with_names(own)

    def _with_names(self, digest: str) -> str:
        return hashlib.sha256((digest + json.dumps(self.class_names)).encode()).hexdigest()


def with_classes_of(test: Dataset, train: Dataset) -> Dataset:
    """Test images with the numbers that their classes have in the training images, by name.

    Classes that the test images lack are said in a note. Raises UserError, with names, where the training images lack
    a class, or only one of the two has classes. Classes without names fit any of the same number.
    """
    if test.class_names == train.class_names:
        return test
    if test.is_numbered and test.classes == train.classes:
        return Renumbered(test, train.class_names, range(test.classes))
    if not train.class_names or not test.class_names:
        with_, without = (test, train) if test.class_names else (train, test)
        raise UserError(
            f"{test.source}: {without.source} has no classes, but {with_.source} has {len(with_.class_names)} "
            f"({shortened(with_.class_names, 3)}); give test images of the same kind, or train without classes by "
            "--labels-from none"
        )
    if strange := [name for name in test.class_names if name not in train.class_names]:
        raise UserError(
            f"{test.source}: has {count_text(len(strange), 'class', 'classes')} that {train.source} lacks "
            f"({shortened(strange, 5)}; there: {shortened(train.class_names, 5)}); name its classes alike"
        )
    lacking = [name for name in train.class_names if name not in test.class_names]
    notes = (f"{test.source} has no images of the classes {shortened(lacking, 5)}",) if lacking else ()
    numbers = [train.class_names.index(name) for name in test.class_names]
    return Renumbered(test, train.class_names, numbers, notes)


def holdout(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Cut a data set in two, (train, test), where test has the rounded `fraction` of the images.

    The cut is a permutation fixed by `seed` and the number of images; both views are shuffled.

    Raises UserError when one part would be empty.
    """
    count = len(dataset)
    held = round(count * fraction)
    if count < 2:
        raise UserError(
            f"{dataset.source}: holds {count_text(count)}, but at least 2 are needed to hold one out for evaluation; "
            "add some, or give others with --test-data"
        )
    if not 0 < held < count:
        raise UserError(
            f"{dataset.source}: holding out a fraction {fraction} of {count:,} images leaves one part empty; "
            f"hold out one with --data.holdout {1 / count:.2g}, or more, or give other images with --test-data"
        )
    # The second number keeps this permutation apart from those of the epochs (see loader.py).
    permutation = np.random.Generator(np.random.PCG64([seed, 0, 1])).permutation(count)
    return Subset(dataset, permutation[held:]), Subset(dataset, permutation[:held])


def _readable_shapes(listing: Listing) -> dict[int, Shape]:
    """Decode every image: the shapes of those that can be read, in order."""

    def shape(index: int) -> Shape | None:
        try:
            height, width, channels = listing.image(index).shape
        except Unreadable:
            return None
        return height, width, channels

    shapes = enumerate(map_indices(shape, range(len(listing))))
    return {index: found for index, found in shapes if found is not None}
