"""Sampling: from seeds to clean latents, with any function (z_t, t, y) → ẑ.

This file knows no network. A solver integrates the probability-flow ODE dz/dt = v(z, t) from t = 0 (noise) to t = 1
(data) over a grid of times; on the linear path its last Euler step lands on ẑ itself, and one Euler step is ẑ(ε, 0):
one-step generation is `steps=1`. Solvers are in `SOLVERS`, by name; one of your own is one more entry (see `Solver`).

Image k owns the seed `seed + k`, and its noise is drawn from that seed alone on the CPU. It is the same image for any
batch size, order or device, up to the rounding of the network's arithmetic.
"""

import difflib
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold.errors import UserError
from onefold.paths import Linear, Path, noised, per_token, shift_time, velocity

__all__ = [
    "SOLVERS",
    "Denoiser",
    "Euler",
    "Heun",
    "Jump",
    "Labels",
    "OnePass",
    "Refine",
    "Renoise",
    "Sampler",
    "Solver",
    "check_guidance",
    "generate",
    "noises",
    "resolve_labels",
    "seeded_rng",
    "solve",
    "time_grid",
    "with_guidance",
]

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(z_t (B, N, D), t (B,), y (B,) or None) → ẑ (B, N, D)."""
Labels = Sequence[int | str] | np.ndarray | Tensor
"""A label for each image."""
Jump = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(z_t (B, N, D), t (B,), y (B,) or None, r (B,)) → the clean latents at which a jump from t to r aims; of one pass,
with r = 1, their image (B, C, H, W)."""


class DenoiserAtTime(Protocol):
    """A network with the labels and the guidance of the samples in it."""

    def __call__(self, z_t: Tensor, t: float, r: float | None = None, /) -> Tensor:
        """Clean latents (B, N, D) predicted from z_t; with r, a sample of them, at which a jump from t to r aims."""
        ...


# --- solvers ----------------------------------------------------------------------------------------------------------


class Solver(Protocol):
    """A way from noise to clean latents over a grid of times.

    To add one, put it into `SOLVERS` before its name is used:

        SOLVERS["midpoint"] = Midpoint()
        network.sample(16, solver="midpoint")

    A `Sampler`, the command line and a saved `sampler.json` then know it by that name. One that calls the denoiser with
    a time of arrival, (z_t, t, r), has an attribute `jumps = True`: it samples with a one-step generator.
    """

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        """The times t at which `integrate` calls the denoiser on this grid, one for each call."""
        ...

    def integrate(
        self,
        denoise: DenoiserAtTime,
        z: Float[Tensor, "B N D"],
        times: Sequence[float],
        path: Path,
        noise: Iterator[Float[Tensor, "B N D"]] | None,
    ) -> Float[Tensor, "B N D"]:
        """Clean latents from z at the first time.

        Args:
            denoise: (z_t, t) → ẑ, or (z_t, t, r) → where a jump aims; see `DenoiserAtTime`.
            z: Latents at times[0]: pure noise.
            times: Increasing, to 1. The velocity is undefined at 1: end on a ẑ.
            path: The noise path on which z_t lies.
            noise: More standard normal noise of the samples' own seeds, on the CPU; for solvers that draw.
        """
        ...


class Euler:
    """Euler steps along the velocity; the last step takes ẑ itself."""

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        return list(times[:-1])

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        for now, then in itertools.pairwise(times[:-1]):
            z = z + (then - now) * _velocity(denoise, z, now, path)
        return denoise(z, times[-2])


class Heun:
    """Euler steps, each corrected with the velocity at its end but for the last (Karras et al., 2022)."""

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        return [*times[:-1], *times[1:-1]]

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        for now, then in itertools.pairwise(times[:-1]):
            v = _velocity(denoise, z, now, path)
            ahead = z + (then - now) * v
            z = z + (then - now) * (v + _velocity(denoise, ahead, then, path)) / 2
        return denoise(z, times[-2])


