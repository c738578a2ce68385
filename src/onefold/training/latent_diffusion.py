"""The phases of latent diffusion: all roles at once, or first the autoencoder and then the denoiser.

Each of the two stages of the baseline has its own schedule, as if it were a run: warm-up, decay and the ramp of the
averages count from its first image.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from onefold.compute import eager
from onefold.data import Dataset, read_all
from onefold.errors import UserError
from onefold.networks import Network, RoleFlops
from onefold.objectives.losses import Losses
from onefold.objectives.self_distillation import DenoisingDraws, draw, self_distillation
from onefold.objectives.two_stages import autoencoder, diffusion
from onefold.pixels import to_float
from onefold.schedule import Schedule
from onefold.training.config import Config
from onefold.training.health import HealthMonitor
from onefold.training.monitor import Monitor
from onefold.training.phases import Part, Phase, Say, Trained, names_of_phases, register
from onefold.training.run import Run

__all__ = ["Autoencoder", "Diffusion", "SelfDistillationPhase"]

MEASURED = 4096
"""Maximum number of images on which the latents' mean and standard deviation are measured."""


@register("self_distillation")
class SelfDistillationPhase(Phase):
    """Encoder, denoiser and decoder learn together; `average-0` provides the target."""

    @cached_property
    def parts(self) -> Sequence[Part]:
        network = Trained("network", self.optimizers, self.schedule, self.schedule.ema_half_lives)
        return (Part((network,), ("average-0",), self.draw, self.loss),)

    def draw(self, batch: int, rng: torch.Generator) -> DenoisingDraws:
        network = self.config.network
        return draw(self.config.objective, batch, (network.tokens, network.latent_channels), rng)

    def loss(self, network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        return self_distillation(network, target, x, y, draws, self.config.objective)

    def monitors(self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Say) -> Sequence[Monitor]:
        return (HealthMonitor(run, test, device, warmup=self.start + self.schedule.warmup),)

    def flops(self) -> float:
        """Encoding, decoding and each draw, three times with the backward pass; target and perceptual encodings."""
        role, objective = self._role_flops, self.config.objective
        passive = (objective.target == "ema") + 3 * (objective.perceptual_weight > 0)
        return (3 + passive) * role.encode + 3 * role.decode + 3 * objective.draws * role.denoise

    @property
    def _role_flops(self) -> RoleFlops:
        return self.config.network.kind.role_flops(self.config.network)


@register("autoencoder")
class Autoencoder(SelfDistillationPhase):
    """Only encoder and decoder: the first stage of three networks."""

    def __init__(self, config: Config, index: int, start: int) -> None:
        super().__init__(config, index, start)
        if not config.network.kind.learns_codec:
            raise UserError("phases: autoencoder needs an encoder that learns; pixels have none")

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """The run's schedule, over a share of its images: a whole number of batches, at least one."""
        training, share = config.training, config.stages.autoencoder
        return replace(training, images=training.batch * max(1, round(share * training.images / training.batch)))

    def loss(self, network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        return autoencoder(network, target, x, draws, self.config.objective, self.config.stages)

    def flops(self) -> float:
        """Encoding and decoding, three times with the backward pass; the perceptual encodings."""
        role, perceptual = self._role_flops, self.config.objective.perceptual_weight > 0
        return (3 + 3 * perceptual) * role.encode + 3 * role.decode


@register("diffusion")
class Diffusion(SelfDistillationPhase):
    """Only the denoiser, on the latents of the frozen encoder, normalised per channel: the second stage."""

    def __init__(self, config: Config, index: int, start: int) -> None:
        super().__init__(config, index, start)
        if config.network.kind.normalise is Network.normalise:
            raise UserError(
                "phases: diffusion needs an encoder that can be frozen; choose --architecture three-networks"
            )

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        """The run's schedule, over the images that the autoencoder leaves, if there is one."""
        if "autoencoder" not in names_of_phases(config):
            return config.training
        left = config.training.images - Autoencoder.schedule_of(config).images
        return replace(config.training, images=max(1, left))

    def adapt(self, network: Network, data: Dataset) -> None:
        """From now on, normalise latents by their mean and standard deviation over the data, whatever was before."""
        channels = network.config.latent_channels
        network.normalise(torch.zeros(channels), torch.ones(channels))
        network.normalise(*_latent_moments(network, data))

    def loss(self, network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        return diffusion(network, x, y, draws, self.config.objective)

    def flops(self) -> float:
        """Encoding, and each draw three times with the backward pass."""
        role = self._role_flops
        return role.encode + 3 * self.config.objective.draws * role.denoise


@torch.no_grad()
def _latent_moments(network: Network, data: Dataset) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and standard deviation of each latent channel over images spread evenly over the data."""
    chosen = np.linspace(0, len(data) - 1, min(len(data), MEASURED)).astype(np.int64)
    with eager():
        parts = [network.encode(to_float(x.to(network.device))).cpu() for x in read_all(data, chosen)[0].split(256)]
    z = torch.cat(parts).flatten(0, 1).double()
    return z.mean(0).float(), z.std(0).clamp(min=1e-4).float()
