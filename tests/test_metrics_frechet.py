"""Fréchet distance against closed forms, scipy and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.frechet import Moments, frechet_distance, frechet_from_moments


def with_moments(mean: Tensor, covariance: Tensor, n: int, seed: int = 0) -> Tensor:
    """Rows (n, d) whose sample mean and covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x -= x.mean(0)
    root = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(root, x.T, upper=False).T @ torch.linalg.cholesky(covariance).T + mean


def moments(mean: list[float], covariance: list[list[float]]) -> Moments:
    return Moments(torch.tensor(mean).double(), torch.tensor(covariance).double(), 100)


def rows(seed: int, n: int = 200, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.2, 3, d)


def test_one_dimension_is_the_difference_of_means_and_of_standard_deviations():
    x = with_moments(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double(), 50, seed=1)
    y = with_moments(torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double(), 70, seed=2)
    assert frechet_distance(x, y) == pytest.approx((1 + 2) ** 2 + (2 - 0.5) ** 2, rel=1e-10)


def test_two_dimensions_that_do_not_commute():
    # For 2×2 matrices tr √M = √(tr M + 2 √det M), with M = AB.
    a, b = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    trace_of_root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = 4 + a.trace() + b.trace() - 2 * trace_of_root
    x = with_moments(torch.zeros(2).double(), a, 40)
    y = with_moments(torch.tensor([0.0, 2.0]).double(), b, 60)
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


def test_commuting_covariances_differ_by_their_roots():
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).double()).Q
    s, t = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([5.0, 1, 3, 0.5, 2]).double()
    a = Moments(torch.zeros(5).double(), (q * s**2) @ q.T, 100)
    b = Moments(torch.zeros(5).double(), (q * t**2) @ q.T, 100)
    assert frechet_from_moments(a, b) == pytest.approx((s - t).square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("n", [200, 4])  # 4 rows in 6 dimensions: singular covariances
def test_translation_costs_its_square(n: int):
    x, shift = rows(0, n), np.array([1.0, -2, 0, 0.5, 3, 0])
    assert frechet_distance(x, x + shift) == pytest.approx(np.square(shift).sum(), rel=1e-6)


def test_singular_covariances_in_orthogonal_directions():
    a, b = (
        moments([0, 0, 0], [[4, 0, 0], [0, 0, 0], [0, 0, 0]]),
        moments([0, 0, 0], np.diag([0.0, 9, 0]).tolist()),
    )
    assert frechet_from_moments(a, b) == pytest.approx(4 + 9, rel=1e-12)


def test_singular_covariances_on_one_line():
    u = np.array([1.0, 2, 2]) / 3
    a, b = (
        moments([0, 0, 0], (25 * np.outer(u, u)).tolist()),
        moments([0, 0, 0], (4 * np.outer(u, u)).tolist()),
    )
    assert frechet_from_moments(a, b) == pytest.approx((5 - 2) ** 2, rel=1e-7)


@pytest.mark.parametrize("n", [300, 5])
def test_zero_on_itself(n: int):
    x = rows(0, n)
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-6 * np.trace(np.cov(x.T))


sets = hnp.arrays(np.float64, st.tuples(st.integers(2, 9), st.just(4)), elements=st.floats(-10, 10, width=32))


@settings(max_examples=60, deadline=None)
@given(sets, sets, st.floats(0.1, 10), st.integers(0, 99))
def test_symmetric_positive_and_free_of_the_frame(a: np.ndarray, b: np.ndarray, scale: float, seed: int):
    d = frechet_distance(a, b)
    room = 1e-6 * (np.abs(a).max() + np.abs(b).max() + 1e-9) ** 2
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    assert d >= 0
    assert frechet_distance(b, a) == pytest.approx(d, abs=room)
    assert frechet_distance(a @ q + 3, b @ q + 3) == pytest.approx(d, abs=room)
    assert frechet_distance(scale * a, scale * b) == pytest.approx(scale**2 * d, abs=scale**2 * room)


def test_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = rows(1, d=12), rows(2, 300, d=12) @ np.random.default_rng(3).normal(size=(12, 12))
    a, b = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(a @ b).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = torch.from_numpy(rows(1)), torch.from_numpy(rows(2) + 0.3)
    moments_x, moments_y = Moments.from_features(x), Moments.from_features(y)
    theirs = fid._compute_fid(moments_x.mean, moments_x.covariance, moments_y.mean, moments_y.covariance)
    assert frechet_distance(x, y) == pytest.approx(theirs.item(), rel=1e-8)


def test_moments_are_numpys_and_float32_input_is_summed_in_float64():
    x = (rows(0) + 1000).astype(np.float32)
    m = Moments.from_features(torch.from_numpy(x))
    assert m.n == 200
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(m.covariance, np.cov(x.astype(np.float64).T), rtol=1e-10)


def test_few_rows_are_flagged():
    assert Moments.from_features(rows(0, 11, 6)).too_few
    assert not Moments.from_features(rows(0, 12, 6)).too_few


def test_features_are_left_as_they_were():
    x = torch.from_numpy(rows(0))
    before = x.clone()
    frechet_distance(x, x + 1)
    assert torch.equal(x, before)


def test_moments_come_back_from_a_file_bit_by_bit(tmp_path):
    a = Moments.from_features(rows(0), extractor="c0ffee")
    a.save(tmp_path / "moments.safetensors")
    b = Moments.load(tmp_path / "moments.safetensors")
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.covariance, b.covariance)
    assert (a.n, a.extractor) == (b.n, b.extractor)


def test_moments_of_two_extractors_are_not_compared():
    a, b = Moments.from_features(rows(0), "one"), Moments.from_features(rows(0), "other")
    with pytest.raises(UserError, match="different feature extractors"):
        frechet_from_moments(a, b)


def test_wrong_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Moments.load(tmp_path / "none")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(UserError, match="holds no moments"):
        Moments.load(tmp_path / "text")


@pytest.mark.parametrize(
    ("a", "b", "cause"),
    [
        (np.zeros(3), rows(0), "is not"),
        (rows(0, 1), rows(0), "at least 2"),
        (rows(0), rows(0, d=5), "widths 6 and 5"),
        (rows(0), np.full((9, 6), np.nan), "NaN"),
    ],
)
def test_wrong_features_are_one_line(a: np.ndarray, b: np.ndarray, cause: str):
    with pytest.raises(UserError, match=cause) as error:
        frechet_distance(a, b)
    assert "\n" not in str(error.value)
