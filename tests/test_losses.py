"""Losses of the parts of a batch add up to that of the batch, however it is cut."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import randomised
from onefold.networks import NetworkConfig, build
from onefold.objectives.losses import Losses, Span
from onefold.objectives.self_distillation import SelfDistillation, draw, self_distillation
from onefold.objectives.two_stages import TwoStages, autoencoder, diffusion
from onefold.training.ema import average_of

CPU = torch.device("cpu")
BATCH = 7
OBJECTIVE = SelfDistillation(
    draws=2,
    reconstruction_weight=0.7,
    denoising_weight=1.3,
    perceptual_weight=0.5,
    decoder_noise=0.5,
    label_dropout=0.3,
    flip=True,
)
NETWORK = NetworkConfig((4, 6), channels=2, classes=3, width=16, depth=3, heads=2)


@st.composite
def cuts(draw, batch: int) -> list[int]:
    """Where a batch is cut, with both ends."""
    return [0, *sorted(draw(st.sets(st.integers(1, batch - 1)))), batch] if batch > 1 else [0, 1]


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["self_distillation", "autoencoder", "diffusion"])
@settings(max_examples=10)
@given(where=cuts(BATCH))
def test_losses_of_parts_add_up(objective: str, where: list[int]):
    architecture = "one_network" if objective == "self_distillation" else "three_networks"
    network = randomised(build(dataclasses.replace(NETWORK, architecture=architecture)), 1)
    target = average_of(randomised(build(network.config), 2))
    rng = torch.Generator().manual_seed(0)
    x, y = torch.rand(BATCH, 2, 4, 6, generator=rng) * 2 - 1, torch.arange(BATCH) % 3
    draws = draw(OBJECTIVE, BATCH, (network.config.tokens, network.config.latent_channels), rng)

    def losses(start: int, stop: int) -> Losses:
        part, own_x, own_y = draws.part(start, stop), x[start:stop], y[start:stop]
        if objective == "self_distillation":
            return self_distillation(network, target, own_x, own_y, part, OBJECTIVE)
        if objective == "autoencoder":
            return autoencoder(network, target, own_x, part, OBJECTIVE, TwoStages())
        return diffusion(network, own_x, own_y, part, OBJECTIVE)

    whole, parts = losses(0, BATCH), [losses(*ends) for ends in pairwise(where)]
    torch.testing.assert_close(torch.stack([part.total for part in parts]).sum(), whole.total, rtol=1e-5, atol=1e-6)
    expected = {"self_distillation": {"reconstruction", "denoising", "perceptual"}, "diffusion": {"denoising"}}
    assert whole.parts.keys() == expected.get(objective, {"reconstruction", "perceptual"})
    for name, value in whole.parts.items():
        torch.testing.assert_close(torch.stack([part.parts[name] for part in parts]).sum(), value, rtol=1e-5, atol=1e-6)
    weighted = [OBJECTIVE.weights[name] * value for name, value in whole.parts.items()]
    torch.testing.assert_close(torch.stack(weighted).sum(), whole.total.detach())


def test_weights_and_the_share_of_the_batch_by_hand():
    terms = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(5.0)}
    losses = Losses.weighted(terms, {"a": 3.0, "b": 0.5, "c": 9.0}, Span(2, 5, 12))
    assert losses.total.item() == pytest.approx((3 * 2 + 0.5 * 5) / 4)
    assert {name: value.item() for name, value in losses.parts.items()} == pytest.approx({"a": 0.5, "b": 1.25})
    assert losses.total.requires_grad
    assert not any(value.requires_grad for value in losses.parts.values())


# --- spans ------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 60), st.floats(0, 1))
def test_images_spread_over_a_batch_are_the_same_however_it_is_cut(data: st.DataObject, batch: int, share: float):
    count = round(share * batch)
    whole = Span(0, batch, batch).spread(count, CPU).tolist()
    assert whole == [k * batch // count for k in range(count)]
    gaps = {b - a for a, b in pairwise([*whole, batch])} if whole else {0}
    assert max(gaps) - min(gaps) <= 1, "evenly"
    found = []
    for start, stop in pairwise(data.draw(cuts(batch))):
        places = Span(start, stop, batch).spread(count, CPU).tolist()
        assert all(0 <= place < stop - start for place in places)
        found += [start + place for place in places]
    assert found == whole


def test_a_part_of_a_part_knows_where_it_is():
    inner = Span(0, 20, 20).part(5, 15).part(2, 7)
    assert inner == Span(7, 12, 20)
    assert inner.share == 0.25
