"""The Gaussian example of docs/method.md: what is computed there by hand is what the code and the sampling give."""

import math

import pytest
import torch
from torch import Tensor

from onefold.metrics import effective_rank
from onefold.objectives.diagnosis import variance_term
from onefold.paths import Linear, noised, velocity

PI = math.pi
TIMES = (torch.arange(2000) + 0.5) / 2000
SQUARE = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]], [[-1.0, 1.0]], [[-1.0, -1.0]]])
"""Four tokens of two numbers whose covariance is 1."""


def slope(s: Tensor) -> Tensor:
    """The gradient by s of the variance term, over all times and summed over directions, of latents s · SQUARE."""
    s = s.clone().requires_grad_()
    term = len(s) * variance_term(SQUARE * s, TIMES, least_divisor=1e-9)
    return torch.autograd.grad(term, s)[0]


def test_every_direction_costs_its_deviation_and_pulls_alike():
    for s in ([1.0, 1.0], [1.4, 0.3]):
        term = 2 * variance_term(SQUARE * torch.tensor(s), TIMES, least_divisor=1e-9)
        assert term.item() == pytest.approx(PI / 2 * sum(s), rel=1e-3)
        assert slope(torch.tensor(s)).tolist() == pytest.approx([PI / 2, PI / 2], rel=1e-2)


def test_without_a_norm_latents_shrink_at_a_constant_speed_to_nothing():
    s, rate = torch.tensor([1.0, 0.8]), 0.01
    for step in range(1, 41):
        s = s - rate * slope(s)
        assert s.tolist() == pytest.approx([start - PI / 2 * rate * step for start in (1.0, 0.8)], rel=0.02)
    assert s.max() < 0.4, "the first is at 0 after 2/π, in the 64th step"


def test_with_a_norm_the_smaller_direction_dies():
    """On the circle s² = 2, tan(ψ/2) grows by e^(πτ/2), where ψ is the angle to equal directions."""
    s, rate = torch.tensor([1.1, math.sqrt(2 - 1.1**2)]), 0.01
    start = PI / 4 - math.atan2(s[1], s[0])
    ranks: list[float] = []
    for step in range(1, 121):
        s = s - rate * slope(s)
        s = s * math.sqrt(2) / s.norm()
        psi = 2 * math.atan(math.tan(start / 2) * math.exp(PI / 2 * rate * step))
        assert s.tolist() == pytest.approx([math.sqrt(2) * f(PI / 4 - psi) for f in (math.cos, math.sin)], abs=0.02)
        ranks.append(effective_rank((SQUARE * s).flatten(0, 1)))
    assert ranks[0] > 1.98
    assert ranks == sorted(ranks, reverse=True)
    assert 2 / PI * math.log(math.tan(PI / 8) / math.tan(start / 2)) == pytest.approx(1.31, abs=0.005)
    assert s[1] < 0.2, "it is at 0 after 1.31, in the 132nd step"
    assert PI / 2 * math.sqrt(2) == pytest.approx(2.22, abs=0.005), "the term of one direction, of equal ones π"


def predicted(s: float) -> tuple[float, float]:
    """Variances of the best ẑ and of the best v in a direction of deviation s, over all times."""
    share = s**2 / (1 + s**2) * (1 + (2 * math.log(s) + PI / 2 * (1 - s**2) / s) / (1 + s**2))
    return s**2 * share, s**2 + 1 - PI / 2 * s


def test_the_ranks_of_the_best_predictions():
    s = torch.tensor([1.0, 0.5], dtype=torch.float64)
    n = 200_000
    z, eps = torch.randn(n, 2, dtype=torch.float64) * s, torch.randn(n, 2, dtype=torch.float64)
    t = ((torch.arange(n) + 0.5) / n)[:, None].double()
    z_t = noised(Linear(), z, eps, t)
    z_hat = z_t * t * s**2 / (t**2 * s**2 + (1 - t) ** 2)
    v = velocity(Linear(), z_hat, z_t, t)
    for k in range(2):
        clean, moving = predicted(s[k].item())
        assert z_hat[:, k].var().item() == pytest.approx(clean, rel=0.02)
        assert v[:, k].var().item() == pytest.approx(moving, rel=0.02)
    assert [round(value, 3) for value in (*predicted(1.0), *predicted(0.5))] == [0.5, 0.429, 0.089, 0.465]
    ranks = [effective_rank(rows) for rows in (z, z_hat, z - eps, v)]
    assert ranks == pytest.approx([1.890, 1.837, 1.986, 2.000], abs=0.004)
