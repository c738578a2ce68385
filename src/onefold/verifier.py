"""The ratio as a verifier: draw several samples per image and keep the one that looks most like data.

A one-step sample costs one evaluation of the network, so several candidates cost no more than a few sampling steps. The
ratio network from training tells how much likelier each candidate is under the data than under the generator:

    best of N     the sample with the largest ℓ: better samples, less variety
    resample N    one of them, with probability proportional to e^ℓ: if ℓ were exact, the distribution of the kept
                  samples would approach the data distribution as N grows (sampling–importance resampling; Rubin, 1987)

ℓ is evaluated at a low noise level, where the content of the sample is still visible. Candidate j of image k has the
seed `seed + k + j·2³²`, so candidate 0 is the image that would be sampled without a verifier.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold.errors import UserError
from onefold.networks.base import Network
from onefold.networks.ratio import RatioNet
from onefold.paths import Linear, noised, per_token
from onefold.sampling import Sampler, noises, seeded_rng

__all__ = ["Verifier"]

STRIDE = 2**32
"""Distance between the seeds of consecutive candidates of an image."""


@dataclass(frozen=True)
class Verifier:
    """Samples like a `Network`, choosing among several candidates per image."""

    network: Network
    ratio: RatioNet
    candidates: int
    """Candidates per image, N."""
    choice: Literal["best", "resample"] = "best"
    level: float = 0.9
    """The time t at which ℓ is evaluated; one that the ratio network has been trained at, up to `ratio.t_max`."""

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise UserError(f"{self}: {self.candidates} candidates are too few; give 1 or more")

    def __str__(self) -> str:
        return f"{'best of' if self.choice == 'best' else 'resampled from'} {self.candidates}"

    @torch.no_grad()
    def sample_latents(
        self, seeds: Sequence[int], labels: Sequence[int] | None, sampler: Sampler, *, batch: int = 256
    ) -> Iterator[Float[Tensor, "B N D"]]:
        """As `Network.sample_latents`, batch by batch; costs `candidates` × (steps + 1) evaluations per image."""
        if sampler.paints:
            raise UserError(f"solver: {sampler.solver!r} makes no latents to choose among; choose 'refine' in one step")
        count = self.candidates
        images = max(1, batch // count)
        for start in range(0, len(seeds), images):
            own = seeds[start : start + images]
            all_seeds = [seed + j * STRIDE for seed in own for j in range(count)]
            y = None if labels is None else [label for label in labels[start : start + images] for _ in range(count)]
            z = torch.cat(list(self.network.sample_latents(all_seeds, y, sampler, batch=batch)))
            logits = self._logits(z, all_seeds, y).unflatten(0, (len(own), count))
            kept = self._choose(logits, own)
            yield z.unflatten(0, (len(own), count))[torch.arange(len(own), device=z.device), kept]

    def _logits(self, z: Float[Tensor, "B N D"], seeds: Sequence[int], labels: list[int] | None) -> Float[Tensor, " B"]:
        """ℓ of each candidate, noised with fresh noise of its own, not the noise that it was generated from."""
        fresh = noises(seeds, tuple(z.shape[1:]))
        next(fresh)
        t = torch.full((len(z),), self.level, device=z.device)
        y = None if labels is None else torch.tensor(labels, device=z.device)
        with torch.autocast(z.device.type, enabled=False):  # choosing among similar candidates needs full precision
            return self.ratio(noised(Linear(), z, next(fresh).to(z), per_token(t)), t, y)

    def _choose(self, logits: Float[Tensor, "images N"], seeds: Sequence[int]) -> Int64[Tensor, " images"]:
        if self.choice == "best":
            return logits.argmax(1)
        # The argmax of ℓ + Gumbel noise is a draw with probability proportional to e^ℓ. The noise comes from a seed
        # that no candidate has; otherwise the choice would depend on the noise that the candidates were generated from.
        rngs = [seeded_rng(seed + self.candidates * STRIDE) for seed in seeds]
        uniform = [torch.rand(logits.shape[1], generator=rng) for rng in rngs]
        gumbel = -(-torch.stack(uniform).clamp(min=1e-20).log()).log()
        return (logits + gumbel.to(logits)).argmax(1)
