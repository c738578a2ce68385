"""Density ratios and one-step generators where the truth is a formula: Gaussians, and a ring of eight of them.

    python benchmarks/gaussians.py --json-file docs/results/gaussians.json

Three questions, each answered with the losses of `onefold.objectives.density_ratio` and small networks with random
initial weights:

1. Does a network find the log ratio of two noised Gaussians, and its gradient, at all noise levels? Without penalty and
   centring, which trade this for stability, and once with them.
2. Does an affine generator x = A ε + b find mean and covariance of a Gaussian, with each divergence?
3. Does a generator find all of eight modes?

In 1 and 2 the ratio network is quadratic in x with coefficients that are a network of t, which contains the truth; a
plain MLP of (x_t, t) is compared with it in 1 and used in 3.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import command
from onefold.objectives.density_ratio import DIVERGENCES, DensityRatio, draw_noise, ratio_loss
from onefold.paths import TimeDistribution
from onefold.studies.mixture import Mixture

BINS = 10
LEVELS = 7
RING = 8


def mlp(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def levels(t: Tensor) -> Tensor:
    """The networks' features of t: sines, cosines, and log(1−t), with which densities change near t = 1."""
    waves = t[:, None] * torch.arange(1, 4) * math.pi
    return torch.cat([waves.sin(), waves.cos(), (1 - t).log()[:, None] / 2], 1)


