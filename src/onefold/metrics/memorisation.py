"""Memorisation: are the samples copies of training images?

    δ(s)  = min over training rows r of |s − r|
    τ     = the q-quantile of δ over real rows that are not in the training set
    share = fraction of samples with δ(s) ≤ τ
    ratio = median δ over samples / median δ over those real rows

A generator that makes new images of the same kind has share ≈ q and ratio ≈ 1; one that copies has a share
far above q and a ratio towards 0; one far from the data has share 0 and a ratio above 1. Where there are no
held-out images, each training row against all others (leave one out) takes their place. All pairs are compared block
by block: beside the rows as they are given, memory does not grow with their number.

Shapes: rows (n, d), features or flattened pixels, float or integer. Reference: the nearest-neighbour test of
Meehan et al. 2020, arXiv:2004.05675, in its simplest form.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.arrays import FeatureArray, as_rows, pairwise_squares, row_pair
from onefold.metrics.precision_recall import neighbour_distance


class Memorisation(NamedTuple):
    """Share of samples within `threshold` of a training row, in [0, 1], and the ratio of medians, ≥ 0."""

    share: float
    ratio: float
    threshold: float


def nearest_distance(samples: FeatureArray, reference: FeatureArray) -> Tensor:
    """Distance of each sample (n, d) to its nearest reference row (m, d): (n,) float64, 0 for an exact copy.

    Raises `UserError` if a set is empty, the widths differ, or numbers are not finite.
    """
    x, y = row_pair(samples, reference)
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for rows, _, squares in pairwise_squares(x, y):
        nearest[rows] = torch.minimum(nearest[rows], squares.amin(1))
    return nearest.sqrt()


def memorisation(
    samples: FeatureArray, training: FeatureArray, held_out: FeatureArray | None = None, quantile: float = 0.05
) -> Memorisation:
    """Compare the samples' distances to the training set with those of real images that it does not hold.

    Rows are (n, d); without `held_out` the training rows are left out one by one. Raises `UserError` if
    `quantile` is outside (0, 1), the real rows all have copies in the training set (no scale is left), or as
    `nearest_distance`.
    """
    if not 0 < quantile < 1:
        raise UserError(f"quantile: {quantile} is not between 0 and 1; 0.05 is usual")
    sample_distances = nearest_distance(samples, training)
    if held_out is None:
        real_distances = neighbour_distance(as_rows(training, "training rows", at_least=2), 1)
    else:
        real_distances = nearest_distance(held_out, training)
    scale = real_distances.median().item()
    if scale == 0:
        raise UserError("training rows: half of the real images have exact copies; remove duplicates first")
    threshold = real_distances.quantile(quantile).item()
    share = (sample_distances <= threshold).double().mean().item()
    return Memorisation(share, sample_distances.median().item() / scale, threshold)
