"""The numbers of health against closed forms, and that measuring them changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import randomised
from helpers_runs import differing, fresh, newest, tensors, tiny
from onefold.data import open_dataset
from onefold.networks.base import Network
from onefold.objectives.diagnosis import variance_term, velocity_of
from onefold.objectives.losses import Losses
from onefold.objectives.self_distillation import SelfDistillation, denoising_error, draw, self_distillation
from onefold.paths import Linear, noised, per_token
from onefold.training import health
from onefold.training.config import Config
from onefold.training.health import Probe, gradients, latent_statistics, measure, probe
from onefold.training.loop import train
from onefold.training.state import TrainingState

CPU = torch.device("cpu")


def gaussian(std: list[float], *, images: int = 500, tokens: int = 4, mean: float = 0.0) -> Tensor:
    """Latents (B, N, D) whose covariance over all tokens is exactly diag(std²)."""
    z = torch.randn(images * tokens, len(std), dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.mT @ z / len(z))).mT
    return (z * torch.tensor(std, dtype=torch.float64) + mean).view(images, tokens, -1).float()


# --- the variance term ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [[0.5], [1.0, 1.0], [2.0, 0.7, 0.01]])
def test_the_variance_term_of_a_gaussian(std: list[float]):
    """At one time by the formula, over all times (π/2)·s for each direction."""
    z = gaussian(std, mean=3.0)
    for t in (0.0, 0.3, 0.9):
        expected = sum(s**2 / (t**2 * s**2 + (1 - t) ** 2) for s in std) / len(std)
        assert variance_term(z, torch.tensor([t])).item() == pytest.approx(expected, rel=1e-4)
    t = (torch.arange(200_000) + 0.5) / 200_000
    whole = variance_term(z, t, least_divisor=1e-9).item()
    assert whole == pytest.approx(math.pi / 2 * sum(std) / len(std), rel=1e-2 if min(std) < 0.1 else 1e-3)


def test_the_variance_term_does_not_change_when_latents_are_turned():
    z = gaussian([1.0, 0.3, 0.1])
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    t = torch.rand(7)
    assert variance_term(z @ turn, t).item() == pytest.approx(variance_term(z, t).item(), rel=1e-5)


def test_the_variance_term_is_the_velocity_loss_of_the_best_linear_guess():
    z = gaussian([1.0, 0.4], images=20_000)
    for t in (0.2, 0.7, 0.97):
        at = torch.full((len(z),), t)
        z_t = noised(Linear(), z, torch.randn_like(z), per_token(at))
        guess = torch.linalg.lstsq(z_t.flatten(0, 1), z.flatten(0, 1)).solution
        error = velocity_of(z_t @ guess, z_t, at) - velocity_of(z, z_t, at)
        assert error.square().mean().item() == pytest.approx(variance_term(z, at[:1]).item(), rel=0.02)


def test_the_gradient_of_the_variance_term():
    """By s: 2 s (1−t)² / (t² s² + (1−t)²)²; shrinking the latents lowers the term."""
    scale = torch.tensor([1.0, 0.3], requires_grad=True)
    t = 0.6
    (slope,) = torch.autograd.grad(variance_term(gaussian([1.0, 1.0]) * scale, torch.tensor([t])), scale)
    expected = [s * 0.4**2 / (0.36 * s**2 + 0.4**2) ** 2 for s in (1.0, 0.3)]  # for D = 2
    assert slope.tolist() == pytest.approx(expected, rel=1e-4)


def test_collapsed_latents_have_no_variance_term():
    z = torch.full((8, 4, 3), 0.1, requires_grad=True)
    term = variance_term(z, torch.tensor([0.0, 0.5, 1.0]))
    assert term.item() == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(term, z)
    assert slope.abs().max() < 1e-6


def test_velocities():
    z, eps, z_hat = torch.randn(3, 64, 4, 3).unbind()
    t = torch.linspace(0, 1, 64)
    z_t = noised(Linear(), z, eps, per_token(t))
    torch.testing.assert_close(velocity_of(z, z_t, t)[:60], (z - eps)[:60], atol=1e-4, rtol=1e-4)
    error = (velocity_of(z_hat, z_t, t) - velocity_of(z, z_t, t)).square().mean()
    torch.testing.assert_close(error, denoising_error(z_hat, z_t, z, eps, t, SelfDistillation(loss="velocity")))


# --- the latents ------------------------------------------------------------------------------------------------------


def test_standard_deviations_and_means():
    z = torch.tensor([1.0, -1.0])[:, None, None] * torch.tensor([0.5, 2.0]) + torch.tensor([3.0, 4.0])
    values = latent_statistics(z.expand(2, 5, 2))
    assert values["channel_std"] == pytest.approx([0.5, 2.0])
    assert values["latent_std"] == pytest.approx(1.25)
    assert values["channel_mean"] == pytest.approx([3.0, 4.0])
    assert "drift" not in values


def test_a_code_of_positions_has_no_deviation():
    """All images have the same latents, though the tokens differ."""
    assert latent_statistics(torch.randn(1, 9, 4).expand(20, 9, 4))["latent_std"] == pytest.approx(0, abs=1e-7)


def test_drift_is_counted_in_deviations():
    z = gaussian([2.0, 2.0], tokens=1)
    before = latent_statistics(z)
    assert latent_statistics(z, before)["drift"] == pytest.approx(0, abs=1e-9)
    assert latent_statistics(z + 1.0, before)["drift"] == pytest.approx(0.5, rel=1e-5)
    assert "drift" not in latent_statistics(z, {"channel_mean": [None, 1.0]})


class Known(Network):
    """Latents are the pixels of patches, times 0.5; decoding is exact; the guess of the clean latent is always 1."""

    def encode(self, x: Tensor) -> Tensor:
        return 0.5 * self.patchify(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.unpatchify(2 * z)

    def denoise(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.ones_like(z_t)


def known(x: Tensor) -> dict[str, Any]:
    config = tiny(training__batch=50)
    draws = draw(config.objective, len(x), (16, 4), torch.Generator().manual_seed(0))
    draws = draws._replace(t=draws.t[:, :1], eps=draws.eps[:, :1])
    network = Known(config.network)
    return measure(network, network, Probe(x, torch.zeros(len(x), dtype=torch.int64), draws), config)


def test_what_is_measured_of_a_known_network():
    """Patches of four independent pixels: rank 4 of 4; then of two equal pairs of pixels: rank 2."""
    x = (torch.rand(400, 1, 8, 8) - 0.5) * 2
    values = known(x)
    assert values["latent_std"] == pytest.approx(0.5 / 3**0.5, rel=0.02)
    assert values["effective_rank"] == pytest.approx(4, rel=0.01)
    assert 55 < values["effective_rank_whole"] <= 64
    assert values["prediction_rank"] == values["prediction_rank_whole"] == 0, "its guess is always the same"
    assert values["velocity_target_rank"] == pytest.approx(4, rel=0.01)
    assert values["psnr"] == 100
    assert not any(name.startswith("gradient") for name in values), "there is no shared trunk"
    assert known(x.repeat_interleave(2, 3)[..., :8])["effective_rank"] == pytest.approx(2, rel=0.01)


def test_what_is_not_finite_is_null():
    x = torch.rand(20, 1, 8, 8)
    x[3, 0, 2, 2] = torch.inf
    values = known(x)
    for name in ("latent_std", "effective_rank", "effective_rank_whole", "psnr", "velocity_error", "variance_term"):
        assert values[name] is None, name
    assert values["channel_mean"].count(None) == 1
    assert values["prediction_rank"] == 0


# --- gradients at the trunk -------------------------------------------------------------------------------------------


def learned(**changes: Any) -> tuple[TrainingState, Probe, Config]:
    config = tiny(**changes)
    state = fresh(config)
    randomised(state.network)
    return state, probe(open_dataset("digits:test"), config, CPU).part(0, 8), config


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_cosine_of_losses_that_agree_and_of_those_that_do_not(monkeypatch: pytest.MonkeyPatch, sign: float):
    """Reconstruction is half the square of the trunk's parameters p, denoising ±3 times that: gradients p and ±3p."""
    state, fixed, config = learned(objective__denoising_weight=2.0)
    norm = torch.cat([p.flatten() for p in state.network.trunk.parameters()]).norm().item()

    def constructed(network, target, x, y, draws, objective) -> Losses:
        half = sum(p.square().sum() for p in network.trunk.parameters()) / 2
        total = objective.reconstruction_weight * half + objective.denoising_weight * sign * 3 * half
        return Losses(total, {})

    monkeypatch.setattr(health, "self_distillation", constructed)
    values = gradients(state.network, state.averages[0], fixed, config.objective)
    assert values["gradient_cosine"] == pytest.approx(sign, abs=1e-6)
    assert values["gradient_reconstruction"] == pytest.approx(norm, rel=1e-5)
    assert values["gradient_denoising"] == pytest.approx(6 * norm, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"objective__perceptual_weight": 0.3}])
