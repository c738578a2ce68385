"""The study of bias: what it calls exact against numerical integration, and a whole study of seconds."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from onefold.errors import UserError
from onefold.objectives.density_ratio import DensityRatio, NoiseDraws
from onefold.studies import bias
from onefold.studies.bias import (
    BANDS,
    LATEST,
    EvaluationPoints,
    distributions,
    errors,
    ratio_pull,
    run_bias,
    score_pull,
)
from onefold.studies.ensemble import Ensemble, select, train
from onefold.studies.mixture import Mixture


def double(mixture: Mixture) -> Mixture:
    return Mixture(mixture.weights.double(), mixture.means.double(), mixture.factors.double())


def random_mixture(d: int = 3, count: int = 4, seed: int = 0) -> Mixture:
    rng = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=rng, dtype=torch.float64) + 0.2
    means = torch.randn(count, d, generator=rng, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, torch.randn(count, d, d, generator=rng, dtype=torch.float64))


# --- mixtures ---


def test_mixture_has_the_density_of_its_noised_components():
    mixture, x_t, t = random_mixture(), torch.randn(7, 3, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    for k in range(7):
        covariance = t[k] ** 2 * mixture.factors @ mixture.factors.mT + (1 - t[k]) ** 2 * torch.eye(3)
        parts = torch.distributions.MultivariateNormal(t[k] * mixture.means, covariance).log_prob(x_t[k])
        expected = (mixture.weights.log() + parts).logsumexp(0)
        assert mixture.log_density(x_t, t)[k].item() == pytest.approx(expected.item())


def test_score_and_clean_prediction_are_those_of_the_density():
    mixture, t = random_mixture(), torch.linspace(0, 0.95, 7, dtype=torch.float64)
    x_t = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x_t, t).sum(), x_t)
    x_t = x_t.detach()
    torch.testing.assert_close(mixture.score(x_t, t), score)
    tweedie = ((1 - t).square()[:, None] * score + x_t) / t[:, None]
    torch.testing.assert_close(mixture.posterior_mean(x_t, t)[1:], tweedie[1:])
    torch.testing.assert_close(
        mixture.posterior_mean(x_t, t)[0], mixture.weights @ mixture.means
    )  # nothing is known at t = 0


def test_samples_have_the_mixtures_moments_and_parts():
    mixture = random_mixture(d=2)
    x, k, eps = mixture.draw(50_000, torch.Generator().manual_seed(0))
    for j in range(5):
        torch.testing.assert_close(x[j], mixture.means[k[j]] + mixture.factors[k[j]] @ eps[j])
    mean = mixture.weights @ mixture.means
    second = (mixture.weights[:, None, None] * (mixture.factors @ mixture.factors.mT)).sum(0)
    second = second + torch.einsum("k,ki,kj->ij", mixture.weights, mixture.means, mixture.means)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0.02, atol=0.05)
    torch.testing.assert_close(torch.bincount(k) / len(k), mixture.weights, rtol=0, atol=0.01, check_dtype=False)


# --- the exact gradient ---


def test_exact_gradient_is_that_of_the_divergence_by_integration():
    """In one dimension: ∇_θ of the mean over t of ∫ q_t log(q_t / p_t), by autograd through the integral."""
    p = Mixture.round(torch.tensor([[-1.0], [0.8]], dtype=torch.float64), torch.tensor([0.5, 0.3]).double())
    means = torch.tensor([[-0.6], [1.1]], dtype=torch.float64).requires_grad_()
    stds = torch.tensor([0.4, 0.6], dtype=torch.float64).requires_grad_()
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    weights = {"uniform": lambda t: 1.0, "noise": lambda t: (1 - t) ** 2 / t}
    at = EvaluationPoints.draw(
        Mixture(p.weights.float(), p.means.float(), p.factors.float()),
        Mixture.round(means.detach().float(), stds.detach().float()),
        points=200_000,
    )
    for name, weight in weights.items():
        total = torch.zeros((), dtype=torch.float64)
        levels = LATEST * (torch.arange(40).double() + 0.5) / 40
        for t in levels.tolist():
            variance = t**2 * stds.square() + (1 - t) ** 2
            parts = -(x[:, None] - t * means.squeeze(1)).square() / (2 * variance) - (2 * math.pi * variance).log() / 2
            log_q = (parts - math.log(2)).logsumexp(1)
            log_p = p.log_density(x[:, None], torch.full_like(x, t))
            total = total + weight(t) * torch.trapezoid(log_q.exp() * (log_q - log_p), x) / len(levels)
        by_mean, by_std = torch.autograd.grad(total, (means, stds))
        expected = torch.stack([by_mean.squeeze(1), by_std], 1).flatten()  # θ in the order m_1, A_1, m_2, A_2
        found = at.gradient(at.exact[:, None], at.weights()[name]).squeeze(0)
        assert (found.double() - expected).norm() < 0.03 * expected.norm(), name


def test_exact_networks_have_no_error():
    p, q = distributions()
    at = EvaluationPoints.draw(p, q, points=2000)

    def ratio(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return p.log_density(x_t, t) - q.log_density(x_t, t)

    def clean(of: Mixture):
        return lambda x_t, t, y: of.posterior_mean(x_t.double(), t.double())

    pulls = (score_pull(clean(double(p)), clean(double(q)), at, 2), ratio_pull(ratio, at, 2))
    for pull in pulls:
        assert pull.shape == (2000, 2, 2)
        found = errors(pull, at)
        assert set(found) == {f"{name}.{kind}" for name in at.weights() for kind in ("bias", "variance", "cosine")}
        assert max(value for name, value in found.items() if not name.endswith("cosine")) < 2e-3
        assert min(value for name, value in found.items() if name.endswith("cosine")) > 0.99999


def test_errors_are_split_into_bias_and_variance():
    """Estimates that are exact but for a factor: their bias and variance are those of the factor."""
    p, q = distributions()
    at = EvaluationPoints.draw(p, q, points=500)
    factors = torch.tensor([1.2, 1.5, 0.9])
    found = errors(at.exact[:, None] * factors[:, None], at)
    for name in at.weights():
        assert found[f"{name}.bias"] == pytest.approx(0.2, rel=1e-3)
        assert found[f"{name}.variance"] == pytest.approx(factors.var().item(), rel=1e-3)
        assert found[f"{name}.cosine"] == pytest.approx(1, abs=1e-5)


def test_bands_and_weightings_are_of_all_points():
    at = EvaluationPoints.draw(*distributions(), points=700)
    weights = at.weights()
    bands = torch.stack([weights[f"band{k}"] for k in range(BANDS)])
    assert (bands.sum(0) == 1).all()
    assert (bands.sum(1) == 100).all()
    t = at.draws.t
    torch.testing.assert_close(weights["noise"][20:], ((1 - t) ** 2 / t)[20:])


# --- networks ---


def rngs(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def test_the_networks_of_an_ensemble_are_those_of_each_seed():
    ensemble, alone = Ensemble.random(2, 5, 3, rngs(4)), Ensemble.random(2, 5, 3, rngs(1, first=2))
    assert sum(p[0].numel() for p in (*ensemble.weights, *ensemble.biases)) == Ensemble.parameter_count(2, 5, 3)
    x_t, t = torch.randn(24, 2), torch.rand(24) * 0.9
    torch.testing.assert_close(ensemble(x_t, t)[2::4], alone(x_t[2::4], t[2::4]))
    torch.testing.assert_close(ensemble.members(slice(2, 4))(x_t[:4], t[:4])[::2], alone(x_t[:4:2], t[:4:2]))


def test_training_of_a_seed_does_not_depend_on_the_others():
    data = torch.randn(3, 50, 2)

    def trained(own: slice) -> Tensor:
        count = len(data[own])
        ensemble = Ensemble.random(2, 4, 2, rngs(count, own.start))

        def loss(indices: Tensor, draws: NoiseDraws) -> Tensor:
            return ensemble.denoising_loss(select(data[own], indices[0]), draws)

        train(ensemble, loss, 50, 8, 3, LATEST, rngs(count, 10 + own.start))
        return ensemble.weights[0][-1]

    torch.testing.assert_close(trained(slice(0, 3)), trained(slice(2, 3)), rtol=1e-3, atol=1e-5)


def test_denoising_loss_is_least_at_the_clean_prediction():
    """By its preconditioning, a network of zeros is the best denoiser of normal data."""
    ensemble = Ensemble.random(2, 4, 2, rngs(1))
    x, t, eps = torch.randn(40_000, 2), LATEST * torch.rand(40_000), torch.randn(40_000, 2)
    normal = Mixture.round(torch.zeros(1, 2), torch.ones(1))
    with torch.no_grad():
        for weight in (*ensemble.weights, *ensemble.biases):
            weight.zero_()
        x_t = t[:, None] * x + (1 - t[:, None]) * eps
        torch.testing.assert_close(ensemble.denoise(x_t, t), normal.posterior_mean(x_t, t))
        least = ensemble.denoising_loss(x, NoiseDraws(t, eps, eps))
        assert least.item() == pytest.approx(1, abs=0.02)  # all levels weigh the same
        ensemble.biases[-1].fill_(0.1)
        assert ensemble.denoising_loss(x, NoiseDraws(t, eps, eps)) > least + 0.005


def test_samples_are_selected_from_each_networks_own_data():
    data = torch.arange(2 * 5 * 1).view(2, 5, 1).float()
    assert select(data, torch.tensor([0, 0, 4, 1])).flatten().tolist() == [0, 5, 4, 6]


# --- the study ---

TINY: dict[str, Any] = {"seeds": 2, "steps": 4, "widths": (4,), "samples": (20, 30)}


@pytest.fixture(autouse=True)
def _few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "POINTS", 256)


def test_a_tiny_study_writes_all_its_files(tmp_path: Path):
    said: list[str] = []
    result = run_bias(tmp_path / "a" / "bias", **TINY, say=said.append)
    out = tmp_path / "a" / "bias"
    assert {path.name for path in out.iterdir()} == {"bias.json", "bias.csv", "bias.md", "bias.png"}
    assert json.loads((out / "bias.json").read_text()) == result
    assert [line.split(":")[0] for line in said] == ["1/3", "2/3", "3/3"]

    rows = result["rows"]
    settings = [(4, 30), (32, 20), (32, 30)]
    assert [(r["width"], r["samples"], r["arm"]) for r in rows] == [(*s, arm) for s in settings for arm in bias.ARMS]
    assert all(math.isfinite(value) for r in rows for key, value in r.items() if "." in key)
    for k in range(0, len(rows), 3):
        scores, ratio, penalised = (row["parameters"] for row in rows[k : k + 3])
        assert abs(ratio - scores) < 0.1 * scores
        assert penalised == ratio
    with (out / "bias.csv").open() as file:
        assert [float(row["noise.bias"]) for row in csv.DictReader(file)] == [row["noise.bias"] for row in rows]
    text = (out / "bias.md").read_text()
    assert text.count("\n| 32 |") == 6
    assert f"{rows[0]['uniform.bias']:.3f} ± {rows[0]['uniform.variance'] ** 0.5:.3f}" in text
    with Image.open(out / "bias.png") as image:
        assert image.width > 1000
    protocol = result["protocol"]
    assert (protocol["seeds"], protocol["steps"]) == (2, 4)
    assert protocol["data"]["std"] == [0.4, 0.4, 0.4]
    assert protocol["penalised"] == {name: getattr(DensityRatio(), name) for name in ("penalty", "penalty_step")}


def test_the_study_is_the_same_again_and_replaces_its_files(tmp_path: Path):
    few = {**TINY, "widths": (32,), "samples": (20,)}
    first = run_bias(tmp_path, **few)
    assert run_bias(tmp_path, **few) == first
    assert run_bias(tmp_path, **{**few, "steps": 5})["rows"] != first["rows"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": 1}, "--seeds: 1 leaves no variance to measure; give at least 2"),
        ({"steps": 0}, "--steps: 0 is not positive; give at least 1"),
        ({"widths": (4, -1)}, "--widths: -1 is not positive; give at least 1"),
        ({"samples": ()}, "--samples: none given; leave the option out for the default"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, change: dict[str, Any], says: str):
    with pytest.raises(UserError) as error:
        run_bias(tmp_path / "out", **{**TINY, **change})
    assert str(error.value) == says
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with pytest.raises(UserError, match=r"file: cannot be written \(a file is where a folder should be\)"):
        run_bias(tmp_path / "file", **TINY, say=said.append)
    assert said == []
