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

AT_ONCE = 2**23  # distances in memory at a time: 64 MiB


def as_matrix(values: FeatureArray, name: str = "features", at_least: int = 1) -> Tensor:
    """`values` (n, d) as a float64 CPU tensor; a copy that shares no memory and carries no gradient.

    Raises `UserError` if `values` is not two-dimensional, has fewer than `at_least` rows, or is not finite.
    """
    if isinstance(values, Tensor):
        x = values.detach().to("cpu", torch.float64, copy=True)
    else:
        try:
            x = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: not an array of numbers; give (n, d), one row of values per image") from error
    if x.ndim != 2:
        raise UserError(f"{name}: shape {tuple(x.shape)} is not (n, d); give one row of values per image")
    if len(x) < at_least:
        raise UserError(f"{name}: {len(x)} rows, but this metric needs at least {at_least}; give more images")
    if x.shape[1] == 0:
        raise UserError(f"{name}: rows without columns; give at least one value per image")
    if not bool(x.isfinite().all()):
        raise UserError(f"{name}: holds NaN or infinity; look for the image or step that made it")
    return x


def matrix_pair(a: FeatureArray, b: FeatureArray, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets as rows of the same width; raises `UserError` if the widths differ."""
    x, y = as_matrix(a, "first features", at_least), as_matrix(b, "second features", at_least)
    check_same_width(x.shape[1], y.shape[1])
    return x, y


def check_same_width(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features: widths {a} and {b} differ; take both from the same feature extractor")


def pairwise_distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances between rows, in chunks: yields (rows of a, (chunk, m) distances).

    By |x−y|² = |x|² + |y|² − 2 x·y, because a matrix product is far faster than differences. The product is
    exact to about 1e−16 of the norms, so a square below 1e−13 of them is rounding: it becomes an exact zero,
    and a copied row is at distance 0.
    """
    centre = b.mean(0)
    a, b = a - centre, b - centre  # small norms, small cancellation
    squares_b = b.square().sum(1)
    chunk = max(1, AT_ONCE // len(b))
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk]
        norms = part.square().sum(1)[:, None] + squares_b
        squares = torch.addmm(norms, part, b.T, alpha=-2.0)
        yield slice(start, start + len(part)), squares.where(squares > 1e-13 * norms, 0.0).sqrt()
