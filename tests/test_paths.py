"""Paths against Gaussians: for z ~ N(m, S) the posterior mean, the score and the flow are known exactly."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onefold.paths import (
    Linear,
    Path,
    TimeDistribution,
    VarianceExploding,
    VariancePreserving,
    clean_from_velocity,
    noise,
    noised,
    per_token,
    score,
    shift_time,
    velocity,
)

PATHS = [Linear(), VariancePreserving(), VarianceExploding(0.1, 20.0)]
TIMES = [0.0, 0.1, 0.5, 0.9, 0.99]
any_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def real(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


@dataclass
class Gaussian:
    """z ~ N(m, S) in `d` dimensions, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def drawn(cls, seed: int = 0, d: int = 4) -> "Gaussian":
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(d, d, dtype=torch.float64, generator=generator)
        mean = torch.randn(d, dtype=torch.float64, generator=generator)
        return cls(mean, a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64))

    def noised_covariance(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path.coefficients(t)
        return alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)

    def posterior_mean(self, path: Path, z_t: Tensor, t: Tensor) -> Tensor:
        """E[z | z_t] by conditioning a joint Gaussian."""
        alpha, _ = path.coefficients(t)
        gain = alpha * self.covariance @ torch.linalg.inv(self.noised_covariance(path, t))
        return self.mean + (z_t - alpha * self.mean) @ gain.T

    def log_density(self, path: Path, z_t: Tensor, t: Tensor) -> Tensor:
        alpha, _ = path.coefficients(t)
        return torch.distributions.MultivariateNormal(alpha * self.mean, self.noised_covariance(path, t)).log_prob(z_t)

    def flow(self, path: Path, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE carries z_s from time s to t: all C_t share their eigenvectors."""
        eigenvalues, frame = torch.linalg.eigh(self.covariance)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = path.coefficients(s), path.coefficients(t)
        ratio = (alpha_t**2 * eigenvalues + sigma_t**2) / (alpha_s**2 * eigenvalues + sigma_s**2)
        return alpha_t * self.mean + (z_s - alpha_s * self.mean) @ (frame * ratio.sqrt()) @ frame.T


@any_path
@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_the_log_density(path: Path, t: float):
    gaussian, z_t = Gaussian.drawn(), torch.randn(5, 4, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(gaussian.log_density(path, z_t, real(t)).sum(), z_t)
    z_hat = gaussian.posterior_mean(path, z_t.detach(), real(t))
    torch.testing.assert_close(score(path, z_hat, z_t.detach(), real(t)), expected, rtol=1e-8, atol=1e-8)


@any_path
@pytest.mark.parametrize("t", TIMES)
def test_velocity_is_the_derivative_of_the_exact_flow(path: Path, t: float):
    gaussian, z_t, h = Gaussian.drawn(1), torch.randn(5, 4, dtype=torch.float64), 1e-5
    ahead, behind = (gaussian.flow(path, z_t, real(t), real(t + step)) for step in (h, -h))
    z_hat = gaussian.posterior_mean(path, z_t, real(t))
    expected = (ahead - behind) / (2 * h)
    torch.testing.assert_close(velocity(path, z_hat, z_t, real(t)), expected, rtol=1e-6, atol=1e-6)


@any_path
@pytest.mark.parametrize("t", [0.01, *TIMES[1:]])
def test_derivatives_are_those_of_the_coefficients(path: Path, t: float):
    h = 1e-6
    ahead, behind = path.coefficients(real(t + h)), path.coefficients(real(t - h))
    for derivative, a, b in zip(path.derivatives(real(t)), ahead, behind, strict=True):
        assert derivative.item() == pytest.approx((a - b).item() / (2 * h), rel=1e-6, abs=1e-8)


@any_path
@settings(max_examples=50)
@given(t=st.floats(0, 0.999), z=st.floats(-5, 5), eps=st.floats(-5, 5))
def test_conversions_are_inverses(path: Path, t: float, z: float, eps: float):
    at, clean, e = real(t), real(z), real(eps)
    z_t = noised(path, clean, e, at)
    d_alpha, d_sigma = path.derivatives(at)
    v = velocity(path, clean, z_t, at)
    assert noise(path, clean, z_t, at).item() == pytest.approx(eps, abs=1e-8)
    assert v.item() == pytest.approx((d_alpha * clean + d_sigma * e).item(), abs=1e-7)
    assert clean_from_velocity(path, v, z_t, at).item() == pytest.approx(z, abs=1e-8)
    _, sigma = path.coefficients(at)
    assert (-sigma * score(path, clean, z_t, at)).item() == pytest.approx(eps, abs=1e-8)


@given(t=st.floats(0, 0.99), z_hat=st.floats(-5, 5), z_t=st.floats(-5, 5))
def test_linear_path_has_the_formulas_of_the_design(t: float, z_hat: float, z_t: float):
    values = Linear(), real(z_hat), real(z_t), real(t)
    assert velocity(*values).item() == pytest.approx((z_hat - z_t) / (1 - t), rel=1e-6, abs=1e-9)
    assert score(*values).item() == pytest.approx((t * z_hat - z_t) / (1 - t) ** 2, rel=1e-6, abs=1e-9)


def test_ends_of_the_paths():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for path in PATHS[:2]:
        alpha, sigma = path.coefficients(t)
        assert (alpha[0], sigma[0], alpha[-1]) == (0, 1, 1)
        assert sigma[-1].abs() < 1e-15
    alpha, sigma = VariancePreserving().coefficients(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    alpha, sigma = VarianceExploding(0.1, 20.0).coefficients(t)
    assert (alpha == 1).all()
    assert sigma[0].item() == pytest.approx(20)
    assert sigma[-1].item() == pytest.approx(0.1)
    torch.testing.assert_close(sigma[1:] / sigma[:-1], torch.full((10,), (0.1 / 20) ** 0.1, dtype=torch.float64))


def test_times_broadcast_over_tokens():
    z, eps, t = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.tensor([0.0, 0.25, 1.0])
    z_t = noised(Linear(), z, eps, per_token(t))
    assert torch.equal(z_t[0], eps[0])
    assert torch.equal(z_t[1], 0.25 * z[1] + 0.75 * eps[1])
    assert torch.equal(z_t[2], z[2])


# --- distributions of t ---


@given(st.floats(0.05, 20), st.floats(0, 0.999))
def test_shift_multiplies_the_odds(shift: float, t: float):
    bent = shift_time(real(t), shift)
    assert (bent / (1 - bent)).item() == pytest.approx(shift * t / (1 - t), rel=1e-6, abs=1e-12)
    assert shift_time(bent, 1 / shift).item() == pytest.approx(t, abs=1e-9)


def test_shift_keeps_the_ends_and_leaves_not_the_interval():
    t = torch.cat([torch.linspace(0, 1, 1001), 1 - torch.rand(1000) * 1e-6])
    for shift in (0.2, 0.3, 0.7, 3.0):
        assert shift_time(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]
        assert shift_time(t, shift).max() <= 1


def test_shift_below_one_moves_towards_noise():
    assert shift_time(torch.tensor(0.5), 0.5) < 0.5 < shift_time(torch.tensor(0.5), 2.0)


def cumulative(distribution: TimeDistribution, t: Tensor) -> Tensor:
    """P(time ≤ t)."""
    u = shift_time(t.double(), 1 / distribution.shift)
    if distribution.kind == "uniform":
        return u
    return torch.special.ndtr((torch.logit(u) - distribution.mean) / distribution.std)


DISTRIBUTIONS = [
    TimeDistribution(),
    TimeDistribution(shift=0.3),
    TimeDistribution("logit_normal", mean=-0.4, std=1.3),
    TimeDistribution("logit_normal", shift=0.5),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_times_are_stratified(distribution: TimeDistribution, n: int):
    """One time in each of n quantiles, which bounds the Kolmogorov distance by 1/n."""
    t = distribution.sample(n, torch.Generator().manual_seed(n))
    assert t.shape == (n,)
    assert t.dtype == torch.float32
    quantiles = cumulative(distribution, t).sort().values
    assert (quantiles - (torch.arange(n) + 0.5) / n).abs().max() <= 0.5 / n + 1e-5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_each_time_alone_has_the_whole_distribution(distribution: TimeDistribution):
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([distribution.sample(3, generator) for _ in range(2000)])
    for place in range(3):
        quantiles = cumulative(distribution, rows[:, place]).sort().values
        distance = (quantiles - (torch.arange(2000) + 0.5) / 2000).abs().max().item()
        assert distance < 1.63 / math.sqrt(2000)  # Kolmogorov-Smirnov at 1 %


def test_times_come_from_the_generator_alone():
    a, b, c = (TimeDistribution().sample(8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, a.sort().values)
