"""The density ratio against closed forms: between Gaussians, noised or not, ratio and divergence are known exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.objectives.density_ratio import (
    DIVERGENCES,
    LARGEST,
    DensityRatio,
    Divergence,
    Levels,
    NoiseDraws,
    Ratio,
    draw_noise,
    ratio_gradient,
    ratio_loss,
    skewed,
)
from onefold.paths import TimeDistribution

ALPHA = 0.1
TAKEN = torch.tensor(False)
"""A step was not skipped."""


def skewed_f(r: Tensor, alpha: float = ALPHA) -> Tensor:
    m = alpha * r + 1 - alpha
    return (alpha * r * (r / m).log() - (1 - alpha) * m.log()) / (alpha * (1 - alpha))


F_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "jensen_shannon": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "non_saturating": lambda r: (1 + r) * (1 + 1 / r).log(),
    "forward_kl": lambda r: r * r.log(),
    "squared_hellinger": lambda r: (r.sqrt() - 1).square(),
    "skew_jensen_shannon": skewed_f,
}
"""f of D_f(p‖q) = E_q f(p/q), as the docstring has them."""

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
    return slope


@dataclass(frozen=True)
class Normal:
    """N(m, s²) in one dimension."""

    mean: float | Tensor
    std: float | Tensor

    def log_density(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """Of x_t = t x + (1−t) ε."""
        variance = (t * self.std) ** 2 + (1 - t) ** 2
        return -(x - t * self.mean).square() / (2 * variance) - (2 * math.pi * variance).log() / 2

    def clean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x | x_t]."""
        return self.mean + t * self.std**2 / ((t * self.std) ** 2 + (1 - t) ** 2) * (x_t - t * self.mean)

    def quantiles(self, n: int) -> Tensor:
        """n numbers that have its mean and standard deviation."""
        z = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)
        return self.mean + self.std * z / z.square().mean().sqrt()


REAL = Normal(0.5, 0.8)


def draws_of(shape: tuple[int, ...], generator: torch.Generator) -> NoiseDraws:
    return draw_noise(TimeDistribution(), 0.98, shape, generator)


def exact_ratio(p: Normal, q: Normal) -> Ratio:
    """ℓ of independent numbers: samples (B, …) of any shape."""

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        t = t.view(-1, *(1,) * (x_t.ndim - 1))
        return (p.log_density(x_t, t) - q.log_density(x_t, t)).flatten(1).sum(1)

    return ratio


# --- divergences ---


@every_divergence
def test_weight_is_the_second_derivative_of_f(name: str):
    logit = torch.linspace(-6, 6, 49, dtype=torch.float64)
    r = logit.exp()
    curvature = derivative(lambda at: derivative(F_OF[name], at), r)
    torch.testing.assert_close(DIVERGENCES[name].weight(logit), (curvature * r**2).detach(), rtol=1e-9, atol=1e-12)


@given(st.sampled_from(sorted(DIVERGENCES)), st.floats(-15, 50))
def test_generator_loss_falls_by_the_weight(name: str, logit: float):
    """Also where the exponential has been replaced by its tangent."""
    divergence, at = DIVERGENCES[name], double(logit)
    weight = divergence.weight(at)
    torch.testing.assert_close(derivative(divergence.generator_loss, at).detach(), -weight)
    assert 0 < weight.item() <= math.exp(LARGEST)


@given(st.sampled_from(sorted(DIVERGENCES)), st.floats(0, 50), st.floats(0.01, 5))
def test_generator_loss_is_continuous_and_falls(name: str, logit: float, step: float):
    here, there = DIVERGENCES[name].generator_loss(double(logit, logit + step)).tolist()
    slopes = DIVERGENCES[name].weight(double(logit, logit + step))
    assert here - there <= step * slopes.max().item() * (1 + 1e-6) + 1e-9
    assert here - there >= step * slopes.min().item() * (1 - 1e-6) - 1e-9