class Renoise:
    """No ODE: jumps to t = 1, each noised anew to the next time; for one-step generators (Song et al., 2023)."""

    jumps = True

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        return list(times[:-1])

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        assert noise is not None, "renoise needs noise"
        for now, then in itertools.pairwise(times[:-1]):
            z_hat = denoise(z, now, 1.0)
            z = noised(path, z_hat, next(noise).to(z), per_token(_at(then, z)))
        return denoise(z, times[-2], 1.0)


@dataclass(frozen=True)
class Refine:
    """One jump to t = 1; with more steps, its result is noised again and denoised by Euler steps.

    The way back is `stride` for each of those steps, since a longer step would end in a mean, and at most to the start.

    The one-step generator drafts, the denoiser refines. Unlike `Renoise`, it needs no generator that is trained for
    more than its start (measured in `docs/onestep.md`).
    """

    jumps = True
    stride: float = 0.1

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        return [times[0], *self._grid(times)[:-1]]

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        assert noise is not None, "refine needs noise"
        draft, grid = denoise(z, times[0], 1.0), self._grid(times)
        if len(grid) == 1:
            return draft
        z = noised(path, draft, next(noise).to(z), per_token(_at(grid[0], z)))
        return Euler().integrate(denoise, z, grid, path, None)

    def _grid(self, times: Sequence[float]) -> list[float]:
        """Times of the steps after the first, to 1; spaced as those given."""
        rest = times[1:]
        turn = max(times[0], 1 - self.stride * (len(rest) - 1))
        return [1 + (1 - turn) * (t - 1) / max(1 - rest[0], 1e-9) for t in rest]


class OnePass:
    """One jump to t = 1 that ends in an image, not in latents: a decoder has nothing left to do."""

    jumps = True
    paints = True

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        return [times[0]]

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        return denoise(z, times[0], 1.0)


def _velocity(denoise: DenoiserAtTime, z: Tensor, t: float, path: Path) -> Tensor:
    return velocity(path, denoise(z, t), z, per_token(_at(t, z)))


def _at(t: float, z: Tensor) -> Float[Tensor, " B"]:
    return torch.full((len(z),), t, device=z.device)


SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "renoise": Renoise(),
    "refine": Refine(),
    "one_pass": OnePass(),
}
"""By the name that `Sampler.solver`, the command line and `sampler.json` use."""


# --- the sampler ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """How to get from noise to latents."""

    steps: int = 50
    """Intervals of the time grid."""
    solver: str = "euler"
    """A name in `SOLVERS`."""
    guidance: float = 1.0
    """w of ẑ = ẑ(no class) + w·(ẑ(y) − ẑ(no class)) (Ho & Salimans, 2022); 1 is unguided and costs half."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times within which guidance acts (Kynkäänniemi et al., 2024)."""
    shift: float = 1.0
    """Below 1, more of the grid lies near noise; above 1, near data."""
    start: float = 0.0
    """Time t₀ at which the grid begins, from (1 − t₀)·ε. A one-step generator has the one that it was trained for."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            known = ", ".join(map(repr, SOLVERS))
            raise UserError(f"solver: {self.solver!r} is not one of {known}; choose one, or add it to sampling.SOLVERS")
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is not positive; give 1 for one-step sampling or more")
        if self.paints and self.steps != 1:
            raise UserError(f"steps: {self.steps} cannot be one pass; leave it at 1, or choose the solver 'refine'")
        if not math.isfinite(self.guidance):
            raise UserError(f"guidance: {self.guidance} is not a number; 1 is unguided")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift: {self.shift} is not positive; 1 leaves the time grid uniform")
        if not 0 <= self.start < 1:
            raise UserError(f"start: {self.start} must be at least 0 (noise) and below 1 (data)")
        if self.guidance != 1 and self.jumps:
            raise UserError(
                f"guidance: {self.guidance:g} cannot guide a one-step generator while it samples; leave it at 1, "
                "sample with --solver euler --steps 50, or train with --onestep.score.guidance or --onerun.guidance"
            )
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval: ({low}, {high}) is not within 0 ≤ low ≤ high ≤ 1")

    @property
    def jumps(self) -> bool:
        """Whether its solver samples with the network in the role of a one-step generator."""
        return getattr(SOLVERS[self.solver], "jumps", False)

    @property
    def paints(self) -> bool:
        """Whether its solver ends in images, not in latents."""
        return getattr(SOLVERS[self.solver], "paints", False)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one image, without decoding; two at each time within a guidance's interval."""
        times = SOLVERS[self.solver].evaluation_times(time_grid(self).tolist())
        return len(times) + sum(self.guidance != 1 and self.guides_at(t) for t in times)

    def guides_at(self, t: float) -> bool:
        """Whether t lies in the guidance interval, ends included."""
        low, high = self.guidance_interval
        return low <= t <= high

    def with_options(self, **wanted: Any) -> "Sampler":
        """A copy with the options that are not None.

        From a solver that jumps to one that does not, start and steps become a denoiser's unless they are given too;
        one pass is one step.
        """
        given = {name: value for name, value in wanted.items() if value is not None}
        solver = SOLVERS.get(wanted.get("solver") or self.solver)
        if self.jumps and not getattr(solver, "jumps", False):
            given = {"start": Sampler.start, "steps": Sampler.steps, **given}
        if getattr(solver, "paints", False):
            given = {"steps": 1, **given}
        return replace(self, **given)

    def check_for(self, own: "Sampler") -> None:
        """Refuse a solver that jumps for a network whose own sampler does not.

        Raises:
            UserError: naming what makes a one-step generator.
        """
        if self.jumps and not own.jumps:
            cure = "make one with `onefold onestep RUN` or `onefold train … --one-step`, or choose another solver"
            raise UserError(f"solver: {self.solver!r} needs a one-step generator; {cure}")


