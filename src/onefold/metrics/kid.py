"""Kernel distance (KID): squared maximum mean discrepancy with a cubic kernel, unbiased, with its error.

    k(x, y) = (x·y / d + 1)³
    MMD²(x, y) = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j)

Unlike the Fréchet distance its expectation does not depend on the number of images, so it may be slightly
negative where both sets come from one distribution, and it serves small sets. The value is the mean over
random subsets of m rows, drawn without replacement; its error is the delete-(n−m) jackknife: the spread s
over subsets, scaled to all n rows, and what is left of the draw of k subsets:

    error² = s² · (m / (n − m) + 1 / k)

so that it stands for the chance of the images and not only for that of the subsets. Where both sets come from
one distribution it errs on the large side.

Shapes: features (n, d). Reference: Bińkowski et al. 2018, arXiv:1801.01401; Shao & Wu 1989 for the jackknife.
"""

import torch
from torch import Tensor

from onefold.metrics.arrays import FeatureArray, matrix_pair


def kernel_distance(
    a: FeatureArray, b: FeatureArray, *, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID between features a (n_a, d) and b (n_b, d): (mean, standard error).

    `subset` rows of each set are drawn `subsets` times by random numbers of `seed`; a subset is never more
    than half of the smaller set, which the jackknife needs. Raises `UserError` for fewer than 4 rows,
    unequal widths, or numbers that are not finite.
    """
    x, y = matrix_pair(a, b, at_least=4)
    n = min(len(x), len(y))
    m = min(subset, n // 2)
    rng = torch.Generator().manual_seed(seed)
    # As plain numbers: small tensors that stay, between large ones that go, keep the memory of these from being reused.
    found = [mmd2(_draw(x, m, rng), _draw(y, m, rng)).item() for _ in range(subsets)]
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std() * (m / (n - m) + 1 / subsets) ** 0.5
    return values.mean().item(), error.item()


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² between rows x (m, d) and y (l, d), float64: a scalar."""
    return _pair_mean(x) + _pair_mean(y) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)  # in place: one matrix (m, l) and no more


def _pair_mean(x: Tensor) -> Tensor:
    k = _kernel(x, x)
    return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))


def _draw(x: Tensor, m: int, rng: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=rng)[:m]]
