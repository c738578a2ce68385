"""Small networks for all seeds of a study at once, each with its own weights, data and randomness.

Denoisers are preconditioned and their loss is weighted for data of unit variance (Karras et al., 2022):

    f = t/v x_t + (1−t)/√v F(x_t, t)    with v = t² + (1−t)²,    loss E_t v/(1−t)² ‖f − x‖²
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from onefold.objectives.density_ratio import NoiseDraws

__all__ = ["Ensemble", "select", "train"]

RATE = 1e-2
"""Adam's learning rate, which decays to 0 along a cosine."""


@dataclass(frozen=True)
class Ensemble:
    """S networks (x_t, t) → (out,) with two hidden layers, evaluated at once.

    The samples of a batch belong to networks 0, 1, …, S − 1, 0, 1, … in turn.
    """

    weights: list[Tensor]
    """(S, in, out) of each layer."""
    biases: list[Tensor]
    """(S, 1, out)."""

    @classmethod
    def random(cls, d: int, width: int, out: int, rngs: Sequence[torch.Generator]) -> "Ensemble":
        """The initial networks, one from each generator."""
        sizes = ((d + 2, width), (width, width), (width, out))
        weights = [torch.stack([torch.randn(a, b, generator=rng) for rng in rngs]) / a**0.5 for a, b in sizes]
        biases = [torch.zeros(len(rngs), 1, b) for _, b in sizes]
        return cls([w.requires_grad_() for w in weights], [b.requires_grad_() for b in biases])

    @staticmethod
    def parameter_count(d: int, width: int, out: int) -> int:
        """Parameters of one network."""
        return (d + 3) * width + (width + 1) * (width + out)

    @property
    def count(self) -> int:
        return len(self.weights[0])

    def members(self, own: slice) -> "Ensemble":
        return Ensemble([w[own] for w in self.weights], [b[own] for b in self.biases])

    def __call__(self, x_t: Float[Tensor, "N d"], t: Float[Tensor, " N"]) -> Float[Tensor, "N out"]:
        h = torch.cat([x_t, t[:, None], (1 - t).log()[:, None] / 2], 1).unflatten(0, (-1, self.count)).transpose(0, 1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = F.silu(torch.baddbmm(bias, h, weight))
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]).transpose(0, 1).flatten(0, 1)

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The networks used as denoisers."""
        variance = (t.square() + (1 - t).square())[:, None]
        return t[:, None] / variance * x_t + (1 - t)[:, None] / variance.sqrt() * self(x_t, t)

    def denoising_loss(self, x: Float[Tensor, "N d"], draws: NoiseDraws) -> Float[Tensor, ""]:
        t = draws.t[:, None]
        weight = (t.square() + (1 - t).square()) / (1 - t).square()
        return (weight * (self.denoise(t * x + (1 - t) * draws.eps, draws.t) - x).square()).mean()

    def logit(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The networks used as log ratios."""
        return self(x_t, t).squeeze(1)


def train(
    ensemble: Ensemble,
    loss: Callable[[Tensor, NoiseDraws], Tensor],
    samples: int,
    batch: int,
    steps: int,
    latest: float,
    rngs: Sequence[torch.Generator],
) -> None:
    """Train each network on `batch` of `samples` at a time, with times up to `latest`.

    `loss` takes the indices (2, N) of samples of a first and a second distribution, and draws, for N = batch · S.
    """
    d = ensemble.weights[0].shape[1] - 2
    optimizer = torch.optim.Adam([*ensemble.weights, *ensemble.biases], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for indices, draws in _batches(d, samples, batch, steps, latest, rngs):
        optimizer.zero_grad()
        (ensemble.count * loss(indices, draws)).backward()  # the mean of each network's own batch
        optimizer.step()
        schedule.step()


def _batches(
    d: int, samples: int, batch: int, steps: int, latest: float, rngs: Sequence[torch.Generator], chunk: int = 50
) -> Iterator[tuple[Tensor, NoiseDraws]]:
    """Indices and draws for each step; each network's randomness comes from its own generator."""
    for start in range(0, steps, chunk):
        n = min(chunk, steps - start)
        indices = torch.stack([torch.randint(samples, (n, 2, batch), generator=rng) for rng in rngs], 3)
        u = torch.stack([torch.rand(n, batch, generator=rng) for rng in rngs], 2)
        t = latest * (torch.arange(batch)[:, None] + u) / batch
        normal = torch.stack([torch.randn(2, n, batch, d, generator=rng) for rng in rngs], 3)
        for own, times, (eps, direction) in zip(indices, t, normal.transpose(0, 1), strict=True):
            yield own.flatten(1), NoiseDraws(times.flatten(), eps.flatten(0, 1), direction.flatten(0, 1))


def select(data: Float[Tensor, "S n d"], indices: Int64[Tensor, " N"]) -> Float[Tensor, "N d"]:
    """Samples by index, from each network's own data."""
    return data[torch.arange(len(indices)) % len(data), indices]
