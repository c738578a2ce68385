"""Effective rank on latents whose rank is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onefold.errors import UserError
from onefold.metrics.rank import effective_rank, spectrum


def orthogonal(seed: int, n: int, k: int) -> np.ndarray:
    """k centred orthonormal columns of length n: exactly isotropic rows."""
    x = np.random.default_rng(seed).normal(size=(n, k))
    return np.linalg.qr(x - x.mean(0))[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.sampled_from([10, 40]), st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_isotropic_in_k_directions_is_k(k: int, n: int, seed: int, scale: float, shift: float):
    frame = np.linalg.qr(np.random.default_rng(seed).normal(size=(16, 16)))[0][:k]
    latents = scale * orthogonal(seed, n, k) @ frame + scale * shift
    assert effective_rank(latents) == pytest.approx(k, rel=1e-4)  # n = 10 < d = 16 takes the Gram matrix


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sampled_from([5, 30]))
def test_scale_shift_and_rotation_change_nothing(seed: int, n: int):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, 8)) * np.linspace(0.1, 2, 8)
    q = np.linalg.qr(g.normal(size=(8, 8)))[0]
    assert effective_rank(-3 * x @ q + 7) == pytest.approx(effective_rank(x), rel=1e-6)
    assert 1 <= effective_rank(x) <= min(n - 1, 8) + 1e-6


def test_two_unequal_directions_by_hand():
    x = orthogonal(0, 20, 2) * np.array([3.0, 1.0])
    assert effective_rank(x) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40)])
def test_spectrum_is_that_of_the_singular_values(n: int, d: int):
    x = np.random.default_rng(0).normal(size=(n, d)) + 5
    expected = np.linalg.svd(x - x.mean(0), compute_uv=False) / math.sqrt(n)
    np.testing.assert_allclose(spectrum(x), expected, atol=1e-7)


def test_spectrum_of_one_direction_is_its_standard_deviation():
    x = np.random.default_rng(0).normal(size=(50, 1)) * 4
    assert spectrum(x).tolist() == pytest.approx([x.std()])


def test_tokens_are_rows():
    z = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert effective_rank(z) == effective_rank(z.reshape(24, 5))
    assert effective_rank(z.flatten(1)) < 4  # four whole latents


def test_equal_rows_have_collapsed():
    assert effective_rank(torch.full((100, 8), 0.1)) == 0
    one = np.random.default_rng(0).normal(size=(1, 8))
    assert effective_rank(np.repeat(one, 999, axis=0)) == 0  # though their mean is off by a rounding


def test_wrong_latents_are_one_line():
    with pytest.raises(UserError, match="neither"):
        effective_rank(torch.zeros(3))
    with pytest.raises(UserError, match="at least 2"):
        effective_rank(torch.zeros(1, 3))
    with pytest.raises(UserError, match="latents: holds NaN"):
        effective_rank(torch.full((4, 3), torch.nan))