def test_the_gradients_are_those_of_training(changes: dict[str, Any]):
    """|a + b|² = |a|² + |b|² + 2 |a| |b| cos, where a + b is the gradient of the whole loss."""
    state, (x, y, draws), config = learned(objective__denoising_weight=0.7, **changes)
    network, target = state.network, state.averages[0]
    values = gradients(network, target, Probe(x, y, draws), config.objective)
    assert ("gradient_perceptual" in values) == bool(changes)
    whole = self_distillation(
        network, target, x, y, draws, config.with_changes({"objective.perceptual_weight": 0.0}).objective
    )
    found = torch.autograd.grad(whole.total, list(network.trunk.parameters()))
    a, b, cosine = (values[f"gradient_{name}"] for name in ("reconstruction", "denoising", "cosine"))
    assert a > 0 < b
    assert torch.cat([g.flatten() for g in found]).norm().item() ** 2 == pytest.approx(
        a**2 + b**2 + 2 * a * b * cosine, rel=1e-4
    )


def test_the_variance_term_pulls_at_the_encoder():
    state, (x, y, draws), config = learned()
    value = gradients(state.network, state.averages[0], Probe(x, y, draws), config.objective)["gradient_variance"]
    term = variance_term(state.network.encode(x), draws.t.flatten())
    term.backward()
    found = torch.cat([p.grad.flatten() for p in state.network.trunk.parameters() if p.grad is not None])
    assert value == pytest.approx(found.norm().item(), rel=1e-5)
    assert value > 0