@given(st.floats(-5, 5), st.floats(0.01, 0.99))
def test_the_skewed_divergence_has_its_limits(logit: float, alpha: float):
    at = double(logit)
    r = at.exp()
    curvature = derivative(lambda r: derivative(lambda r: skewed_f(r, alpha), r), r).detach()
    torch.testing.assert_close(skewed(alpha).weight(at), curvature * r**2, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(skewed(0.5).weight(at), 2 * DIVERGENCES["jensen_shannon"].weight(at))
    torch.testing.assert_close(skewed(1e-9).weight(at), DIVERGENCES["forward_kl"].weight(at), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(skewed(1 - 1e-9).weight(at), DIVERGENCES["reverse_kl"].weight(at), rtol=1e-6, atol=1e-6)


@every_divergence
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.9, 0.7), (-0.7, 1.5), (0.5, 0.8)])
def test_gradient_of_the_divergence(name: str, mean: float, std: float):
    """∇_θ D_f(p‖q_θ), by integration, is −E_q[f″(r) r² ℓ′(x) ∂x/∂θ] for x = mean + std · ε."""
    x = torch.linspace(-11, 11, 20001, dtype=torch.float64)
    theta = double(mean, std).requires_grad_()
    q = Normal(theta[0], theta[1])
    r = (REAL.log_density(x, double(1.0)) - q.log_density(x, double(1.0))).exp()
    integrand = q.log_density(x, double(1.0)).exp() * F_OF[name](r)
    (exact,) = torch.autograd.grad(torch.trapezoid(integrand, x), theta)

    eps = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_density(eps, double(1.0)).exp()
    fixed, at = Normal(mean, std), mean + std * eps
    logit = REAL.log_density(at, double(1.0)) - fixed.log_density(at, double(1.0))
    slope = (at - mean) / std**2 - (at - REAL.mean) / REAL.std**2
    pull = -density * DIVERGENCES[name].weight(logit) * slope
    found = torch.stack([torch.trapezoid(pull, eps), torch.trapezoid(pull * eps, eps)])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)


# --- gradient of the generator ---


