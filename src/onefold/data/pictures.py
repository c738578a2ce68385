"""A listing that keeps what a data set promises: one shape, and no image that was found to be broken."""

from typing import Literal

import numpy as np

from onefold.data.dataset import Dataset
from onefold.data.decode import Pixels, Shape
from onefold.data.listing import HEADERS, Listing, Unreadable, spread
from onefold.data.parallel import each
from onefold.data.text import shape_text
from onefold.errors import UserError


class Pictures(Dataset):
    """The readable images of a listing.

    Raises UserError when shapes differ, when nothing can be read, or (`unreadable` = "refuse") when an image
    cannot be.
    """

    def __init__(self, listing: Listing, unreadable: Literal["refuse", "skip"] = "refuse") -> None:
        self._listing = listing
        everything = np.arange(len(listing), dtype=np.int64)
        if unreadable == "skip":
            shapes = _readable(listing)
            kept = np.array(list(shapes), dtype=np.int64)
        else:
            # All of a small set; of a large one enough to find out early that it is mixed, while opening stays
            # quick. Whatever slips through is found when it is read.
            shapes = {index: listing.shape(index) for index in spread(len(listing), HEADERS)}
            kept = everything
        if len(kept) == 0:
            raise UserError(f"{listing.source}: none of its images can be read; check the files")
        self._kept = kept
        self._first, shape = next(iter(shapes.items()))
        skipped = tuple(listing.names[int(k)] for k in np.setdiff1d(everything, kept))
        super().__init__(listing.source, shape, listing.labels[kept], listing.class_names, skipped)
        for index, other in shapes.items():
            self._check(index, other)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        place = int(self._kept[index])
        pixels = self._listing.image(place)
        height, width, channels = pixels.shape
        self._check(place, (height, width, channels))
        return pixels, int(self._listing.labels[place])

    def _hash(self) -> str:
        return self._listing.digest(self._kept.tolist())

    def _check(self, index: int, shape: Shape) -> None:
        if shape == self.image_shape:
            return
        names = self._listing.names
        raise UserError(
            f"{self.source}: {names[index]} is {shape_text(shape)} but {names[self._first]} is "
            f"{shape_text(self.image_shape)}; make them alike: {self._listing.conversion(skip=bool(self.skipped))}"
        )


def _readable(listing: Listing) -> dict[int, Shape]:
    """Decode every image: the shapes of those that can be read, in order."""

    def shape(index: int) -> Shape | None:
        try:
            height, width, channels = listing.image(index).shape
        except Unreadable:
            return None
        return height, width, channels

    shapes = enumerate(each(shape, range(len(listing))))
    return {index: found for index, found in shapes if found is not None}