def time_grid(sampler: Sampler) -> Float[Tensor, " steps_plus_one"]:
    """Times from the sampler's start to 1, float32 on the CPU."""
    times = shift_time(torch.linspace(0, 1, sampler.steps + 1, dtype=torch.float64), sampler.shift)
    return (sampler.start + (1 - sampler.start) * times).float()


def seeded_rng(seed: int) -> torch.Generator:
    """The random source of a seed ≥ 0. torch reads 32 bits of it; larger seeds are hashed into them."""
    if seed >= 2**32:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def noises(seeds: Sequence[int], shape: tuple[int, ...]) -> Iterator[Float[Tensor, "B ..."]]:
    """Standard normal noise (len(seeds), *shape) on the CPU, again and again, each row from its own seed."""
    rngs = [seeded_rng(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def check_guidance(guidance: float, classes: int) -> None:
    """Refuse guidance where there is nothing to guide by.

    Raises:
        UserError: guidance other than 1 of a denoiser without classes.
    """
    if guidance != 1 and not classes:
        raise UserError(f"guidance: {guidance:g} needs classes, and this network knows none; leave it at 1")


def with_guidance(denoise: Denoiser, guidance: float, null_label: int) -> Denoiser:
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
    noise: Iterator[Float[Tensor, "B N D"]] | None = None,
    jump: Jump | None = None,
) -> Float[Tensor, "B ..."]:
    """From noise ε at the sampler's start (at t = 0 on the linear path: ε itself) to clean latents, by its solver.

    Within the sampler's guidance interval, `guide` takes the place of `denoise`, if there is one. `noise` is more noise
    of the samples' seeds, for solvers that draw; `jump` is the one-step generator, for solvers that jump, in whose
    place a network without one denoises. What one pass gives is an image.
    """
    path, start = path or Linear(), sampler.start
    times = time_grid(sampler).tolist()  # Python's numbers: asking a device for one would wait for it at each step

    def denoise_at(z: Tensor, t: float, r: float | None = None, /) -> Tensor:
        if r is not None and jump is not None:
            return jump(z, _at(t, z), y, _at(r, z))
        return (guide if guide and sampler.guides_at(t) else denoise)(z, _at(t, z), y)

    z = noised(path, torch.zeros_like(eps), eps, per_token(_at(start, eps))) if start else eps
    return SOLVERS[sampler.solver].integrate(denoise_at, z, times, path, noise)


def resolve_labels(
    n: int, labels: Labels | None, seed: int, classes: int, class_names: Sequence[str] = ()
) -> list[int] | None:
    """A label for each of n images, or None for an unconditional network. Default: (seed + k) mod K.

    A word is the name of a class, or else the number of one as text. Where names of classes are themselves numbers,
    a word is only ever a name: what "3" means is then never in doubt.

    Raises:
        UserError: n < 1, a negative seed, a wrong number of labels, a label outside 0…K (K is "no class"), or a word
            that names no class.
    """
    n, seed = _whole("n", n), _whole("seed", seed)
    if n < 1:
        raise UserError(f"n: {n} images cannot be sampled; give at least 1")
    if not 0 <= seed <= 2**63 - 1 - n:
        raise UserError(f"seed: {seed} is out of range; give an integer from 0 to about 9e18")
    if labels is None:
        return [(seed + k) % classes for k in range(n)] if classes else None
    listed = _listed(labels, n)
    if len(listed) != n:
        raise UserError(f"labels: {len(listed)} were given for n = {n}; give one for each image")
    numbers = [_number_of(label, class_names) if isinstance(label, str) else label for label in listed]
    for label in numbers:
        if not _is_whole(label) or not 0 <= label <= classes:
            known = f"0 to {classes - 1}, or {classes} for no class" if classes else "only 0: it has no classes"
            raise UserError(f"labels: {label!r} is not a class of this network, which knows {known}")
    return [int(label) for label in numbers]


def _listed(labels: Any, n: int) -> list[Any]:
    """Labels as a list of Python's numbers, whatever holds them: a list, an array or a tensor, on any device."""
    plain = labels.tolist() if isinstance(labels, np.ndarray | np.generic | Tensor) else labels
    if isinstance(plain, str) or not isinstance(plain, Iterable):
        raise UserError(f"labels: {plain!r} is a single label; give one for each image, [{plain!r}] * {n}")
    listed = list(plain)
    if any(isinstance(label, list) for label in listed):
        raise UserError(f"labels: shape {np.shape(listed)} is not ({n},); give one number for each image")
    return [label.item() if isinstance(label, np.generic | Tensor) else label for label in listed]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _whole(name: str, value: Any) -> int:
    """An integer, also one of numpy or torch. Raises a UserError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}: {value!r} is not a whole number; give an integer") from None


def _number_of(word: str, class_names: Sequence[str]) -> int:
    """The number of a class that a word names."""
    if word in class_names:
        return list(class_names).index(word)
    if re.fullmatch("-?[0-9]+", word) and not any(name.isdigit() for name in class_names):
        return int(word)
    named = [f"{name} ({k})" for k, name in enumerate(class_names)]
    if not named:
        raise UserError(f"labels: {word!r} is no class of this network, which knows classes by number; give numbers")
    close = [named[list(class_names).index(name)] for name in difflib.get_close_matches(word, class_names, 3)]
    more = f" and {len(named) - 20:,} more" if len(named) > 20 else ""
    known = f"perhaps {', '.join(close)}" if close else f"it knows {', '.join(named[:20])}{more}"
    raise UserError(f"labels: {word!r} is no class of this network; {known}")


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
    jump: Jump | None = None,
) -> Iterator[Float[Tensor, "B ..."]]:
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
        jump: The one-step generator, for solvers that jump.

    Raises:
        UserError: a batch that makes no sense, or guidance without classes.
    """
    if batch < 1:
        raise UserError(f"batch: {batch} is not positive; give at least 1")
    check_guidance(sampler.guidance, 0 if labels is None else null_label)
    guide = with_guidance(denoise, sampler.guidance, null_label)
    for start in range(0, len(seeds), batch):
        part = list(seeds[start : start + batch])
        y = None
        if labels is not None:
            y = torch.tensor(list(labels[start : start + batch]), dtype=torch.int64, device=device)
        noise = noises(part, shape)
        with torch.no_grad():  # here, since a generator runs in the context of whoever takes from it
            z = solve(denoise, next(noise).to(device), y, sampler, guide=guide, noise=noise, jump=jump)
        yield z