@every_divergence
@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_ratio_gradient_is_that_of_the_divergence_of_noised_laws(name: str, t: float):
    """In the generator's mean and scale, by quadrature over its noise and that of the level."""
    mean, std, level = -0.4, 1.1, double(t)
    theta = double(mean, std).requires_grad_()
    x = torch.linspace(-10, 10, 10001, dtype=torch.float64)
    q_t = Normal(theta[0], theta[1]).log_density(x, level)
    (exact,) = torch.autograd.grad(
        torch.trapezoid(q_t.exp() * F_OF[name]((REAL.log_density(x, level) - q_t).exp()), x), theta
    )

    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(60))
    own, eps = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    mass = torch.outer(weights, weights).flatten() / (2 * math.pi)
    fake = (mean + std * own)[:, None]
    draws = NoiseDraws(level.expand(len(own)), eps[:, None], torch.zeros_like(fake))
    ratio = exact_ratio(REAL, Normal(mean, std))
    pull = ratio_gradient(ratio, fake, None, draws, DensityRatio(divergence=name)).squeeze(1)
    found = torch.stack([(mass * pull).sum(), (mass * pull * own).sum()])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def tokens(seed: int = 0, batch: int = 40) -> tuple[Tensor, Tensor, Tensor, NoiseDraws]:
    """Data, samples, labels and draws of the shape of latents, (B, N, D)."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, batch, 3, 2, generator=generator)
    y = torch.randint(0, 4, (batch,), generator=generator)
    return 0.5 + 0.8 * real, fake, y, draws_of((batch, 3, 2), generator)


@every_divergence
@pytest.mark.parametrize("weighting", ["uniform", "noise"])
def test_ratio_gradient_is_that_of_the_generator_loss(name: str, weighting: str):
    _, fake, _, draws = tokens()
    draws = draws._replace(t=draws.t.clamp(min=0.01))  # below it, the weight is bounded
    ratio, options = exact_ratio(REAL, Normal(0.0, 1.0)), DensityRatio(divergence=name, weighting=weighting)
    at = fake.clone().requires_grad_()
    t = draws.t[:, None, None]
    losses = DIVERGENCES[name].generator_loss(ratio(t * at + (1 - t) * draws.eps, draws.t, None))
    level = {"uniform": torch.ones_like(draws.t), "noise": (1 - draws.t) ** 2 / draws.t}[weighting]
    (expected,) = torch.autograd.grad((level * losses).sum(), at)
    found = ratio_gradient(ratio, fake, None, draws, options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_noise_weighting_is_bounded_at_pure_noise():
    fake = torch.randn(4, 3)
    draws = NoiseDraws(torch.tensor([0.0, 1e-6, 1e-3, 1e-2]), torch.randn(4, 3), torch.zeros(4, 3))
    found = ratio_gradient(exact_ratio(REAL, Normal(0.0, 1.0)), fake, None, draws, DensityRatio(weighting="noise"))
    assert found.isfinite().all()
    assert (found[0] == 0).all()  # x_0 does not know x


def test_level_normalisation_divides_by_running_means():
    _, fake, _, draws = tokens(batch=6)
    draws = draws._replace(t=torch.tensor([0.05, 0.07, 0.31, 0.33, 0.34, 0.97]))
    ratio, levels = exact_ratio(REAL, Normal(0.0, 1.0)), Levels(bins=10, survival=0.9)
    plain = DensityRatio(divergence="forward_kl")
    normalised = DensityRatio(divergence="forward_kl", level_normalised=True)
    raw = ratio_gradient(ratio, fake, None, draws, plain)
    t = draws.t[:, None, None]
    weight = DIVERGENCES["forward_kl"].weight(ratio(t * fake + (1 - t) * draws.eps, draws.t, None))
    means = torch.ones(10)
    for _ in range(3):  # each step divides by the means that the one before it left
        found = ratio_gradient(ratio, fake, None, draws, normalised, levels)
        torch.testing.assert_close(found, raw / means[[0, 0, 3, 3, 3, 9], None, None])
        torch.testing.assert_close(levels.means, means)
        levels.move(TAKEN)
        for level, of in ((0, slice(0, 2)), (3, slice(2, 5)), (9, slice(5, 6))):
            means[level] = 0.9 * means[level] + 0.1 * weight[of].mean()
        torch.testing.assert_close(levels.means, means)


def test_levels_reach_the_mean_weight_and_take_the_end():
    levels = Levels(bins=4, survival=0.5)
    for _ in range(30):
        out = levels.normalised(torch.tensor([2.0, 4.0, 7.0]), torch.tensor([0.1, 0.2, 1.0]))
        levels.move(TAKEN)
    torch.testing.assert_close(levels.means, torch.tensor([3.0, 1.0, 1.0, 7.0]))
    torch.testing.assert_close(out, torch.tensor([2 / 3, 4 / 3, 1.0]))
    assert "means" in levels.state_dict()  # a continued training goes on with them


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_levels_move_once_per_step_whatever_its_parts(sizes: list[int], seed: int):
    """By the mean over the whole batch, also where parts are of different sizes or know other levels."""
    generator = torch.Generator().manual_seed(seed)
    weight, t = (torch.rand(sum(sizes), generator=generator) for _ in range(2))
    whole, cut = Levels(bins=3, survival=0.9), Levels(bins=3, survival=0.9)
    for _ in range(2):
        expected = whole.normalised(weight, t)
        found = [cut.normalised(*parts) for parts in zip(weight.split(sizes), t.split(sizes), strict=True)]
        torch.testing.assert_close(torch.cat(found), expected)
        for levels in (whole, cut):
            levels.move(TAKEN)
        torch.testing.assert_close(cut.means, whole.means)
    for level in range(3):
        inside = weight[(t * 3).long() == level]
        expected = 0.81 + 0.19 * inside.mean() if len(inside) else torch.ones(())
        torch.testing.assert_close(whole.means[level], expected)


@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_levels_forget_a_skipped_step(bad: float):
    levels, other = Levels(bins=4, survival=0.5), Levels(bins=4, survival=0.5)
    t = torch.tensor([0.1, 0.6])
    levels.normalised(torch.tensor([5.0, bad]), t)
    levels.move(~TAKEN)
    assert torch.equal(levels.means, torch.ones(4))
    for each in (levels, other):
        each.normalised(torch.tensor([2.0, 3.0]), t)
        each.move(TAKEN)
    assert torch.equal(levels.means, other.means)
    assert not torch.equal(levels.means, torch.ones(4))


class Network(nn.Module):
    """A small ratio network with labels."""

    def __init__(self, numbers: int = 6) -> None:
        super().__init__()
        self.first, self.label, self.last = nn.Linear(numbers + 1, 16), nn.Embedding(4, 16), nn.Linear(16, 1)
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls.append((x_t, t, y))
        h = self.first(torch.cat([x_t.flatten(1), t[:, None]], 1))
        return self.last(F.silu(h if y is None else h + self.label(y))).squeeze(1)


@pytest.mark.parametrize("where", ["inside no_grad", "outside"])
def test_ratio_gradient_leaves_the_ratio_alone(where: str):
    _, fake, y, draws = tokens()
    network, fake = Network(), fake.requires_grad_()
    with torch.set_grad_enabled(where == "outside"):
        found = ratio_gradient(network, fake, y, draws, DensityRatio())
    assert not found.requires_grad
    assert found.abs().sum() > 0
    assert fake.grad is None
    assert all(p.grad is None for p in network.parameters())


def test_ratio_gradient_reaches_the_generator_as_the_divergence_does():
    """The mean of Σ gradient · G(ε) has the gradient of the mean loss h(ℓ) in the generator's weights."""
    _, eps, y, draws = tokens()
    torch.manual_seed(1)
    generator, network, t = nn.Linear(2, 2), Network(), draws.t[:, None, None]
    fake = generator(eps)
    pull = ratio_gradient(network, fake, y, draws, DensityRatio())
    found = torch.autograd.grad((pull * fake).flatten(1).sum(1).mean(), list(generator.parameters()))
    loss = (
        DIVERGENCES["jensen_shannon"]
        .generator_loss(network(t * generator(eps) + (1 - t) * draws.eps, draws.t, y))
        .mean()
    )
    for one, other in zip(found, torch.autograd.grad(loss, list(generator.parameters())), strict=True):
        torch.testing.assert_close(one, other)


