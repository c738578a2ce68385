"""The collapse alarm: has a run's health fallen below what latents need?

Latents have collapsed when one of two quantities was below its threshold at two measurements in a row, after the
warm-up of the learning rate:

    latent_std              < 0.2                        images hardly differ in their latents
    effective_rank_whole    < 0.5 · its highest so far   directions that the latents had are gone

Why these, and how they were measured: `docs/training.md`. The alarm is a function of the log alone, so that a resumed
run goes on judging as if it had not been interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["IN_A_ROW", "LEAST_RANK", "LEAST_STD", "collapse"]

LEAST_STD = 0.2
"""Of the latents over images, in units of the noise's: below it, noise drowns them in the first 5/6 of the path."""
LEAST_RANK = 0.5
"""Of the whole latents, as a share of its highest value in the run."""
IN_A_ROW = 2
"""Measurements below a threshold that make a collapse: a single one may be a bad step."""


def collapse(log: Sequence[Mapping[str, Any]], *, warmup: int = 0) -> str | None:
    """What has collapsed at the last measurement in the log, in words; None if nothing has.

    Lines without `health` are passed over, and so are those of the warm-up, but for the highest rank.
    """
    measured = [line for line in log if line.get("health")]
    recent = [line["health"] for line in measured if line["images"] >= warmup][-IN_A_ROW:]
    if len(recent) < IN_A_ROW:
        return None
    std = _numbers(recent, "latent_std")
    if len(std) == IN_A_ROW and max(std) < LEAST_STD:
        return f"the latents' standard deviation over images is {std[-1]:.3g}, below {LEAST_STD}"
    rank = _numbers(recent, "effective_rank_whole")
    highest = max(_numbers([line["health"] for line in measured], "effective_rank_whole"), default=0.0)
    if len(rank) == IN_A_ROW and max(rank) < LEAST_RANK * highest:
        return f"the latents' effective rank is {rank[-1]:.3g}, less than half of the {highest:.3g} that it was"
    return None


def _numbers(measurements: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """What was finite."""
    return [m[name] for m in measurements if m.get(name) is not None]