class Plain(nn.Module):
    """ℓ(x_t, t), any function; at t = 0 there is nothing to tell apart, so ℓ is forced to 0 there."""

    def __init__(self, d: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.net = mlp(d + LEVELS, width, depth, 1)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return t * self.net(torch.cat([x_t, levels(t)], 1)).squeeze(1)


class Quadratic(nn.Module):
    """ℓ(x_t, t) = t (c + b·x + x·Q x), where c, b and Q are functions of t: so is the ratio of any two Gaussians."""

    def __init__(self, d: int, width: int = 64) -> None:
        super().__init__()
        self.d, self.net = d, mlp(LEVELS, width, 2, 1 + d + d * d)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        c, b, q = self.net(levels(t)).split([1, self.d, self.d**2], 1)
        quadratic = torch.einsum("ni,nij,nj->n", x_t, q.unflatten(1, (self.d, self.d)), x_t) / self.d
        return t * (c.squeeze(1) + (b * x_t).sum(1) + quadratic)


class Generator(nn.Module):
    def __init__(self, d: int, latent: int = 4, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.net, self.latent = mlp(latent, width, depth, d), latent

    def forward(self, eps: Tensor) -> Tensor:
        return self.net(eps)


class Affine(nn.Linear):
    """x = A ε + b, initially x = ε."""

    def __init__(self, d: int) -> None:
        super().__init__(d, d)
        self.latent = d
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def gaussian(d: int, seed: int, *, offset: float) -> Mixture:
    """A Gaussian with standard deviations between ½ and 1½, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    mean = F.normalize(torch.randn(1, d, generator=generator), dim=1) * offset
    return Mixture(torch.ones(1), mean, (axes * torch.linspace(0.5, 1.5, d + 2)[1:-1])[None])


def ring(radius: float = 1.4, std: float = 0.1) -> Mixture:
    angle = torch.arange(RING) * 2 * math.pi / RING
    return Mixture.round(radius * torch.stack([angle.cos(), angle.sin()], 1), torch.full((RING,), std))


# --- 1: the ratio -----------------------------------------------------------------------------------------------------


def fit(ratio: nn.Module, p: Mixture, q: Mixture, options: DensityRatio, steps: int, batch: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(ratio.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        real, fake = p.draw(batch, generator)[0], q.draw(batch, generator)[0]
        draws = draw_noise(options.time, options.t_max, tuple(real.shape), generator)
        optimizer.zero_grad()
        ratio_loss(ratio, real, fake, None, draws, options)[0].backward()
        optimizer.step()
        schedule.step()


def accuracy(ratio: nn.Module, p: Mixture, q: Mixture, t_max: float, points: int = 4000) -> dict[str, list[float]]:
    """By noise level: R² of ℓ, and the cosine of all its gradients at once, on noised samples of p and q alike."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, list[float]] = {"r2": [], "cosine": []}
    for k in range(BINS):
        t = t_max * (k + torch.rand(points, generator=generator)) / BINS
        x = torch.cat([p.draw(points // 2, generator)[0], q.draw(points // 2, generator)[0]])
        x_t = t[:, None] * x + (1 - t)[:, None] * torch.randn(x.shape, generator=generator)
        logit = ratio(x_t.requires_grad_(), t)
        (slope,) = torch.autograd.grad(logit.sum(), x_t)
        x_t = x_t.detach()
        exact = p.log_density(x_t, t) - q.log_density(x_t, t)
        error = (logit.detach() - exact).square().mean() / exact.var(correction=0)
        found["r2"].append(1 - error.item())
        wanted = p.score(x_t, t) - q.score(x_t, t)
        found["cosine"].append(F.cosine_similarity(slope.flatten(), wanted.flatten(), dim=0).item())
    return found


# --- 2 and 3: generators ----------------------------------------------------------------------------------------------


def distil(
    generator: nn.Module,
    ratio: nn.Module,
    target: Mixture,
    options: DensityRatio,
    *,
    steps: int,
    batch: int,
    rates: tuple[float, float],
    warm_up: int = 200,
    survival: float = 0.995,
) -> nn.Module:
    """Update ratio and generator from one backward pass; returns the average of the generator's weights.

    Adam without momentum, which would let the two chase each other; both rates fall to 0 along a cosine.
    """
    draw = torch.Generator().manual_seed(3)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99))
        for network, rate in zip((generator, ratio), rates, strict=True)
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    average = torch.optim.swa_utils.AveragedModel(
        generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(survival)
    )
    for step in range(-warm_up, steps):
        fake = generator(torch.randn(batch, generator.latent, generator=draw))
        draws = draw_noise(options.time, options.t_max, tuple(fake.shape), draw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step < 0:
            fake = fake.detach()
        ratio_loss(ratio, target.draw(batch, draw)[0], fake, None, draws, options)[0].backward()
        nn.utils.clip_grad_norm_(ratio.parameters(), 1.0)
        optimizers[1].step()
        if step < 0:
            continue
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)  # one large weight e^ℓ would stall Adam for long
        optimizers[0].step()
        average.update_parameters(generator)
        for schedule in schedules:
            schedule.step()
    return average.module


def moments(affine: nn.Linear, target: Mixture) -> dict[str, float]:
    """Errors of the generator's mean and covariance, in units of the target's scale."""
    wanted = target.factors[0] @ target.factors[0].T
    weight, bias = affine.weight.detach(), affine.bias.detach()
    return {
        "mean": ((bias - target.means[0]).norm() / wanted.trace().sqrt()).item(),
        "covariance": ((weight @ weight.T - wanted).norm() / wanted.norm()).item(),
    }


def coverage(samples: Tensor, target: Mixture) -> dict[str, Any]:
    """Modes with at least a quarter of their due, and the fraction of samples within 3 standard deviations of one."""
    distance, nearest = torch.cdist(samples, target.means).min(1)
    near = distance < 3 * target.variances[0, 0].sqrt()
    shares = torch.bincount(nearest[near], minlength=RING) / len(samples)
    return {"modes": int((shares > 0.25 / RING).sum()), "near": near.float().mean().item(), "shares": shares.tolist()}


# --- tables -----------------------------------------------------------------------------------------------------------


def ratios(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """With more noise levels near noise: there ℓ grows as t, and its share of the loss as t²."""
    say("| ratio of Gaussians | network | least R² | least cosine of gradients | seconds |\n|---|---|---:|---:|---:|")
    plain = DensityRatio(time=TimeDistribution(shift=0.3), penalty=0)
    default = replace(plain, penalty=DensityRatio.penalty)
    cases = [(d, kind, plain) for d in (1, 2, 16) for kind in (Quadratic, Plain)] + [(2, Quadratic, default)]
    found = []
    for d, kind, options in cases:
        torch.manual_seed(0)
        p, q = gaussian(d, 0, offset=1.0), gaussian(d, 1, offset=0.5)
        ratio, start = kind(d), time.process_time()
        fit(ratio, p, q, options, steps=3000, batch=512, rate=1.5e-2 if kind is Quadratic else 5e-3)
        result = accuracy(ratio, p, q, options.t_max)
        seconds = time.process_time() - start
        name = kind.__name__.lower() + ("" if options == plain else ", default penalty")
        say(f"| {d}-D | {name} | {min(result['r2']):.3f} | {min(result['cosine']):.3f} | {seconds:.0f} |")
        found.append({"d": d, "network": name, **result})
    return found


def affine_generators(say: Callable[[str], None]) -> list[dict[str, Any]]:
    say("\n| affine generator | d | error of the mean | of the covariance | seconds |\n|---|---:|---:|---:|---:|")
    found = []
    for d, steps, batch, survival in ((1, 1500, 512, 0.995), (2, 1500, 512, 0.995), (16, 6000, 1024, 0.998)):
        target = gaussian(d, 0, offset=1.5)
        for name in DIVERGENCES:
            torch.manual_seed(0)
            start, options = time.process_time(), DensityRatio(divergence=name)
            sizes = {"steps": steps, "batch": batch, "survival": survival}
            affine = distil(Affine(d), Quadratic(d), target, options, rates=(3e-3, 1e-2), **sizes)
            result = moments(affine, target)
            seconds = time.process_time() - start
            say(f"| {name} | {d} | {result['mean']:.2%} | {result['covariance']:.2%} | {seconds:.0f} |")
            found.append({"divergence": name, "d": d, **result})
    return found


def ring_generator(say: Callable[[str], None]) -> dict[str, Any]:
    """More levels near data and a weaker penalty than by default, since the modes are much smaller than the ring."""
    torch.manual_seed(0)
    target, start = ring(), time.process_time()
    options = DensityRatio(time=TimeDistribution(shift=8.0), penalty=0.002)
    generator = distil(Generator(2), Plain(2), target, options, steps=4000, batch=256, rates=(2e-3, 1e-2))
    with torch.no_grad():
        result = coverage(generator(torch.randn(10_000, generator.latent)), target)
    say("\n| ring of 8, MLP, Jensen–Shannon | modes kept | within 3 σ of one | seconds |\n|---|---:|---:|---:|")
    say(f"| | {result['modes']} | {result['near']:.1%} | {time.process_time() - start:.0f} |")
    return result


def main(json_file: Path | None = None) -> None:
    """Print three tables; write all numbers as JSON."""
    torch.set_num_threads(1)

    def say(line: str) -> None:
        print(line, flush=True)

    found = {"ratios": ratios(say), "affine_generators": affine_generators(say), "ring": ring_generator(say)}
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
