"""Kernel distance: equal to its definition, unbiased, with an error that covers."""

import numpy as np
import pytest
import torch

from onefold.errors import UserError
from onefold.metrics.kid import kernel_distance, mmd2


def normal(seed: int, n: int, d: int = 4, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, size=(n, d))


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    def k(u: np.ndarray, v: np.ndarray) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(u, v) for u in x for v in y) / (n * m)


def test_equal_to_the_definition():
    x, y = normal(0, 7), normal(1, 5, mean=0.5)
    assert mmd2(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(by_definition(x, y), rel=1e-12)


def test_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = torch.from_numpy(normal(0, 60)), torch.from_numpy(normal(1, 60, mean=0.5))
    assert mmd2(x, y).item() == pytest.approx(kid.poly_mmd(x, y).item(), rel=1e-10)


def test_unbiased_where_both_sets_come_from_one_distribution():
    values = [mmd2(torch.from_numpy(normal(2 * s, 10)), torch.from_numpy(normal(2 * s + 1, 10))) for s in range(400)]
    values = torch.stack(values)
    assert abs(values.mean()) < 3 * values.std() / 20  # the biased form would be near 1, the spread is near 0.3
    assert (values < 0).double().mean() > 0.3


def test_expectation_has_its_closed_form_for_any_subset():
    # For d = 1, MMD² = Σ_p C(3, p) (E xᵖ − E yᵖ)²; the moments of N(μ, 1) are μ, μ² + 1, μ³ + 3μ.
    mu = 0.5
    truth = 3 * mu**2 + 3 * (mu**2) ** 2 + (mu**3 + 3 * mu) ** 2
    x, y = normal(2, 20_000, d=1), normal(3, 20_000, d=1, mean=mu)
    for subset, subsets in [(50, 400), (2000, 10)]:
        value, error = kernel_distance(x, y, subset=subset, subsets=subsets)
        assert value == pytest.approx(truth, abs=3 * error)
        assert error < 0.2 * truth


def test_error_is_the_spread_over_new_images():
    pairs = [
        kernel_distance(normal(2 * s, 200), normal(2 * s + 1, 200, mean=0.5), subset=100, subsets=30)
        for s in range(200)
    ]
    values, errors = np.array(pairs).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.15)  # spread/√subsets: a fifth


def test_one_seed_one_number():
    x, y = normal(0, 50), normal(1, 80)
    assert kernel_distance(x, y, subset=20, subsets=5) == kernel_distance(x, y, subset=20, subsets=5)
    assert kernel_distance(x, y, subset=20, subsets=5) != kernel_distance(x, y, subset=20, subsets=5, seed=1)


def test_wrong_features_are_one_line():
    with pytest.raises(UserError, match="at least 4"):
        kernel_distance(normal(0, 3), normal(1, 9))
    with pytest.raises(UserError, match="widths 4 and 3"):
        kernel_distance(normal(0, 9), normal(1, 9, d=3))
