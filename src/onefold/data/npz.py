"""Arrays of images in a .npz or .npy file: any number of channels, with or without labels.

Images are uint8 (n, H, W, C) or (n, H, W); labels are optional: n integers, whole floats or words, also as (n, 1) or
one-hot. An .npz names them `images` and `labels`, or as `numpy.savez`, Keras and MedMNIST do: another word for either,
with the part before or behind it (x_train, train_images). Where it has parts to train, test and validate, the training
part is read, or the one named after a colon: mnist.npz:test. Nothing is ever unpickled.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import choose_column, distinct, looks_like_labels
from onefold.data.listing import ArrayListing, list_arrays
from onefold.data.parts import Choice, choose_part, part_named, part_of
from onefold.errors import UserError

Array = NDArray[np.generic]

# What arrays of images are called, those first that are preferred; also with the name of a part.
_IMAGES = ("images", "x", "arr_0", "data", "image", "imgs", "img")

# Where the names of the classes stand, by their numbers.
_CLASS_NAMES = ("class_names", "label_names", "target_names", "classes", "names")

_TOO_LARGE = "its arrays do not fit into memory, or it is damaged; store large sets as image files or tar shards"


def list_npz(source: str, path: Path, labels_from: str | None = None) -> ArrayListing:
    """Read the arrays. Raises UserError when they are missing, not uint8, or of shapes that do not fit."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images_key, choice = _images_key(source, list(file.files))
            images = file[images_key]
            apart = [key for key in file.files if key != images_key and _part_and_word(key)[0] == _part(images_key)]
            labels, names, notes = _labels(source, apart, file.__getitem__, len(images), labels_from)
            others = [key for key in file.files if key not in (images_key, *apart)]
            if labels is None and labels_from is None and _part(images_key) is None:
                unused = [key for key in others if looks_like_labels(_part_and_word(key)[1])]
                notes = (*notes, *(f"{key} may hold labels, but of a part, and is not used" for key in unused))
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{source}: {_TOO_LARGE}") from error
    except Exception as error:  # numpy fails in many ways on what is no array
        raise UserError(f"{source}: not a .npz file of plain arrays; write it with numpy.savez") from error
    notes = (*notes, *choice.notes)
    listing = list_arrays(source, images, labels, notes, choice.tests)
    if names is not None and listing.class_names:
        numbers = np.array([int(name) for name in listing.class_names])[listing.labels]
        listing = ArrayListing(source, listing.images, numbers, names, notes, choice.tests)
    listing.files = lambda: [path]
    return listing


def list_npy(source: str, path: Path, labels_from: str | None = None) -> ArrayListing:
    """Read one array of images, without labels. Raises UserError like `list_npz`."""
    if labels_from not in (None, "none"):
        raise UserError(f"--labels-from {labels_from}: a .npy file has no labels; leave it out")
    try:
        with path.open("rb") as opened:
            images = np.load(opened, allow_pickle=False)
            if not isinstance(images, np.ndarray):
                raise ValueError("an archive")
    except MemoryError as error:
        raise UserError(f"{source}: {_TOO_LARGE}") from error
    except Exception as error:  # numpy fails in many ways on what is no array
        raise UserError(f"{source}: not a .npy file of a plain array; write it with numpy.save") from error
    listing = list_arrays(source, images)
    listing.files = lambda: [path]
    return listing


def _images_key(source: str, keys: list[str]) -> tuple[str, Choice]:
    """Give the name of the images, and the part that it is of."""
    found = ", ".join(keys) or "none"
    known: dict[str | None, list[str]] = {}
    for key in keys:
        part, word = _part_and_word(key)
        if word in _IMAGES:
            known.setdefault(part, []).append(key)
    whole, asked = known.pop(None, []), part_of(source)
    if asked is None and whole:
        return _preferred(whole), Choice("")
    if not known and asked is None:
        raise UserError(f"{source}: holds no array named images (found: {found}); rename the one that is meant")
    choice = choose_part(source, [part for part in known if part], found)
    return _preferred(known[choice.part]), choice


def _labels(
    source: str, keys: list[str], load: Callable[[str], Array], count: int, labels_from: str | None
) -> tuple[Array | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Give the labels and the names of their classes, None where there are none, and what is to be said."""
    words = {key: _part_and_word(key)[1] for key in keys}
    if labels_from == "none":
        return None, None, ()
    names_key = next((key for key in keys if words[key] in _CLASS_NAMES and load(key).dtype.kind in "US"), None)
    keys = [key for key in keys if key != names_key]
    words = {key: "labels" if word == "arr_1" else word for key, word in words.items()}
    candidates = {key: words[key] for key in keys if looks_like_labels(words[key])}
    arrays: Mapping[str, Array] = {key: load(key) for key in keys if labels_from is None or key == labels_from}
    others = [key for key in arrays if key not in candidates and _could_be_labels(arrays[key], count)]
    column = choose_column(source, candidates, keys, labels_from, others)
    if column.name is None:
        return None, None, column.notes
    labels = arrays[column.name]
    names = None if names_key is None else tuple(map(str, load(names_key).ravel().tolist()))
    one_column = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if names is not None and one_column and labels.dtype.kind in "iu" and labels.size:
        if labels.min() < 0 or labels.max() >= len(names):
            raise UserError(
                f"{source}: {column.name} goes from {labels.min()} to {labels.max()}, but {names_key} has "
                f"{len(names)} names; make them fit"
            )
        return labels, distinct(names), column.notes
    return labels, None, column.notes


def _could_be_labels(array: Array, count: int) -> bool:
    """Whether there is a value for each image, and fewer different ones than images."""
    one_each = array.shape in ((count,), (count, 1)) and array.dtype.kind in "biuUS"
    return one_each and 1 < len(np.unique(array)) <= max(count // 2, 2)


def _preferred(keys: list[str]) -> str:
    return min(keys, key=lambda key: _IMAGES.index(_part_and_word(key)[1]))


def _part(key: str) -> str | None:
    return _part_and_word(key)[0]


def _part_and_word(key: str) -> tuple[str | None, str]:
    """Cut a key such as x_train into its part, if it names one, and the word for what it holds."""
    words = re.split("[_. -]", key.lower())
    parts = [part_named(word) for word in words]
    found = [part for part in parts if part]
    if len(found) != 1 or len(words) < 2:
        return None, key.lower()
    return found[0], "_".join(word for word, part in zip(words, parts, strict=True) if not part)
