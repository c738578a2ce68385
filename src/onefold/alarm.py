"""The collapse alarm: have the latents of a run collapsed?

Latents count as collapsed when one of two quantities is below its threshold at two consecutive measurements after the
learning-rate warm-up:

    latent_std              < 0.2                       the latents of different images hardly differ
    effective_rank_whole    < 0.5 · image_rank_whole    the latents have lost directions that the images have

`docs/training.md` explains why these, and how they were measured. The alarm depends only on the log, so a resumed run
raises the same alarms as an uninterrupted one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CURE", "IN_A_ROW", "LEAST_RANK", "LEAST_STD", "ONERUN_CURE", "ONESTEP_CURE", "collapse", "departure"]

LEAST_STD = 0.2
"""Std of the latents over images, in units of the noise's: below it, noise drowns them in the first 5/6 of the path."""
LEAST_RANK = 0.5
"""Effective rank of the whole latents, as a fraction of the images'."""
IN_A_ROW = 2
"""Consecutive measurements below a threshold that count as a collapse: a single one may be a bad step."""
CURE = "the objective's defaults (target=ema, loss=clean, through=False) or a lower learning rate may help"


def collapse(log: Sequence[Mapping[str, Any]], *, warmup: int = 0) -> str | None:
    """Describe what has collapsed at the last measurement in the log; None if nothing has.

    Lines without `health` and lines before `warmup` images are ignored.
    """
    recent = [line["health"] for line in log if line.get("health") and line["images"] >= warmup][-IN_A_ROW:]
    if len(recent) < IN_A_ROW:
        return None
    last = recent[-1]
    if all(_below(values, "latent_std", LEAST_STD) for values in recent):
        return f"the latents' standard deviation over images is {last['latent_std']:.3g}, below {LEAST_STD}"
    least = LEAST_RANK * (last.get("image_rank_whole") or 0.0)
    if all(_below(values, "effective_rank_whole", least) for values in recent):
        return f"the latents' effective rank is {last['effective_rank_whole']:.3g}, below {least:.3g}"
    return None


BOUNDS = {
    "mean_shift": (-0.3, 0.3),
    "contrast": (0.7, 1.4),
    "saturation": (0.6, 1.6),
    "diversity": (0.6, 1.5),
}
"""Accepted ranges of the measurements of a one-step generator; see `training/one_step_monitor.py` for their units."""
ONESTEP_CURE = "a lower training.learning_rate or more onestep.critic_updates may help"

ONERUN_CURE = "a lower onerun.generator_rate or onerun.student_rate may help"


def departure(log: Sequence[Mapping[str, Any]], *, warmup: int = 0) -> str | None:
    """Describe how a one-step generator departs from the data at the last two measurements; None if it does not.

    Measurements up to `warmup` images are ignored: the generator has not moved, and the teacher's first step is a mean.
    """
    recent = [line["onestep"] for line in log if line.get("onestep") and line["images"] > warmup][-IN_A_ROW:]
    if len(recent) < IN_A_ROW:
        return None
    for name, (low, high) in BOUNDS.items():
        if all(name in values and not low <= values[name] <= high for values in recent):
            return f"{name} is {recent[-1][name]:.3g}, outside {low:g} to {high:g}"
    return None


def _below(values: Mapping[str, Any], name: str, least: float) -> bool:
    """Whether a quantity is known and below `least`."""
    return values.get(name) is not None and values[name] < least