def test_a_loss_without_weight_has_no_gradient():
    state, fixed, config = learned(objective__denoising_weight=0.0)
    values = gradients(state.network, state.averages[0], fixed, config.objective)
    assert values.keys() == {"gradient_reconstruction", "gradient_variance"}


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_fixed_batch_is_the_same_for_every_run_and_spread_over_the_test_images():
    test = open_dataset("digits:test")
    one, two = (
        probe(test, tiny(), CPU),
        probe(test, tiny(training__seed=3, objective__draws=2, objective__flip=True), CPU),
    )
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.draws.eps, two.draws.eps)
    assert one.draws.t.shape == (128, 1)
    assert not two.draws.mirrored.any()
    assert set(one.y.tolist()) == set(range(10))
    assert torch.equal(one.x[-1], probe(test, tiny(), CPU).x[-1])


def test_measuring_changes_nothing():
    config = tiny(training__precision="bfloat16")
    state = fresh(config)
    randomised(state.network)
    for p in state.network.parameters():
        p.grad = torch.ones_like(p)
    before, random = tensors(state), torch.get_rng_state()
    fixed = probe(open_dataset("digits:test"), config, CPU)
    first = measure(state.network, state.averages[0], fixed, config)
    assert differing(before, tensors(state)) == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in state.network.parameters() if p.grad is not None)
    assert all(p.grad is None for p in state.averages[0].parameters())
    assert measure(state.network, state.averages[0], fixed, config) == first


def test_a_run_is_the_same_to_the_bit_however_often_it_is_measured(tmp_path: Path):
    seldom = train(tiny(training__checkpoint_every=160), tmp_path / "seldom", quiet=True)
    often = train(tiny(training__health_every=16, training__checkpoint_every=160), tmp_path / "often", quiet=True)
    assert differing(newest(seldom.folder), newest(often.folder)) == []
    assert [line["images"] for line in often.history] == list(range(16, 161, 16)), "measuring writes a line"
    assert all("health" in line for line in often.history)
    assert [("health" in line) for line in seldom.history] == [False] * 4 + [True]
    assert "drift" not in often.history[0]["health"]
    assert often.history[1]["health"]["drift"] > 0
    assert (tmp_path / "often" / "curves.png").stat().st_size > 10_000
    assert not (tmp_path / "seldom" / "curves.png").exists(), "one measurement makes no curve"


def test_three_networks_have_a_health_too(tmp_path: Path):
    config = tiny(network__architecture="three_networks", network__equal="compute", training__health_every=80)
    run = train(config, tmp_path / "run", quiet=True)
    values = run.history[-1]["health"]
    assert values["latent_std"] > 0
    assert not any(name.startswith("gradient") for name in values)
    assert (tmp_path / "run" / "curves.png").exists()
