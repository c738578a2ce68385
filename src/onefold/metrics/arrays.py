"""Arrays of features as every metric wants them: (n, d), float64, on the CPU, finite.

Distances and determinants lose half their digits to cancellation, so all metrics compute in float64, whatever
the network computed in; and only the CPU has float64 everywhere.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onefold.errors import UserError

FeatureArray: TypeAlias = Tensor | NDArray[Any]

BLOCK = 512
"""Rows of each of two sets whose distances are in memory at a time: 2 MiB, which stay in a processor's cache."""


def as_rows(values: FeatureArray, name: str = "features", at_least: int = 1) -> Tensor:
    """`values` (n, d) as a CPU tensor of the type that they have, uint8 for example, without a copy where it can be.

    Raises `UserError` if `values` is not two-dimensional, has fewer than `at_least` rows, or is not finite.
    """
    if isinstance(values, Tensor):
        x = values.detach().cpu()
    else:
        try:
            array = np.asarray(values)
            plain = array.dtype.name in ("uint8", "float32", "float64") and array.flags.writeable
            x = torch.from_numpy(np.ascontiguousarray(array) if plain else np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: not an array of numbers; give (n, d), one row of values per image") from error
    if x.ndim != 2:
        raise UserError(f"{name}: shape {tuple(x.shape)} is not (n, d); give one row of values per image")
    if len(x) < at_least:
        raise UserError(f"{name}: {len(x)} rows, but this metric needs at least {at_least}; give more images")
    if x.shape[1] == 0:
        raise UserError(f"{name}: rows without columns; give at least one value per image")
    if not all(bool(part.isfinite().all()) for part in x.split(BLOCK)):
        raise UserError(f"{name}: holds NaN or infinity; look for the image or step that made it")
    return x


def as_matrix(values: FeatureArray, name: str = "features", at_least: int = 1) -> Tensor:
    """`values` (n, d) as a float64 CPU tensor; a copy that shares no memory and carries no gradient.

    Raises `UserError` as `as_rows`.
    """
    return as_rows(values, name, at_least).to(torch.float64, copy=True)


def matrix_pair(a: FeatureArray, b: FeatureArray, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets as rows of the same width; raises `UserError` if the widths differ."""
    x, y = as_matrix(a, "first features", at_least), as_matrix(b, "second features", at_least)
    check_same_width(x.shape[1], y.shape[1])
    return x, y


def check_same_width(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features: widths {a} and {b} differ; take both from the same feature extractor")


def row_pair(a: FeatureArray, b: FeatureArray, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets as `as_rows`; raises `UserError` if the widths differ."""
    x, y = as_rows(a, "first features", at_least), as_rows(b, "second features", at_least)
    check_same_width(x.shape[1], y.shape[1])
    return x, y


def pairwise_squares(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared Euclidean distances between rows, block by block: yields (rows of a, rows of b, their squares).

    Memory is that of a block, whatever the numbers of rows; rows become float64 as they are needed. By |x−y|² = |x|² +
    |y|² − 2 x·y, because a matrix product is far faster than differences. The product is exact to about 1e−16 of the
    norms, so a square below 1e−13 of them is rounding: it becomes an exact zero, and a copied row is at distance 0.
    """
    centre = torch.stack([part.double().sum(0) for part in b.split(BLOCK)]).sum(0) / len(b)
    for rows in _blocks(len(a)):
        x = a[rows].double() - centre  # small norms, small cancellation
        squares_x = x.square().sum(1)[:, None]
        for columns in _blocks(len(b)):
            y = b[columns].double() - centre
            norms = squares_x + y.square().sum(1)
            squares = torch.addmm(norms, x, y.T, alpha=-2.0)
            yield rows, columns, squares.where(squares > 1e-13 * norms, 0.0)


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