# --- loss of the ratio ---


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("every", [None, 1, 8])
def test_ratio_loss_is_that_of_separate_calls(labelled: bool, penalty: float, every: int | None):
    """The penalty is the mean over the samples in it: those that are named, or else an eighth, spread evenly."""
    real, fake, labels, draws = tokens()
    network, y, t = Network(), labels if labelled else None, draws.t[:, None, None]
    options = DensityRatio(penalty=penalty, penalty_step=0.1)
    penalised = None if every is None else torch.arange(0, 40, every)
    loss, parts = ratio_loss(network, real, fake, y, draws, options, penalised=penalised)
    assert len(network.calls) == 1  # packed

    at = {"real": t * real + (1 - t) * draws.eps, "fake": t * fake + (1 - t) * draws.eps}
    logit = {name: network(x_t, draws.t, y) for name, x_t in at.items()}
    ahead = {name: network(x_t + 0.1 * draws.direction, draws.t, y) for name, x_t in at.items()}
    ratio = F.binary_cross_entropy_with_logits(logit["real"], torch.ones(40))
    ratio = ratio + F.binary_cross_entropy_with_logits(logit["fake"], torch.zeros(40))
    slopes = sum(((ahead[name] - logit[name]) / 0.1)[:: every or 8].square().mean() for name in at)
    expected = ratio + penalty * slopes

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["ratio"], ratio.detach())
    assert set(parts) == {"ratio"} | ({"ratio_penalty"} if penalty else set())
    if penalty:
        torch.testing.assert_close(parts["ratio_penalty"], slopes.detach(), rtol=1e-4, atol=1e-6)
    weights = [p for name, p in network.named_parameters() if labelled or name != "label.weight"]
    for one, other in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_data_and_samples_differ_in_nothing_else():
    """Same levels, noise and labels, and the same directions of the finite differences."""
    real, fake, y, draws = tokens()
    network, options = Network(), DensityRatio()
    ratio_loss(network, real, fake, y, draws, options, penalised=torch.arange(40))
    ((points, t, labels),) = network.calls
    on_real, on_fake, real_ahead, fake_ahead = points.unflatten(0, (4, -1))
    torch.testing.assert_close(on_real - on_fake, draws.t[:, None, None] * (real - fake))
    torch.testing.assert_close(real_ahead - on_real, options.penalty_step * draws.direction)
    torch.testing.assert_close(fake_ahead - on_fake, options.penalty_step * draws.direction)
    assert labels is not None
    assert torch.equal(t, draws.t.repeat(4))
    assert torch.equal(labels, y.repeat(4))


