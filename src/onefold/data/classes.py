"""Classes from names: which folder, number or word means which class.

Files: a sub-folder is a class, and images directly at the top have none. Arrays and tables: a column of
integers or words. Either way classes are numbered 0…K−1 in sorted order, where "10" follows "9".
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onefold.errors import UserError


def natural_key(text: str) -> tuple[list[str | tuple[int, str]], str]:
    """Make a sort key in which numbers inside a text count as numbers: "9" < "10" < "a2" < "a10"."""
    parts: list[str | tuple[int, str]] = []
    for position, part in enumerate(re.split("([0-9]+)", text)):
        digits = part.lstrip("0")
        parts.append((len(digits), digits) if position % 2 else part)
    return parts, text


def order_by_class(
    source: str, names: Sequence[str], *, packed: bool = False
) -> tuple[list[int], NDArray[np.int64], tuple[str, ...]]:
    """Put files in order and find their classes from the folders that they lie in.

    `names` are relative paths with forward slashes. `packed` tolerates one folder around everything, as
    archives have it. Returns the order (positions in `names`), the labels in that order, int64 (n,), and the
    class names (none when all images lie at the top).

    Raises UserError when images lie both at the top and in folders, or deeper than one folder.
    """
    paths = [tuple(name.split("/")) for name in names]
    if packed and len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    depths = [len(path) for path in paths]
    # The first name at each depth, whatever the order of the listing.
    example = dict(sorted(zip(depths, names, strict=True), reverse=True))
    if depths and max(depths) > 2:
        raise UserError(
            f"{source}: {example[max(depths)]} lies too deep; put the images of a class directly in its "
            "folder, or give one of the folders within"
        )
    if len(example) > 1:
        raise UserError(
            f"{source}: holds images both at the top ({example[1]}) and in folders ({example[2]}); a folder "
            "is a class, so move the images at the top into one, or all images to the top"
        )
    if not depths or depths[0] == 1:
        order = sorted(range(len(names)), key=lambda k: natural_key(names[k]))
        return order, np.zeros(len(names), dtype=np.int64), ()
    class_names = tuple(sorted({path[0] for path in paths}, key=natural_key))
    number = {name: k for k, name in enumerate(class_names)}
    order = sorted(range(len(names)), key=lambda k: (number[paths[k][0]], natural_key(paths[k][1])))
    return order, np.array([number[paths[k][0]] for k in order], dtype=np.int64), class_names


def number_labels(source: str, values: object) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Map integers or words, one per image, to 0…K−1 in sorted order; their names are what they were.

    Returns labels, int64 (n,), and K names. Raises UserError when the values are neither or not a list.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(values, dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "biuUS":
        raise UserError(
            f"{source}: labels must be one integer or word per image, not {array.dtype} of shape "
            f"{array.shape}; store the number of the class"
        )
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    found, labels = np.unique(array, return_inverse=True)
    names = [str(name) for name in found.tolist()]
    if array.dtype.kind == "U":  # numpy sorts "10" before "9"
        order = sorted(range(len(names)), key=lambda k: natural_key(names[k]))
        rank = np.empty(len(names), dtype=np.int64)
        rank[order] = np.arange(len(names))
        labels, names = rank[labels], [names[k] for k in order]
    return labels.astype(np.int64).reshape(-1), tuple(names)
