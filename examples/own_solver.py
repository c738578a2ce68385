"""A custom solver: the midpoint rule, which evaluates the network in the middle of each time interval."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import onefold
from onefold.paths import Path, per_token, velocity
from onefold.sampling import SOLVERS, DenoiserAtTime


class Midpoint:
    """z ← z + h·v(z + h/2·v(z, t), t + h/2); the last step takes ẑ itself."""

    def evaluation_times(self, times: Sequence[float]) -> list[float]:
        middles = [(now + then) / 2 for now, then in itertools.pairwise(times[:-1])]
        return [*times[:-1], *middles]

    def integrate(
        self, denoise: DenoiserAtTime, z: Tensor, times: Sequence[float], path: Path, noise: Iterator[Tensor] | None
    ) -> Tensor:
        def v(z: Tensor, t: float) -> Tensor:
            return velocity(path, denoise(z, t), z, per_token(torch.full((len(z),), t, device=z.device)))

        for now, then in itertools.pairwise(times[:-1]):
            half = (then - now) / 2
            z = z + (then - now) * v(z + half * v(z, now), now + half)
        return denoise(z, times[-2])


SOLVERS["midpoint"] = Midpoint()


def main(run: str = "runs/digits") -> None:
    """Sample with it."""
    network = onefold.load_run(run).network
    print(network.sample(4, steps=10, solver="midpoint").shape)


if __name__ == "__main__":
    main()
