"""Schedules: how long a network is trained, at what rate, and over how long its weights are averaged.

Time is counted in images seen. The learning-rate factor after n of N images,

    min(1, n / warmup) · (final + (1 − final) · fall),     fall = 1 until (1 − decay)·N, then down to 0 at N,

and the survival of the averages are pure functions of n and need no further state.
"""

import math
from dataclasses import dataclass
from typing import Literal

from onefold import settings
from onefold.errors import UserError

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """Length, optimizer, rates and averages of a training phase."""

    images: int = 64_000
    """Length, in images seen."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_rate: float = 0.02
    """Peak learning rate of Muon, for the matrices of the trunk's blocks."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: int = 4_000
    decay: float = 0.5
    """Fraction of the length, at its end, over which the learning rate decays."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    final_rate: float = 0.0
    """Final learning rate, as a fraction of its peak."""
    clip: float = 1.0
    """Maximum norm of the full gradient; larger gradients are scaled down to it."""
    ema_half_lives: tuple[int, ...] = (4_000,)
    """One average of the weights each. The first is the objective's target; the last is the published model."""
    ema_ramp: float = 0.1
    """Half-lives are at most this fraction of the images seen, so that early averages are short (0: no such limit)."""

    def __post_init__(self) -> None:
        settings.check(
            "training",
            self,
            positive=("images", "learning_rate", "muon_rate", "clip"),
            not_negative=("warmup", "weight_decay", "ema_ramp"),
            shares=("decay", "final_rate", "betas"),
        )
        if max(self.betas) == 1:
            raise UserError(f"training.betas: {self.betas} must both be below 1")
        if not self.ema_half_lives or min(self.ema_half_lives) < 1:
            raise UserError("training.ema_half_lives: give at least one positive number of images")

    def rate_factor(self, images: int, batch: int) -> float:
        """Learning-rate factor of the step that starts after `images` images of this schedule."""
        warm = min(1.0, (images + batch) / self.warmup) if self.warmup else 1.0
        falling = self.decay * self.images
        left = min(1.0, max(0.0, (self.images - images) / falling)) if falling else 1.0
        if self.decay_shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return warm * (self.final_rate + (1 - self.final_rate) * left)

    def survival(self, half_life: int, images: int, batch: int) -> float:
        """Fraction of an average that survives a step of `batch` images ending at `images` images seen.

        ½^(batch / h) with h = min(half_life, ema_ramp · images): the ramp keeps early averages short (Karras et al.,
        2022). Without it, the random initial weights would linger in the average for several half-lives.
        """
        effective = min(float(half_life), self.ema_ramp * images) if self.ema_ramp else half_life
        return 0.5 ** (batch / effective) if effective > 0 else 0.0
