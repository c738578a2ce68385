"""Averages of weights: closed forms for a target that stands still or jumps. How much survives: `test_schedule`."""

import torch

from conftest import randomised
from onefold.networks import NetworkConfig, OneFold
from onefold.schedule import Schedule
from onefold.training.ema import average_of, update

TINY = NetworkConfig(width=16, depth=1, heads=1)
NO_RAMP, RAMP = Schedule(ema_ramp=1e9), Schedule(ema_ramp=0.1)


def both() -> tuple[OneFold, OneFold]:
    """A network, and an average that is elsewhere."""
    return randomised(OneFold(TINY), 1), average_of(randomised(OneFold(TINY), 2))


def test_an_average_is_a_copy_that_takes_no_gradient():
    network = randomised(OneFold(TINY)).train()
    average = average_of(network)
    assert average.training, "it would check the values that it is given, and make the host wait"
    for (name, p), (other, q) in zip(average.named_parameters(), network.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        assert not p.requires_grad
        assert q.requires_grad


def test_constant_target_is_approached_geometrically():
    network, average = both()
    start = {name: p.clone() for name, p in average.named_parameters()}
    steps, survival = 7, NO_RAMP.survival(1000, 10_000, 100)
    for _ in range(steps):
        update(average, network, 1 - survival)
    for name, p in network.named_parameters():
        expected = p + survival**steps * (start[name] - p)
        torch.testing.assert_close(average.get_parameter(name), expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_sequence_is_weighted_by_its_age():
    network, average = both()
    networks = [randomised(OneFold(TINY), seed) for seed in range(3, 7)]
    survival, first = 0.8, average.latents_in.weight.clone()
    for network in networks:
        update(average, network, 1 - survival)
    expected = survival**4 * first
    for age, network in zip((3, 2, 1, 0), networks, strict=True):
        expected = expected + survival**age * (1 - survival) * network.latents_in.weight.detach()
    torch.testing.assert_close(average.latents_in.weight, expected)


def test_the_ends_of_renewal():
    network, average = both()
    before = average.latents_in.weight.clone()
    update(average, network, 0.0)
    assert torch.equal(average.latents_in.weight, before)
    update(average, network, 1.0)
    assert torch.equal(average.latents_in.weight, network.latents_in.weight)
    assert not any(p.requires_grad for p in average.parameters())


def test_two_half_batches_are_one_batch_for_weights_that_stand_still():
    """Exactly, once the half-life stands still too; on the ramp it depends on how the images are cut into steps."""
    network, average = both()
    other = average_of(average)
    update(average, network, 1 - RAMP.survival(1000, 50_000, 200))
    for images in (49_900, 50_000):
        update(other, network, 1 - RAMP.survival(1000, images, 100))
    for p, q in zip(average.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
