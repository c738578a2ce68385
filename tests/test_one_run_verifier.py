"""The density ratio of two denoisers (benchmarks/one_run_verifier.py): that of two Gaussians, where all is known."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import one_run_verifier
import onefold
import onestep_digits
from helpers_runs import newest, tiny
from one_run_verifier import TwoRoles
from onefold.evaluation import evaluate
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


def test_it_reads_the_student_of_a_run_and_chooses_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"network__jump_rank": 3, "onerun__begin": 48, "onerun__measured": 40}
    run = onefold.train(tiny(phases=("one_run",), **changes), tmp_path / "run", quiet=True)
    roles = one_run_verifier.roles_of(run, 2, 1)
    student = {name.split()[-1]: value for name, value in newest(run.folder).items() if " student." in name}
    x_t, t, y = torch.randn(3, 16, 4), torch.full((3,), 0.5), torch.tensor([1, 5, 10])
    jump = one_run_verifier.Jump(run.network.denoising_trunk, 3)
    jump.load_state_dict(student)
    with torch.no_grad():
        assert torch.equal(roles.own(x_t, t, y), run.network.generate_with(jump, x_t, t, y))
        assert not torch.equal(roles.own(x_t, t, y), run.network.generate(x_t, t, y))
        assert torch.equal(roles.data(x_t, t, y), run.network.denoise(x_t, t, y))

    def few(run: Any, **options: Any) -> Any:
        return evaluate(run, images=20, **options)

    monkeypatch.setattr(onestep_digits, "evaluate", few)
    monkeypatch.setattr(onestep_digits, "SEEDS", (0,))
    one_run_verifier.main((run.folder,), levels=2, json_file=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["1 step", "best of 4", "resampled from 4"]
    assert 0 < found["auc"][0] < 1
    samplers = [row["records"][0]["protocol"]["sampler"] for row in found["rows"].values()]
    assert samplers == [f"refine from t = 0.3{choice}" for choice in ("", ", best of 4", ", resampled from 4")]
