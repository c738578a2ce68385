"""Sampling: from seeds to clean latents, with any function (z_t, t, y) → ẑ.

This file knows no network. A solver integrates the probability-flow ODE dz/dt = v(z, t) from t = 0 (noise) to t = 1
(data) over a grid of times; on the linear path its last Euler step lands on ẑ itself, and one Euler step is ẑ(ε, 0):
one-step generation is `steps=1`.

Image k owns the seed `seed + k`, and its noise is drawn from that seed alone on the CPU. It is the same image for any
batch size, order or device, up to the rounding of the network's arithmetic.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold import settings
from onefold.errors import UserError
from onefold.paths import Linear, Path, noised, per_token, shift_time, velocity

__all__ = [
    "Denoiser",
    "Sampler",
    "check_guidance",
    "generate",
    "generator_of",
    "guided",
    "noises",
    "resolve_labels",
    "solve",
    "time_grid",
]

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(z_t (B, N, D), t (B,), y (B,) or None) → ẑ (B, N, D)."""


@dataclass(frozen=True)
class Sampler:
    """How to get from noise to latents."""

    steps: int = 50
    """Intervals of the time grid. Euler evaluates the network once in each, Heun twice (but once in the last)."""
    solver: Literal["euler", "heun", "renoise"] = "euler"
    """Of the probability-flow ODE; or, for one-step generators, ẑ noised anew to the next time (Song et al., 2023)."""
    guidance: float = 1.0
    """w of ẑ = ẑ(no class) + w·(ẑ(y) − ẑ(no class)) (Ho & Salimans, 2022); 1 is unguided and costs half."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times within which guidance acts (Kynkäänniemi et al., 2024)."""
    shift: float = 1.0
    """Below 1, more of the grid lies near noise; above 1, near data."""

    def __post_init__(self) -> None:
        settings.check("sampler", self)
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is not positive; give 1 for one-step sampling or more")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance: {self.guidance} is not a number; 1 is unguided")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift: {self.shift} is not positive; 1 leaves the time grid uniform")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval: ({low}, {high}) is not within 0 ≤ low ≤ high ≤ 1")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one image, without decoding; two at each time within a guidance's interval."""
        grid, (low, high) = time_grid(self).tolist(), self.guidance_interval
        times = grid[:-1] + (grid[1:-1] if self.solver == "heun" else [])
        return len(times) + sum(self.guidance != 1 and low <= t <= high for t in times)

    def changed(self, **wanted: Any) -> "Sampler":
        """A copy with the options that are not None."""
        return replace(self, **{name: value for name, value in wanted.items() if value is not None})


def time_grid(sampler: Sampler) -> Float[Tensor, " steps_plus_one"]:
    """Times from 0 to 1, float32 on the CPU."""
    return shift_time(torch.linspace(0, 1, sampler.steps + 1, dtype=torch.float64), sampler.shift).float()


