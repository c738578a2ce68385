"""The density ratio of two denoisers (benchmarks/one_run_verifier.py): that of two Gaussians, where all is known."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from one_run_verifier import TwoRoles
from onefold.paths import per_token

A, B = (1.0, 0.25), (0.5, 0.64)
"""Mean and variance of data and of samples."""
BOTH_SIDES = torch.tensor([-1.0, 1.0])[:, None, None]
"""Noise that gives the mean of any quadratic, as of any normal noise."""


def denoise(mean: float, variance: float, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """E[x | x_t] of a Gaussian."""
    t = per_token(t)
    return mean + t * variance / (t**2 * variance + (1 - t) ** 2) * (x_t - t * mean)


def log_density(x: Tensor, mean: float, variance: float, t: float) -> Tensor:
    """E[log p_t(x_t) | x], but for what all Gaussians share."""
    noised = t**2 * variance + (1 - t) ** 2
    return -0.5 * math.log(noised) - (t**2 * (x - mean) ** 2 + (1 - t) ** 2) / (2 * noised)


@pytest.mark.parametrize("latest", [0.5, 0.9])
def test_the_errors_of_two_denoisers_are_the_log_ratio_at_the_latest_level(latest: float):
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)
    roles = TwoRoles(partial(denoise, *A), partial(denoise, *B), BOTH_SIDES.double(), 400, latest)
    found = roles(x[:, None, None], torch.ones(7), None)
    expected = log_density(x, *A, latest) - log_density(x, *B, latest)
    assert expected.max() - expected.min() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_near_the_data_it_is_the_log_ratio_of_their_densities():
    x = torch.linspace(-0.5, 2, 6, dtype=torch.float64)
    roles = TwoRoles(partial(denoise, *A), partial(denoise, *B), BOTH_SIDES.double(), 800, 0.9995)
    p, q = (torch.distributions.Normal(mean, variance**0.5).log_prob(x) for mean, variance in (A, B))
    torch.testing.assert_close(roles(x[:, None, None], torch.ones(6), None), p - q, rtol=0, atol=2e-3)
