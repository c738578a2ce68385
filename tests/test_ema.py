"""Averages of weights: closed forms for a target that stands still or jumps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import randomised
from onefold.networks import NetworkConfig, OneFold
from onefold.training.ema import average_of, decay, update

TINY = NetworkConfig(width=16, depth=1, heads=1)
NO_RAMP = 1e9


def both() -> tuple[OneFold, OneFold]:
    """A network, and an average that is elsewhere."""
    return randomised(OneFold(TINY), 1), average_of(randomised(OneFold(TINY), 2))


def test_an_average_is_a_copy_that_takes_no_gradient():
    network = randomised(OneFold(TINY)).train()
    average = average_of(network)
    assert not average.training
    for (name, p), (other, q) in zip(average.named_parameters(), network.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        assert not p.requires_grad
        assert q.requires_grad


def test_constant_target_is_approached_geometrically():
    network, average = both()
    start = {name: p.clone() for name, p in average.named_parameters()}
    steps, survival = 7, decay(1000, NO_RAMP, 10_000, 100)
    for _ in range(steps):
        update(average, network, survival)
    for name, p in network.named_parameters():
        expected = p + survival**steps * (start[name] - p)
        torch.testing.assert_close(average.get_parameter(name), expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_sequence_is_weighted_by_its_age():
    network, average = both()
    networks = [randomised(OneFold(TINY), seed) for seed in range(3, 7)]
    survival, first = 0.8, average.latents_in.weight.clone()
    for network in networks:
        update(average, network, survival)
    expected = survival**4 * first
    for age, network in zip((3, 2, 1, 0), networks, strict=True):
        expected = expected + survival**age * (1 - survival) * network.latents_in.weight.detach()
    torch.testing.assert_close(average.latents_in.weight, expected)


def test_half_is_left_after_a_half_life():
    for batch in (1, 64, 1000, 4000):
        left = decay(4000, NO_RAMP, 10**6, batch) ** (4000 / batch)
        assert left == pytest.approx(0.5)


def test_the_ends_of_survival():
    network, average = both()
    before = average.latents_in.weight.clone()
    update(average, network, 1.0)
    assert torch.equal(average.latents_in.weight, before)
    update(average, network, 0.0)
    assert torch.equal(average.latents_in.weight, network.latents_in.weight)
    assert not any(p.requires_grad for p in average.parameters())


def test_the_ramp_shortens_the_half_life_of_a_young_average():
    assert decay(4000, 0.1, 10_000, 100) == pytest.approx(0.5 ** (100 / 1000))
    assert decay(4000, 0.1, 40_000, 100) == pytest.approx(0.5 ** (100 / 4000))
    assert decay(4000, 0.1, 80_000, 100) == decay(4000, 0.1, 10**7, 100)
    assert decay(4000, 0.1, 64, 64) == pytest.approx(0.5**10)  # the first step forgets the random start
    assert decay(4000, 0, 64, 64) == 0


@given(st.integers(1, 10**6), st.floats(0, 10), st.integers(1, 10**6), st.integers(1, 10**4))
def test_survival_is_a_share_that_grows_with_age(half_life: int, ramp: float, images: int, batch: int):
    assert 0 <= decay(half_life, ramp, images, batch) <= decay(half_life, ramp, 2 * images, batch) <= 1


def test_two_half_batches_are_one_batch_for_weights_that_stand_still():
    """Exactly, once the half-life stands still too; on the ramp it depends on how the images are cut into steps."""
    network, average = both()
    other = average_of(average)
    update(average, network, decay(1000, 0.1, 50_000, 200))
    for images in (49_900, 50_000):
        update(other, network, decay(1000, 0.1, images, 100))
    for p, q in zip(average.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
