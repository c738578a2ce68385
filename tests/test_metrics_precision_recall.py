"""Precision, recall and memorisation on sets whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onefold.errors import UserError
from onefold.metrics import arrays
from onefold.metrics.memorisation import memorisation, nearest_distance
from onefold.metrics.precision_recall import neighbour_distance, precision_recall


def normal(seed: int, n: int = 400, d: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    def share(points: np.ndarray, region: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(region - r, axis=1))[k] for r in region]  # 0 is the point itself
        inside = [any(np.linalg.norm(p - r) <= s for r, s in zip(region, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(generated, real), share(real, generated)


def test_equal_to_the_definition():
    real, generated = normal(0, 40, 3), 1.5 * normal(1, 30, 3)
    expected = by_definition(real, generated, 3)
    assert expected[0] != expected[1]
    assert precision_recall(real, generated) == pytest.approx(expected)


@settings(max_examples=60)
@given(
    n=st.integers(6, 40), m=st.integers(6, 40), block=st.integers(1, 45), k=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_blocks_of_any_size_give_what_all_distances_at_once_give(n: int, m: int, block: int, k: int, seed: int):
    real, generated = normal(seed, n, 3), 1.5 * normal(seed + 1, m, 3)
    pixels = [
        np.random.default_rng(seed + j).integers(0, 256, (size, 5), dtype=np.uint8) for j, size in enumerate((n, m))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK", block)
        assert precision_recall(real, generated, k) == pytest.approx(by_definition(real, generated, k))
        x = torch.from_numpy(real)
        expected = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]
        assert neighbour_distance(x, k).numpy() == pytest.approx(expected.numpy())
        a, b = (rows.astype(float) for rows in pixels)
        between = np.linalg.norm(a[:, None] - b[None], axis=2).min(1)
        assert nearest_distance(*pixels).numpy() == pytest.approx(between)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, (12, 2), elements=st.integers(-3, 3)), st.integers(1, 4), st.floats(-1e3, 1e3))
def test_a_set_covers_itself_even_with_duplicates(x: np.ndarray, k: int, shift: float):
    assert precision_recall(x + shift, x[::-1] + shift, k) == (1, 1)


def test_far_sets_share_nothing():
    assert precision_recall(normal(0), normal(1) + 100) == (0, 0)


def test_dropped_mode_costs_recall_and_no_precision():
    real = np.concatenate([normal(0, 200, 2), normal(1, 200, 2) + 50])
    precision, recall = precision_recall(real, normal(2, 400, 2))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_added_rubbish_costs_precision_and_no_recall():
    precision, recall = precision_recall(normal(0, d=2), np.concatenate([normal(1, 300, 2), normal(2, 100, 2) + 50]))
    assert 0.7 < precision <= 0.75
    assert recall > 0.9


def test_a_collapsed_generator_has_no_recall():
    precision, recall = precision_recall(normal(0), np.repeat(normal(0)[:1], 100, axis=0))
    assert (precision, recall) == (1, 1 / 400)  # only the copied image itself is covered


def test_nearest_distance_of_copies_and_of_shifted_copies():
    x = normal(0, d=70) + 1e4
    assert nearest_distance(x[::-1], x).tolist() == [0.0] * 400
    shift = np.zeros(70)
    shift[3] = 1e-3
    np.testing.assert_allclose(nearest_distance(x[:7] + shift, x), 1e-3, rtol=1e-4)


def test_nearest_distance_takes_pixels():
    pixels = torch.tensor([[0, 0], [255, 0]], dtype=torch.uint8)
    assert nearest_distance(pixels, torch.tensor([[0, 3], [255, 4]], dtype=torch.uint8)).tolist() == [3, 4]


def test_fresh_samples_are_not_memorised():
    result = memorisation(normal(1, 2000), normal(0, 500), normal(2, 2000))
    assert result.share == pytest.approx(0.05, abs=0.02)
    assert result.ratio == pytest.approx(1, abs=0.05)


def test_fresh_samples_are_not_memorised_left_one_out():
    result = memorisation(normal(1, 2000), normal(0, 1000))
    assert result.share == pytest.approx(0.05, abs=0.03)
    assert result.ratio == pytest.approx(1, abs=0.05)


def test_copies_are_memorised():
    training = normal(0)
    samples = np.concatenate([training[:100] + 1e-3, normal(1, 300)])
    assert memorisation(samples, training, normal(2)).share == pytest.approx(0.25 + 0.75 * 0.05, abs=0.03)
    assert memorisation(training, training).share == 1
    assert memorisation(training, training).ratio == 0


def test_rubbish_is_not_memorised():
    result = memorisation(normal(1) * 10, normal(0))
    assert result.share < 0.01
    assert result.ratio > 3


def test_wrong_input_is_one_line():
    with pytest.raises(UserError, match="neighbours make no region"):
        precision_recall(normal(0), normal(1), k=0)
    with pytest.raises(UserError, match="at least 4"):
        precision_recall(normal(0, 3), normal(1))
    with pytest.raises(UserError, match="not between 0 and 1"):
        memorisation(normal(0), normal(1), quantile=1)
    with pytest.raises(UserError, match="remove duplicates"):
        memorisation(normal(0), normal(1), normal(1))
