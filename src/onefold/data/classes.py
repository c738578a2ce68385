"""Classes from values: which number or word means which class, and which column holds them.

Classes are numbered 0…K−1 in sorted order, where "10" follows "9"; so are the folders of a folder of images.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onefold.data.messages import count_text, shortened
from onefold.errors import UserError

# What columns of labels are called, those first that are preferred.
_NAMES = ("label", "labels", "class", "target", "targets", "y", "category", "classes", "categories")

# Words within other such names.
_WORDS = frozenset(
    {*_NAMES, "cls", "lbl", "classid", "labelid", "categoryid", "classname", "labelname", "species", "breed", "digit"}
)
_COARSE = frozenset({"coarse", "super", "meta", "parent"})


class Column(NamedTuple):
    """The column of the labels, None if there is none, and what is to be said of it and of others."""

    name: str | None
    notes: tuple[str, ...] = ()


def natural_key(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """Make a sort key in which numbers inside a text count as numbers: "9" < "10" < "a2" < "a10"."""
    parts: list[str | tuple[int, str]] = []
    for position, part in enumerate(re.split("([0-9]+)", text)):
        digits = part.lstrip("0")
        parts.append((len(digits), digits) if position % 2 else part)
    return parts, text


def looks_like_labels(name: str) -> bool:
    """Whether a column of this name probably holds classes: label, fine_label, classId, y."""
    return not _words(name).isdisjoint(_WORDS) and "names" not in _words(name)


def choose_column(
    source: str,
    candidates: Mapping[str, str],
    columns: Sequence[str],
    wanted: str | None,
    others: Sequence[str] = (),
) -> Column:
    """Choose the column of the labels among the `candidates`, which look like it; or the one that is `wanted`.

    `candidates` are names of `columns`, each with the word in it that counts. `wanted` is one of `columns`, or "none".
    `others` have a value for each image, and another name.
    Raises UserError when it is not there.
    """
    if wanted is not None:
        if wanted != "none" and wanted not in columns:
            found = shortened(list(columns)) or "none"
            raise UserError(
                f"--labels-from {wanted}: {source} has no such column (found: {found}); choose one, or none"
            )
        return Column(None if wanted == "none" else wanted)
    if not candidates:
        lines = [f"there are no labels; if {name} holds the classes, say --labels-from {name}" for name in others[:3]]
        return Column(None, tuple(lines))
    first, *rest = sorted(candidates, key=lambda name: _preference(candidates[name]))
    if rest:
        left = ", ".join(rest)
        return Column(first, (f"labels are those of {first}; not used: {left} (--labels-from {rest[0]} takes it)",))
    return Column(first, () if candidates[first].lower() in _NAMES else (f"labels are those of {first}",))


def classes_of(source: str, count: int, values: object) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Number the classes of `count` images by values: integers, whole floats or words, also as (n, 1) or one-hot.

    Returns labels, int64 (n,), and K names. None, or no value for any image, is no classes.
    Raises UserError when they are not one for each.
    """
    unlabelled = np.zeros(count, dtype=np.int64), ()
    if values is None:
        return unlabelled
    if isinstance(values, list | tuple):
        values = _without_boxes(values)
        missing = [k for k, value in enumerate(values) if is_missing(value)]
        if missing and len(missing) == len(values):
            return unlabelled
        if missing:
            some = shortened([str(k) for k in missing], 3)
            raise UserError(
                f"{source}: row {some} has no label; fill it, leave such rows out, or say --labels-from none"
            )
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(values, dtype=object)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and array.shape[1] > 1 and _is_one_hot(array):
        labels, class_names = array.argmax(axis=1).astype(np.int64), tuple(map(str, range(array.shape[1])))
    else:
        labels, class_names = _number(source, array)
    if len(labels) != count:
        raise UserError(
            f"{source}: {count_text(count)} but {count_text(len(labels), 'label')}; store one label per image"
        )
    return labels, class_names


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes, each once: those that stand for several get their number, as "crane (134)"."""
    often = {name for name, count in Counter(names).items() if count > 1}
    return tuple(f"{name} ({k})" if name in often else name for k, name in enumerate(names))


def is_missing(value: object) -> bool:
    """Whether a label is none: null, not a number, or an empty list."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, list) and value in ([], [None]))
    )


def _number(source: str, array: NDArray[np.generic]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Map integers or words to 0…K−1 in sorted order; their names are what they were."""
    if array.ndim == 1 and array.dtype.kind == "f" and bool((array == np.floor(array.astype(np.float64))).all()):
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "biuUS":
        raise UserError(
            f"{source}: labels must be one integer or word per image, not {array.dtype} of shape "
            f"{array.shape}; store the number of the class, or say --labels-from none"
        )
    if array.dtype.kind == "S":
        array = np.char.decode(array.astype(np.bytes_), "utf-8", "replace")
    found, labels = np.unique(array, return_inverse=True)
    names = [str(name) for name in found.tolist()]
    if array.dtype.kind == "U":  # numpy sorts "10" before "9"
        order = sorted(range(len(names)), key=lambda k: natural_key(names[k]))
        rank = np.empty(len(names), dtype=np.int64)
        rank[order] = np.arange(len(names))
        labels, names = rank[labels], [names[k] for k in order]
    return labels.astype(np.int64).reshape(-1), tuple(names)


def _without_boxes(values: Sequence[object]) -> list[object]:
    """Lists of a single value are that value, where all that are there are such lists."""
    boxes = [value for value in values if not is_missing(value)]
    if boxes and all(isinstance(value, list | tuple) and len(value) == 1 for value in boxes):
        return [None if is_missing(value) else value[0] for value in values]  # type: ignore[index]
    return list(values)


def _is_one_hot(array: NDArray[np.generic]) -> bool:
    numbers = array.dtype.kind in "biuf"
    return numbers and bool(((array == 0) | (array == 1)).all() and (array.sum(axis=1, dtype=np.float64) == 1).all())


def _words(name: str) -> set[str]:
    apart = re.sub("([a-z])([A-Z])", r"\1 \2", name)
    return set(re.split("[^a-z]+", apart.lower()))


def _preference(name: str) -> tuple[int, bool, bool, str]:
    words = _words(name)
    exact = _NAMES.index(name.lower()) if name.lower() in _NAMES else len(_NAMES)
    return exact, not words.isdisjoint(_COARSE), "fine" not in words, name
