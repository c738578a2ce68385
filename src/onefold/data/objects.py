"""Any Python object that holds images and labels, as a torch-style data set does.

It has `image_shape` (H, W, C), `classes` (K, 0 without), `len()` and `[i]`, which gives a pair: an image, uint8
(H, W, C), as an array or a torch tensor, and its label, an integer in 0…K−1 (ignored when K = 0). Grey images may
be (H, W). It may have `class_names`, K words.

The object decides itself what an item is: everything is checked when it is read, and the object is asked for one item
at a time, for it may hold a file that two threads must not read at once.
"""

import operator
import threading
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onefold.data.classes import distinct
from onefold.data.decode import Pixels, Shape
from onefold.data.listing import Listing, is_channels_first
from onefold.data.messages import count_text
from onefold.errors import UserError


def source_name(thing: object) -> str:
    """Name an object in messages and records, such as "MyDataset (a Python object)"."""
    return f"{type(thing).__name__} (a Python object)"


class ObjectListing(Listing):
    """The images of an object. Its labels are read once, when they are asked for.

    Raises UserError, which says what is missing or wrong, here or when an image is read. What the object itself raises
    passes through.
    """

    is_stored = False

    def __init__(self, source: str, thing: object) -> None:
        self._thing = cast(Any, thing)
        self._lock = threading.RLock()
        for attribute, use in (
            ("image_shape", "give it image_shape, (H, W, C)"),
            ("classes", "give it classes, the number of classes, or 0"),
            ("__len__", "give it len(), the number of images"),
            ("__getitem__", "let [i] give image i, uint8 (H, W, C), and its label"),
        ):
            if not hasattr(thing, attribute):
                what = {"__len__": "len()", "__getitem__": "[i]"}.get(attribute, attribute)
                raise UserError(f"{source}: has no {what}; {use}; or give arrays, (images, labels)")
        count = len(self._thing)
        if count == 0:
            raise UserError(f"{source}: holds no images, for its len() is 0; give it at least one")
        self._shape = _checked_shape(source, self._thing.image_shape)
        class_names = _class_names(source, self._thing)
        self.is_numbered = getattr(thing, "class_names", None) is None
        super().__init__(source, [f"image {k}" for k in range(count)], self._read_labels, class_names)
        self.item(0)  # most mistakes are in every item, and are better known now

    def item(self, index: int) -> tuple[Pixels, int]:
        with self._lock:
            item = self._thing[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            kind = type(item).__name__
            raise UserError(f"{self.source}: [{index}] gives a {kind}; let it give a pair, image and label")
        return self._pixels(index, item[0]), self._label(index, item[1])

    def image(self, index: int) -> Pixels:
        return self.item(index)[0]

    def shape(self, index: int) -> Shape:
        return self._shape

    def content(self, index: int) -> bytes:
        # As of an array, so that the same images have the same digest.
        return str(self._shape).encode() + self.image(index).tobytes()

    def _pixels(self, index: int, image: object) -> Pixels:
        array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
        if array.dtype != np.uint8:
            raise UserError(f"{self.source}: image {index} is {array.dtype}; give uint8 with values from 0 to 255")
        if array.shape == self._shape[:2] and self._shape[2] == 1:
            array = array[..., None]
        if array.shape != self._shape:
            height, width, channels = self._shape
            if array.shape == (channels, height, width):
                turn = "permute" if isinstance(image, Tensor) else "transpose"
                wrong = f"looks channels first; give (H, W, C), by .{turn}(1, 2, 0)"
            else:
                wrong = f"but image_shape is {self._shape}; make them alike"
            raise UserError(f"{self.source}: image {index} has shape {array.shape}, {wrong}")
        return array

    def _label(self, index: int, label: object) -> int:
        classes = len(self.class_names)
        if classes == 0:
            return 0
        try:
            number = operator.index(cast(Any, label))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.source}: image {index} has the label {label!r}; give an integer from 0 to {classes - 1}"
            ) from error
        if not 0 <= number < classes:
            raise UserError(
                f"{self.source}: image {index} has label {number}, but there are {classes} classes; "
                f"number them from 0 to {classes - 1}"
            )
        return number

    def _read_labels(self) -> NDArray[np.int64]:
        count = len(self.names)
        if not self.class_names:
            return np.zeros(count, dtype=np.int64)
        return np.array([self.item(index)[1] for index in range(count)], dtype=np.int64)


def _checked_shape(source: str, given: object) -> Shape:
    try:
        height, width, channels = (operator.index(side) for side in cast(Any, given))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: image_shape is {given!r}; give three integers, (H, W, C)") from error
    if min(height, width, channels) < 1:
        raise UserError(f"{source}: image_shape is {given!r}; its numbers must be at least 1")
    if is_channels_first((height, width, channels)):
        better = (width, channels, height)
        raise UserError(f"{source}: image_shape {given!r} looks channels first; give (H, W, C), {better}")
    return height, width, channels


def _class_names(source: str, thing: Any) -> tuple[str, ...]:
    try:
        classes = operator.index(thing.classes)
    except TypeError as error:
        raise UserError(f"{source}: classes is {thing.classes!r}; give the number of classes, or 0") from error
    if classes < 0:
        raise UserError(f"{source}: classes is {classes}; give the number of classes, or 0")
    names = getattr(thing, "class_names", None)
    if names is None:
        return tuple(map(str, range(classes)))
    if isinstance(names, str) or len(names) != classes:
        raise UserError(
            f"{source}: class_names has {count_text(len(names), 'name')}, but classes is {classes}; name each class"
        )
    return distinct([str(name) for name in names])
