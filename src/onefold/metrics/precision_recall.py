"""Improved precision and recall: is what is made real, and is all that is real made?

Each set of features stands for a region: the union of balls around its points, each reaching to the point's
k-th nearest neighbour in the same set.

    precision = share of generated points inside the region of the real ones      (quality)
    recall    = share of real points inside the region of the generated ones      (variety)

Both lie in [0, 1] and both depend on the numbers of images: give the two sets the same size.

Shapes: features (n, d). Reference: Kynkäänniemi et al. 2019, arXiv:1904.06991.
"""

import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.arrays import FeatureArray, pairwise_squares, row_pair


def precision_recall(real: FeatureArray, generated: FeatureArray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated features (m, d) against real features (n, d), each in [0, 1].

    All pairs are compared, block by block: memory does not grow with n·m. Raises `UserError` if k < 1, a set has k rows
    or fewer, the widths differ, or numbers are not finite.
    """
    if k < 1:
        raise UserError(f"k: {k} neighbours make no region; give k = 1 or more (3 is usual)")
    x, y = row_pair(real, generated, at_least=k + 1)
    reach_x, reach_y = neighbour_distance(x, k), neighbour_distance(y, k)
    is_real, is_recalled = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(x), dtype=torch.bool)
    for rows, columns, squares in pairwise_squares(y, x):
        d = squares.sqrt_()
        is_real[rows] |= (d <= reach_x[columns]).any(1)
        is_recalled[columns] |= (d <= reach_y[rows, None]).any(0)
    return is_real.double().mean().item(), is_recalled.double().mean().item()


def neighbour_distance(points: Tensor, k: int) -> Tensor:
    """Distance of each point (n, d) to its k-th nearest other point: (n,) float64. Needs n > k."""
    nearest = torch.full((len(points), k), torch.inf, dtype=torch.float64)  # squares, of what was looked at so far
    for rows, columns, squares in pairwise_squares(points, points):
        if rows == columns:
            squares.fill_diagonal_(torch.inf)  # not its own neighbour
        found = squares.topk(min(k, squares.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], 1).topk(k, dim=1, largest=False).values
    return nearest.amax(1).sqrt()
