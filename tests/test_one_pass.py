"""Critic and generator from one backward pass: each has the gradient of its own loss; the penalty; calibration."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onefold.networks.ratio import Scale
from onefold.objectives.density_ratio import (
    DIVERGENCES,
    LARGEST,
    DensityRatio,
    Levels,
    NoiseDraws,
    draw_noise,
    ratio_gradient,
    ratio_loss,
    skewed,
)
from onefold.paths import TimeDistribution

B, SHAPE = 24, (3, 2)
NUMBERS = math.prod(SHAPE)

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


class Net(nn.Module):
    """A small ratio network with labels, of logits that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.label, self.last = nn.Linear(NUMBERS + 1, 16), nn.Embedding(4, 16), nn.Linear(16, 1)
        with torch.no_grad():
            self.last.weight.mul_(8)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        h = self.first(torch.cat([x_t.flatten(1), t[:, None]], 1))
        return self.last(F.silu(h if y is None else h + self.label(y))).squeeze(1)


def uneven() -> Scale:
    scale = Scale()
    with torch.no_grad():
        scale.logarithm.copy_(torch.linspace(-0.8, 0.9, len(scale.logarithm)))
    return scale


def batch(seed: int = 0, count: int = B) -> tuple[Tensor, Tensor, Tensor, NoiseDraws]:
    """Data, samples, labels and draws."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, count, *SHAPE, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    return 0.5 + 0.8 * real, fake, y, draw_noise(TimeDistribution(), 0.98, (count, *SHAPE), generator)


def weights(*modules: nn.Module | None) -> list[nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


def both(
    net: nn.Module, of: Any, options: DensityRatio, *, teaches: bool = True, **named: Any
) -> tuple[Tensor, list[Tensor]]:
    """(gradient at the samples, gradients of the network's and the scale's weights), from one backward pass."""
    real, fake, y, draws = of
    fake = fake.clone().requires_grad_(teaches)
    loss, _ = ratio_loss(net, real, fake, y, draws, options, **named)
    own = weights(net, named.get("scale"))
    loss.backward(inputs=[*own, *([fake] if teaches else [])])
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
    for p in own:
        p.grad = None
    return torch.zeros_like(fake) if fake.grad is None else fake.grad, found


# --- the generator's gradient -----------------------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("weighting", ["uniform", "noise"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_samples_receive_the_gradient_of_the_divergence(name: str, weighting: Any, calibrated: bool):
    """That of `ratio_gradient` with ℓ, of the mean over samples and values; those in the penalty exactly none."""
    net, scale, of = Net(), uneven() if calibrated else None, batch()
    options = DensityRatio(divergence=name, weighting=weighting)
    penalised = torch.tensor([0, 8, 16])
    found, _ = both(net, of, options, scale=scale, penalised=penalised, share=3 / B)

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return net(x_t, t, y) * (1 if scale is None else scale(t))

    expected = ratio_gradient(ratio, of[1], of[2], of[3], options) / (B * NUMBERS)
    taught = [k for k in range(B) if k not in (0, 8, 16)]
    assert (found[penalised] == 0).all()
    assert (expected[penalised].abs().sum((1, 2)) > 0).all()
    torch.testing.assert_close(found[taught], expected[taught], rtol=1e-4, atol=1e-8)


def test_levels_are_normalised_in_it_too():
    net, of, options = Net(), batch(), DensityRatio(divergence="forward_kl", level_normalised=True, penalty=0.0)
    levels, others = Levels(bins=4, survival=0.5), Levels(bins=4, survival=0.5)
    for _ in range(3):
        found, _ = both(net, of, options, levels=levels)
        expected = ratio_gradient(net, of[1], of[2], of[3], options, others) / (B * NUMBERS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
        for each in (levels, others):
            each.move(torch.tensor(False))
        torch.testing.assert_close(levels.means, others.means)
    assert (levels.means - 1).abs().max() > 0.05


def test_a_critic_s_update_alone_asks_no_levels():
    levels = Levels()
    both(Net(), batch(), DensityRatio(level_normalised=True), teaches=False, levels=levels)
    assert not levels.count.any()


@every_divergence
def test_of_a_linear_ratio_it_is_in_closed_form(name: str):
    """For ℓ = a·x_t: −w(ℓ) t a, of each sample."""
    _, fake, _, draws = of = batch()
    a = torch.linspace(-0.4, 0.6, NUMBERS)

    class Linear(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return x_t.flatten(1) @ a

    t = draws.t[:, None]
    logits = (t * fake.flatten(1) + (1 - t) * draws.eps.flatten(1)) @ a
    found, _ = both(Linear(), of, DensityRatio(divergence=name, penalty=0.0))
    expected = -DIVERGENCES[name].weight(logits)[:, None] * t * a / (B * NUMBERS)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_critic_s_own_gradient_does_not_know_of_it(penalty: float, calibrated: bool):
    """To the bit."""
    net, scale, of = Net(), uneven() if calibrated else None, batch()
    options, named = DensityRatio(penalty=penalty), {"penalised": torch.tensor([1, 9]), "share": 2 / B}
    teaching, alone = (both(net, of, options, teaches=teaches, scale=scale, **named)[1] for teaches in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(teaching, alone, strict=True))
    assert all(one.abs().max() > 0 for one in teaching)


def test_data_and_draws_receive_none():
    real, fake, y, draws = batch()
    inputs = [real, draws.eps, draws.direction]
    for each in (*inputs, fake):
        each.requires_grad_()
    net = Net()
    loss, parts = ratio_loss(net, real.detach(), fake, y, NoiseDraws(*(d.detach() for d in draws)), DensityRatio())
    loss.backward()
    assert all(each.grad is None for each in inputs)
    assert not any(part.requires_grad for part in parts.values())
    without = fake.detach()
    loss, _ = ratio_loss(net, real.detach(), without, y, NoiseDraws(*(d.detach() for d in draws)), DensityRatio())
    loss.backward()
    assert without.grad is None


@settings(max_examples=20)
@given(st.sets(st.integers(0, B - 1), min_size=1, max_size=B), st.sampled_from(sorted(DIVERGENCES)))
def test_each_sample_has_its_own(chosen: set[int], name: str):
    """Whichever others are with it: the mean alone knows how many they are."""
    torch.manual_seed(0)
    net, (real, fake, y, draws), index = Net(), batch(), torch.tensor(sorted(chosen))
    options = DensityRatio(divergence=name, penalty=0.0)
    whole, _ = both(net, (real, fake, y, draws), options)
    part, _ = both(net, (real[index], fake[index], y[index], NoiseDraws(*(d[index] for d in draws))), options)
    torch.testing.assert_close(len(index) * part, B * whole[index], rtol=1e-3, atol=1e-6)


@every_divergence
@pytest.mark.parametrize("logit", [-300.0, -LARGEST, 0.0, LARGEST, 300.0])
def test_it_is_finite_however_sure_the_critic_is(name: str, logit: float):
    """And that of the divergence up to where the classification loss has no more than e⁻¹⁰ of its slope."""
    slope = nn.Parameter(torch.ones(()))
    of = batch()

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return logit + self.slope * (x_t - x_t.detach()).flatten(1).sum(1)

    found, own = both(Sure(), of, DensityRatio(divergence=name, penalty=0.0))
    assert found.isfinite().all()
    assert own[0].isfinite()
    if logit >= -LARGEST:
        weight = DIVERGENCES[name].weight(torch.tensor(logit))
        expected = -(weight * of[3].t / (B * NUMBERS))[:, None, None].expand_as(found)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


# --- skewed -----------------------------------------------------------------------------------------------------------


@given(st.floats(-8, 8), st.floats(0.01, 0.99), st.sampled_from(sorted(DIVERGENCES)))
def test_alpha_is_that_of_the_skewed_divergence_and_of_no_other(logit: float, alpha: float, name: str):
    at, options = torch.tensor([logit]), DensityRatio(divergence=name, alpha=alpha)
    expected = skewed(alpha) if name == "skew_jensen_shannon" else DIVERGENCES[name]
    assert torch.equal(options.weight(at), expected.weight(at))


def test_the_default_alpha_is_that_of_the_divergence_by_name():
    at = torch.linspace(-5, 5, 11)
    found = DensityRatio(divergence="skew_jensen_shannon").weight(at)
    assert torch.equal(found, DIVERGENCES["skew_jensen_shannon"].weight(at))


def test_alpha_reaches_the_generator():
    net, of = Net(), batch()
    found, _ = both(net, of, DensityRatio(divergence="skew_jensen_shannon", alpha=0.5, penalty=0.0))
    js, _ = both(net, of, DensityRatio(divergence="jensen_shannon", penalty=0.0))
    torch.testing.assert_close(found, 2 * js)


# --- the penalty ------------------------------------------------------------------------------------------------------


def quantiles(n: int) -> Tensor:
    """n numbers like those of a standard Gaussian, with a mean square of 1."""
    z = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)
    return (z / z.square().mean().sqrt()).float()


def fitted(loss_of: Any) -> tuple[float, float]:
    """Slope and offset of the least loss."""
    at = torch.tensor([0.5, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([at], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(at)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return at[0].item(), at[1].item()


@pytest.mark.parametrize("penalty", [0.0, 0.1, 1.0])
def test_the_penalty_shrinks_a_slope_alike_however_many_values_there_are(penalty: float):
    """N(μe, I) against N(0, I), ‖e‖ = 1: ℓ = s e·x + b has the least loss of one dimension, with 2λs² added to it."""
    mean, n = 1.5, 512
    shuffled = quantiles(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def one_dimension(at: Tensor) -> Tensor:
        on_real, on_fake = at[0] * (quantiles(n) + mean) + at[1], at[0] * quantiles(n) + at[1]
        return (F.softplus(-on_real) + F.softplus(on_fake)).mean() + 2 * penalty * at[0].square()

    expected = fitted(one_dimension)
    assert expected[0] == pytest.approx(mean, rel=0.02) if not penalty else expected[0] < 0.75 * mean
    for values in (4, 512):
        e = torch.full((values,), values**-0.5)
        generator = torch.Generator().manual_seed(values)

        def along(z: Tensor, e: Tensor = e, generator: torch.Generator = generator) -> Tensor:
            """Vectors whose part along e is z, and random across it."""
            x = torch.randn(len(z), len(e), generator=generator)
            return x + (z - x @ e)[:, None] * e

        draws = NoiseDraws(torch.ones(n), torch.zeros(n, values), along(shuffled))
        real, fake = along(quantiles(n) + mean), along(quantiles(n))

        def loss_of(at: Tensor, e: Tensor = e, real: Tensor = real, fake: Tensor = fake, draws: Any = draws) -> Tensor:
            options = DensityRatio(penalty=penalty, penalty_step=0.05)
            every, ratio = torch.arange(n), lambda x, t, y: at[0] * (x @ e) + at[1]
            return ratio_loss(ratio, real, fake, None, draws, options, penalised=every)[0]

        assert fitted(loss_of) == pytest.approx(expected, rel=2e-3, abs=2e-3)


@given(st.sets(st.integers(0, 15), min_size=1), st.floats(0.2, 3))
def test_a_share_of_the_batch_in_the_penalty_is_its_mean_over_them(chosen: set[int], slope: float):
    """Σ (u·a)² of data and samples over those chosen, divided by how many they are."""
    real, fake, _, draws = batch(count=16)
    a, index = slope * torch.linspace(-1, 1, NUMBERS), torch.tensor(sorted(chosen))
    options, share = DensityRatio(penalty=0.7), len(chosen) / 16
    loss, parts = ratio_loss(
        lambda x_t, t, y: x_t.flatten(1) @ a, real, fake, None, draws, options, penalised=index, share=share
    )
    expected = 2 * (draws.direction[index].flatten(1) @ a).square().mean()
    torch.testing.assert_close(parts["ratio_penalty"], expected, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(loss, parts["ratio"] + 0.7 * parts["ratio_penalty"])


@pytest.mark.parametrize(("penalty", "penalised"), [(0.0, [0, 4]), (0.5, [])])
def test_without_a_penalty_all_samples_teach(penalty: float, penalised: list[int]):
    net, of, options = Net(), batch(), DensityRatio(penalty=penalty)
    index = torch.tensor(penalised, dtype=torch.int64)
    found, _ = both(net, of, options, penalised=index, share=len(penalised) / B)
    torch.testing.assert_close(found, both(net, of, DensityRatio(penalty=0.0))[0])
    assert (found.flatten(1).abs().sum(1) > 0).all()


# --- calibration ------------------------------------------------------------------------------------------------------


def test_a_scale_is_one_at_first_and_geometric_between_its_levels():
    scale = Scale(levels=6)
    assert torch.equal(scale(torch.linspace(0, 1, 13)), torch.ones(13))
    with torch.no_grad():
        scale.logarithm.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 0.5]).log())
    found = scale(torch.tensor([0.0, 0.2, 0.3, 0.6, 0.8, 0.9, 1.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 2 * 2**0.5, 8.0, 16.0, 8**0.5, 0.5]))


def exact(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """ℓ between N(½, I) and N(−½, I), noised, with 6 values."""
    t = t[:, None]
    return (t / (t.square() + (1 - t).square()) * x_t.flatten(1)).sum(1)


@pytest.mark.parametrize("factor", [0.1, 3.0])
@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_a_network_of_a_wrong_size_is_calibrated_at_each_level(factor: float, penalty: float):
    """The true ℓ, times a factor: the scale ends at its inverse, whatever the penalty."""
    levels, n = [0.3, 0.5, 0.7, 0.9], 20_000
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(levels).repeat_interleave(n)
    noise, direction = torch.randn(2, len(t), *SHAPE, generator=generator)
    draws = NoiseDraws(t, noise, direction)
    real, fake = torch.randn(2, len(t), *SHAPE, generator=generator) + torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)
    scale, options = Scale(), DensityRatio(penalty=penalty)
    optimizer = torch.optim.LBFGS(scale.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss, _ = ratio_loss(lambda x_t, t, y: factor * exact(x_t, t), real, fake, None, draws, options, scale=scale)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    found = scale(torch.tensor(levels)).detach()
    torch.testing.assert_close(found, torch.full((4,), 1 / factor), rtol=0.06, atol=0)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_calibration_leaves_the_network_alone(penalty: float):
    """To the bit: its loss and its penalty are about its own value."""
    net, of, scale, options = Net(), batch(), uneven(), DensityRatio(penalty=penalty)
    of_net = len(weights(net))
    _, without = both(net, of, options, teaches=False)
    _, found = both(net, of, options, teaches=False, scale=scale)
    assert all(torch.equal(one, other) for one, other in zip(found[:of_net], without, strict=True))
    (slope,) = found[of_net:]
    assert slope.abs().max() > 0


def test_the_scale_s_gradient_is_that_of_the_unpenalised_loss_alone():
    net, (real, fake, y, draws), scale = Net(), batch(), uneven()
    t = draws.t[:, None, None]
    on_real, on_fake = (scale(draws.t) * net(t * x + (1 - t) * draws.eps, draws.t, y).detach() for x in (real, fake))
    loss = (F.softplus(-on_real) + F.softplus(on_fake)).mean()
    (expected,) = torch.autograd.grad(loss, list(scale.parameters()))
    for penalty in (0.0, 5.0):
        _, found = both(net, (real, fake, y, draws), DensityRatio(penalty=penalty), scale=scale)
        torch.testing.assert_close(found[-1], expected)
        parts = ratio_loss(net, real, fake, y, draws, DensityRatio(penalty=penalty), scale=scale)[1]
        torch.testing.assert_close(parts["calibrated"], loss.detach())
