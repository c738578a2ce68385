import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onefold.data import indices

LENGTH = st.integers(1, 40)
SEED = st.integers(0, 2**64)


@given(LENGTH, SEED, st.integers(0, 200), st.lists(st.integers(0, 90), max_size=8))
def test_any_cut_into_batches_gives_the_same_sequence(length: int, seed: int, start: int, batches: list[int]):
    parts, place = [], start
    for batch in batches:
        parts.append(indices(length, seed, place, batch))
        assert parts[-1].shape == (batch,)
        assert parts[-1].dtype == np.int64
        place += batch
    whole = indices(length, seed, start, sum(batches))
    assert np.concatenate([*parts, np.empty(0, int)]).tolist() == whole.tolist()
    assert whole.tolist() == indices(length, seed, 0, place)[start:].tolist()


@given(LENGTH, SEED, st.integers(0, 1000))
def test_each_epoch_is_a_permutation(length: int, seed: int, epoch: int):
    assert sorted(indices(length, seed, epoch * length, length).tolist()) == list(range(length))


def test_epochs_and_seeds_differ():
    found = {tuple(indices(50, seed, epoch * 50, 50)) for seed in range(5) for epoch in range(5)}
    assert len(found) == 25


def test_every_image_comes_first_equally_often():
    first = np.bincount([indices(5, seed, 0, 1)[0] for seed in range(2000)], minlength=5)
    assert abs(first - 400).max() < 90  # 5 standard deviations


def test_the_order_never_changes():
    """Runs resume by it, so it must be the same in every version of onefold and numpy."""
    assert indices(7, 42, 3, 12).tolist() == [4, 1, 5, 0, 0, 4, 6, 1, 2, 3, 5, 5]


def test_the_result_may_be_written_into():
    first = indices(9, 0, 0, 9)
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(indices(9, 0, 0, 9), kept)


@pytest.mark.parametrize("numbers", [(0, 0, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1), (5, -1, 0, 1)])
def test_numbers_out_of_range(numbers: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match=r"no order|negative"):
        indices(*numbers)