def test_penalty_is_the_squared_slope():
    """For ℓ = a·x it is ‖a‖² for data and ‖a‖² for samples, at any size of the differences."""
    a = torch.tensor([1.0, -2.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 40_000, 3, generator=generator)
    all_of_them = torch.arange(40_000)
    for step in (0.05, 0.5):
        options = DensityRatio(penalty_step=step)
        draws = draws_of((40_000, 3), generator)
        _, parts = ratio_loss(lambda x_t, t, y: x_t @ a, real, fake, None, draws, options, penalised=all_of_them)
        assert parts["ratio_penalty"].item() == pytest.approx(2 * a.square().sum().item(), rel=0.03)


@pytest.mark.parametrize("t", [0.3, 0.8])
def test_the_loss_is_least_at_the_log_ratio(t: float):
    """A quadratic ratio fitted to quantiles of both Gaussians and of the noise finds that of the noised Gaussians."""
    n, fake_law = 400, Normal(-0.3, 1.2)
    eps = Normal(0.0, 1.0).quantiles(n).repeat(n)
    real, fake = (law.quantiles(n).repeat_interleave(n) for law in (REAL, fake_law))
    draws = NoiseDraws(torch.full((n * n,), t), eps[:, None].float(), torch.zeros(n * n, 1))
    coefficients = torch.zeros(3, requires_grad=True)

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return torch.cat([torch.ones_like(x_t), x_t, x_t**2], 1) @ coefficients

    options = DensityRatio(penalty=0)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss, _ = ratio_loss(ratio, real[:, None].float(), fake[:, None].float(), None, draws, options)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    x = torch.linspace(-2, 2, 41)[:, None]
    exact = exact_ratio(REAL, fake_law)(x, torch.full((41,), t))
    assert (ratio(x, draws.t[:41], None) - exact).abs().max() < 0.02


# --- draws and options ---


def test_draws_come_from_the_generator():
    time = TimeDistribution(shift=0.5)
    a, b, c = (draw_noise(time, 0.9, (256, 3, 2), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(a, c, strict=True))
    assert a.eps.shape == a.direction.shape == (256, 3, 2)
    assert not torch.equal(a.eps, a.direction)
    assert 0.85 < a.t.max() <= 0.9
    assert a.t.mean().item() == pytest.approx(0.9 * (2 * math.log(2) - 1), abs=0.005)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"divergence": "kl"}, "ratio.divergence: 'kl' is not one of reverse_kl, jensen_shannon"),
        ({"penalty_step": 0.0}, "ratio.penalty_step: 0.0 is not positive"),
        ({"penalty": -1.0}, "ratio.penalty: -1.0 is not 0 or more"),
        ({"alpha": 0.0}, "ratio.alpha: 0.0 is not between 0 and 1; 0.5, for instance, is Jensen–Shannon"),
        ({"alpha": 1.0}, "ratio.alpha: 1.0 is not between 0 and 1"),
        ({"penalty_share": 1.5}, "ratio.penalty_share: 1.5 is not between 0 and 1"),
        ({"t_max": 1.5}, "ratio.t_max: 1.5 is not between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, object], says: str):
    with pytest.raises(UserError, match=says):
        DensityRatio(**change)


def test_every_divergence_can_be_chosen():
    for name, divergence in DIVERGENCES.items():
        assert isinstance(divergence, Divergence)
        assert DensityRatio(divergence=name).divergence == name
