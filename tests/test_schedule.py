"""Rates and averages along a run, by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onefold.errors import UserError
from onefold.schedule import Schedule

# --- rates ---

PLAN = Schedule(images=10_000, warmup=1000, decay=0.4, final_rate=0.1)


@pytest.mark.parametrize(
    ("images", "factor"),
    [(0, 0.1), (100, 0.2), (900, 1), (1000, 1), (6000, 1), (7000, 0.775), (8000, 0.55), (10_000, 0.1), (11_000, 0.1)],
)
def test_rate_by_hand(images: int, factor: float):
    assert PLAN.rate_factor(images, 100) == pytest.approx(factor)


def test_cosine_decay_by_hand():
    plan = Schedule(images=10_000, warmup=0, decay=0.5, decay_shape="cosine")
    found = [plan.rate_factor(images, 100) for images in (0, 5000, 6250, 7500, 8750, 10_000)]
    assert found == pytest.approx([1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0], abs=1e-12)


def test_without_warmup_and_decay_the_rate_is_constant():
    plan = Schedule(images=1000, warmup=0, decay=0)
    assert {plan.rate_factor(images, 100) for images in range(0, 1001, 100)} == {1.0}


@given(st.integers(0, 10_000), st.sampled_from(["linear", "cosine"]), st.floats(0, 1), st.floats(0, 1))
def test_rates_lie_between_the_ends_and_fall_after_warmup(images: int, shape: str, decay: float, final: float):
    plan = Schedule(images=10_000, warmup=1000, decay=decay, decay_shape=shape, final_rate=final)
    assert 0 <= plan.rate_factor(images, 100) <= 1 + 1e-12
    if images >= 1000:
        assert final - 1e-12 <= plan.rate_factor(images + 50, 100) <= plan.rate_factor(images, 100) + 1e-12
    assert plan.rate_factor(images, 100) == plan.rate_factor(images, 100)


# --- averages ---

NO_RAMP, RAMP = Schedule(ema_ramp=1e9), Schedule(ema_ramp=0.1)


def test_half_is_left_after_a_half_life():
    for batch in (1, 64, 1000, 4000):
        left = NO_RAMP.survival(4000, 10**6, batch) ** (4000 / batch)
        assert left == pytest.approx(0.5)


def test_the_ramp_shortens_the_half_life_of_a_young_average():
    assert RAMP.survival(4000, 10_000, 100) == pytest.approx(0.5 ** (100 / 1000))
    assert RAMP.survival(4000, 40_000, 100) == pytest.approx(0.5 ** (100 / 4000))
    assert RAMP.survival(4000, 80_000, 100) == RAMP.survival(4000, 10**7, 100)
    assert RAMP.survival(4000, 64, 64) == pytest.approx(0.5**10)  # the first step forgets the random start
    assert Schedule(ema_ramp=0).survival(4000, 64, 64) == NO_RAMP.survival(4000, 64, 64)


@given(st.integers(1, 10**6), st.floats(0, 10), st.integers(1, 10**6), st.integers(1, 10**4))
def test_survival_is_a_share_that_grows_with_age(half_life: int, ramp: float, images: int, batch: int):
    young, old = (Schedule(ema_ramp=ramp).survival(half_life, seen, batch) for seen in (images, 2 * images))
    assert 0 <= young <= old <= 1


# --- what makes no sense ---


@pytest.mark.parametrize(
    "changes",
    [{"images": 0}, {"clip": 0.0}, {"warmup": -1}, {"ema_half_lives": ()}, {"betas": (0.9, 1.0)}, {"decay": 1.1}],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_one_line(changes: dict[str, object]):
    (name,) = changes
    with pytest.raises(UserError, match=rf"^training\.{name}: ") as caught:
        Schedule(**changes)
    assert "\n" not in str(caught.value)