def generator_of(seed: int) -> torch.Generator:
    """Random numbers of a seed ≥ 0. torch's generator reads 32 bits of it; larger seeds are hashed into them."""
    if seed >= 2**32:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def noises(seeds: Sequence[int], shape: tuple[int, ...]) -> Iterator[Float[Tensor, "B ..."]]:
    """Standard normal noise (len(seeds), *shape) on the CPU, again and again, each row from its own seed."""
    generators = [generator_of(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def check_guidance(guidance: float, classes: int) -> None:
    """Refuse guidance where there is nothing to guide by.

    Raises:
        UserError: guidance other than 1 of a denoiser without classes.
    """
    if guidance != 1 and not classes:
        raise UserError(f"guidance: {guidance:g} needs classes, and this network knows none; leave it at 1")


def guided(denoise: Denoiser, guidance: float, null_label: int) -> Denoiser:
    """Classifier-free guidance around a denoiser; where guidance is 1, the denoiser itself.

    Both predictions come from one call on a doubled batch.

    Raises:
        UserError: no labels to guide by, when it is called.
    """
    if guidance == 1:
        return denoise

    def guided_denoise(z_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            raise UserError(f"guidance: {guidance:g} needs labels; give them, or leave it at 1")
        pair = torch.cat([y, torch.full_like(y, null_label)])
        with_class, without = denoise(z_t.repeat(2, 1, 1), t.repeat(2), pair).chunk(2)
        return without + guidance * (with_class - without)

    return guided_denoise


def solve(
    denoise: Denoiser,
    eps: Float[Tensor, "B N D"],
    y: Int64[Tensor, " B"] | None,
    sampler: Sampler,
    path: Path | None = None,
    *,
    guide: Denoiser | None = None,
    fresh: Iterator[Float[Tensor, "B N D"]] | None = None,
) -> Float[Tensor, "B N D"]:
    """Integrate the probability-flow ODE from z at t = 0 (on the linear path: ε) to the clean latents at t = 1.

    Heun's method corrects each Euler step with the velocity at its end, except the last, which ends where the
    velocity is undefined (Karras et al., 2022). The last step takes ẑ itself. Within the sampler's guidance interval,
    `guide` takes the place of `denoise`, if there is one. The solver `renoise` follows no ODE: it noises each ẑ to the
    next time with noise from `fresh`.
    """
    path = path or Linear()
    low, high = sampler.guidance_interval
    times = time_grid(sampler).tolist()  # Python's numbers: asking a device for one would wait for it at each step

    def denoise_at(z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        at = torch.full((len(z),), t, device=z.device)
        return (guide if guide and low <= t <= high else denoise)(z, at, y), at

    def velocity_at(z: Tensor, t: float) -> Tensor:
        z_hat, at = denoise_at(z, t)
        return velocity(path, z_hat, z, per_token(at))

    z = eps
    for now, then in itertools.pairwise(times[:-1]):
        if sampler.solver == "renoise":
            assert fresh is not None, "renoise needs noise"
            z_hat, at = denoise_at(z, now)
            z = noised(path, z_hat, next(fresh).to(z), per_token(torch.full_like(at, then)))
            continue
        v = velocity_at(z, now)
        ahead = z + (then - now) * v
        if sampler.solver == "heun":
            ahead = z + (then - now) * (v + velocity_at(ahead, then)) / 2
        z = ahead
    return denoise_at(z, times[-2])[0]


def resolve_labels(n: int, labels: Sequence[int] | None, seed: int, classes: int) -> list[int] | None:
    """A label for each of n images, or None for an unconditional network. Default: (seed + k) mod K.

    Raises:
        UserError: n < 1, a negative seed, a wrong number of labels, or a label outside 0…K (K is "no class").
    """
    if n < 1:
        raise UserError(f"n: {n} images cannot be sampled; give at least 1")
    if not 0 <= seed <= 2**63 - 1 - n:
        raise UserError(f"seed: {seed} is out of range; give an integer from 0 to about 9e18")
    if labels is None:
        return [(seed + k) % classes for k in range(n)] if classes else None
    if len(labels) != n:
        raise UserError(f"labels: {len(labels)} were given for {n} images; give one for each")
    for label in labels:
        if label != int(label) or not 0 <= label <= classes:
            known = f"0 to {classes - 1}, or {classes} for no class" if classes else "only 0: it has no classes"
            raise UserError(f"labels: {label} is not a class of this network, which knows {known}")
    return [int(label) for label in labels]


def generate(
    denoise: Denoiser,
    shape: tuple[int, int],
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    sampler: Sampler,
    *,
    null_label: int,
    batch: int = 256,
    device: torch.device | str = "cpu",
) -> Iterator[Float[Tensor, "B N D"]]:
    """Clean latents of shape (N, D) for `seeds` and `labels` (None: no classes), batch by batch and without a graph.

    Args:
        denoise: Any denoiser.
        shape: (N, D).
        seeds: One for each image.
        labels: One for each image, or None.
        sampler: Solver, time grid and guidance.
        null_label: The label K of "no class", which guidance needs; 0 for a denoiser without classes.
        batch: Images per call of the denoiser.
        device: Where the denoiser runs.

    Raises:
        UserError: a batch that makes no sense, or guidance without classes.
    """
    if batch < 1:
        raise UserError(f"batch: {batch} is not positive; give at least 1")
    check_guidance(sampler.guidance, 0 if labels is None else null_label)
    guide = guided(denoise, sampler.guidance, null_label)
    for start in range(0, len(seeds), batch):
        part = list(seeds[start : start + batch])
        y = None
        if labels is not None:
            y = torch.tensor(list(labels[start : start + batch]), dtype=torch.int64, device=device)
        fresh = noises(part, shape)
        with torch.no_grad():  # here, since a generator runs in the context of whoever takes from it
            z = solve(denoise, next(fresh).to(device), y, sampler, guide=guide, fresh=fresh)
        yield z
