"""What benchmarks/gaussians.py claims, in seconds: ratios are learned at all levels, and generators follow them."""

import pytest
import torch
from torch import Tensor, nn

import gaussians
from onefold.objectives.density_ratio import DIVERGENCES, DensityRatio
from onefold.paths import TimeDistribution
from onefold.studies.mixture import Mixture

P, Q = Mixture.round(torch.tensor([[1.0]]), torch.tensor([0.6])), Mixture.round(torch.tensor([[0.3]]), torch.ones(1))


class Exact(nn.Module):
    """The true log ratio, times a factor, plus a constant."""

    def __init__(self, p: Mixture, q: Mixture, factor: float = 1.0, constant: float = 0.0) -> None:
        super().__init__()
        self.p, self.q, self.factor, self.constant = p, q, factor, constant

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.factor * (self.p.log_density(x_t, t) - self.q.log_density(x_t, t)) + self.constant


def test_accuracy_of_known_errors():
    right = gaussians.accuracy(Exact(P, Q), P, Q, t_max=0.98)
    assert min(right["r2"]) > 0.9999
    assert min(right["cosine"]) > 0.9999
    long = gaussians.accuracy(Exact(P, Q, factor=-1.0), P, Q, t_max=0.98)
    assert max(long["cosine"]) < -0.9999
    assert max(long["r2"]) < -2.9  # −ℓ for ℓ: 1 − E(2ℓ)² / Var ℓ
    moved = gaussians.accuracy(Exact(P, Q, constant=1.0), P, Q, t_max=0.98)
    assert moved["r2"] == sorted(moved["r2"])  # the farther from noise, the more ℓ varies


def test_errors_of_moments_and_modes():
    target = Mixture(torch.ones(1), torch.tensor([[3.0, 4.0]]), torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
    affine = gaussians.Affine(2)
    torch.testing.assert_close(affine(torch.eye(2)), torch.eye(2))
    found = gaussians.moments(affine, target)
    assert found["mean"] == pytest.approx(5 / 5**0.5)
    assert found["covariance"] == pytest.approx(3 / 17**0.5)
    ring = gaussians.ring(radius=2.0, std=0.1)
    some = torch.cat([ring.means[:5].repeat(10, 1), ring.means[5:6] + 0.31, torch.zeros(9, 2)])
    found = gaussians.coverage(some, ring)
    assert found["modes"] == 5
    assert found["near"] == pytest.approx(50 / 60)
    assert sum(found["shares"]) == pytest.approx(50 / 60)


def test_a_ratio_is_learned_at_all_levels():
    ratio, options = gaussians.Quadratic(1, 32), DensityRatio(time=TimeDistribution(shift=0.3), penalty=0)
    gaussians.fit(ratio, P, Q, options, steps=400, batch=256, rate=1.5e-2)
    found = gaussians.accuracy(ratio, P, Q, options.t_max)
    assert min(found["r2"]) > 0.95
    assert min(found["cosine"]) > 0.98


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_generator_finds_mean_and_variance(name: str):
    """From N(0, 1), a distance of 1.7 of the target's standard deviations."""
    affine, ratio, options = gaussians.Affine(1), gaussians.Quadratic(1, 32), DensityRatio(divergence=name)
    few = {"steps": 250, "batch": 256, "rates": (2e-2, 2e-2), "warm_up": 50, "survival": 0.97}
    found = gaussians.moments(gaussians.distil(affine, ratio, P, options, **few), P)
    assert found["mean"] < 0.08
    assert found["covariance"] < 0.15
