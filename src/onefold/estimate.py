"""What a recipe costs before it is started: parameters, arithmetic, memory, time.

Parameters, arithmetic and state are counted; time and peak memory come from a few real training steps on the present
device, with random images.
"""

import time
from dataclasses import dataclass, replace

import torch

from onefold.architecture import build
from onefold.flops import sampling_flops, training_flops
from onefold.network import parameter_shares
from onefold.training.config import Config
from onefold.training.engine import choose_precision, resolve_device
from onefold.training.log import peak_memory
from onefold.training.loop import training_step
from onefold.training.optimizer import block_matrices
from onefold.training.state import TrainingState

__all__ = ["Estimate", "Measurement", "estimate", "measure"]


@dataclass(frozen=True)
class Measurement:
    """A few training steps on this device."""

    device: str
    precision: str
    micro_batch: int
    images_per_second: float
    peak_memory: int
    """Bytes, of the device, or of the whole process on a CPU."""


@dataclass(frozen=True)
class Estimate:
    """The cost of a recipe."""

    parameters: int
    share: float
    """Of the parameters, that serves all three roles."""
    latent_ratio: float
    """Numbers in a latent per number in an image."""
    flops_per_image: float
    """Of training: forward and backward passes of one image."""
    flops_per_sample: float
    """Of sampling one image with the recipe's sampler, with decoding."""
    state_bytes: int
    """Weights, gradients, optimizer and averages, in float32."""
    images: int
    measured: Measurement | None

    @property
    def seconds(self) -> float | None:
        """Expected time of the whole run on the measured device."""
        return self.images / self.measured.images_per_second if self.measured else None


def estimate(config: Config, *, seconds: float = 20.0) -> Estimate:
    """Count, and measure for about `seconds` (0: only count)."""
    with torch.device("meta"):
        network = build(config.network)
    shares = parameter_shares(network)
    muon = config.training.optimizer == "muon"
    matrices = sum(p.numel() for p in block_matrices(network))
    parameters = int(shares["parameters"])
    moments = 2 * parameters - (matrices if muon else 0)
    steps = config.sampler.steps if config.sampler.solver == "euler" else 2 * config.sampler.steps - 1
    evaluations = steps * (1 if config.sampler.guidance == 1 else 2)
    size = config.network.image_size
    return Estimate(
        parameters=parameters,
        share=shares["share"],
        latent_ratio=config.network.tokens
        * config.network.latent_channels
        / (size[0] * size[1] * config.network.channels),
        flops_per_image=training_flops(config.network, config.objective, config.stages),
        flops_per_sample=sampling_flops(config.network, evaluations),
        state_bytes=4 * (2 * parameters + moments + len(config.training.ema_half_lives) * parameters),
        images=config.training.images,
        measured=measure(config, seconds) if seconds > 0 else None,
    )


def measure(config: Config, seconds: float, micro_batch: int | None = None) -> Measurement:
    """Train on random images for about `seconds` after a first step, at least one step."""
    device = resolve_device(config.training.device)
    precision = config.training.precision
    micro = micro_batch or min(config.training.micro_batch or config.training.batch, _default_micro(config, device))
    training = replace(
        config.training,
        batch=micro,
        micro_batch=None,
        precision=choose_precision(device) if precision == "auto" else precision,
    )
    config = replace(config, training=training)
    state = TrainingState.fresh(config, device)
    size, classes = config.network.image_size, config.network.classes
    x = torch.rand((micro, config.network.channels, *size), device=device) * 2 - 1
    y = torch.arange(micro, device=device) % max(1, classes)
    training_step(state, x, y, config)["gradient_norm"].item()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        training_step(state, x, y, config)["gradient_norm"].item()
        steps += 1
    speed = steps * micro / (time.perf_counter() - start)
    return Measurement(str(device), training.precision, micro, speed, peak_memory(device))


def _default_micro(config: Config, device: torch.device) -> int:
    """A micro-batch for the measurement: all of a small network's, few images of a large one on a CPU."""
    if device.type != "cpu":
        return 32
    return max(2, min(64, int(2e12 / training_flops(config.network, config.objective, config.stages))))
