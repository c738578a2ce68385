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
from onefold.metrics.arrays import FeatureArray, matrix_pair, pairwise_distances


def precision_recall(real: FeatureArray, generated: FeatureArray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated features (m, d) against real features (n, d), each in [0, 1].

    Raises `UserError` if k < 1, a set has k rows or fewer, the widths differ, or numbers are not finite.
    """
    if k < 1:
        raise UserError(f"k: {k} neighbours make no region; give k = 1 or more (3 is usual)")
    x, y = matrix_pair(real, generated, at_least=k + 1)
    return _share_inside(y, x, k), _share_inside(x, y, k)


def _share_inside(points: Tensor, region: Tensor, k: int) -> float:
    radii = neighbour_distance(region, k)
    return torch.cat([(d <= radii).any(1) for _, d in pairwise_distances(points, region)]).double().mean().item()


def neighbour_distance(points: Tensor, k: int) -> Tensor:
    """Distance of each point (n, d) to its k-th nearest other point: (n,). Needs n > k."""
    radii: list[Tensor] = []
    for part, d in pairwise_distances(points, points):
        d[torch.arange(len(d)), torch.arange(part.start, part.stop)] = torch.inf  # not its own neighbour
        radii.append(d.kthvalue(k, dim=1).values)
    return torch.cat(radii)
