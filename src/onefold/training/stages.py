"""The stages of a run: a single one for one network, two for three networks.

A stage has a schedule of its own, as if it were a run: warm-up, decay and the ramp of the averages count from its
first image. Which stage an image belongs to is a function of the configuration, and the step from one to the next a
function of the state and the data, so that a run resumed at any image is the same to the bit.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from onefold.compute import eager
from onefold.data import Dataset, read_all
from onefold.networks.base import Network
from onefold.networks.three_networks import ThreeNetworks
from onefold.pixels import to_float
from onefold.training.config import Config, TrainingConfig
from onefold.training.state import TrainingState

__all__ = ["Stage", "enter", "stage_at", "stages_of"]

MEASURED = 4096
"""Most images that the latents' mean and standard deviation are measured on."""


class Stage(NamedTuple):
    """A part of a run."""

    name: Literal["joint", "autoencoder", "diffusion", "onestep"]
    start: int
    """Images seen before it."""
    training: TrainingConfig
    """The run's settings with the stage's length in place of the run's."""


def stages_of(config: Config) -> list[Stage]:
    """All stages of a run, the first first."""
    training = config.training
    if config.onestep is not None:
        return [Stage("onestep", 0, training)]
    if "autoencoder" not in config.network.kind.phases:
        return [Stage("joint", 0, training)]
    change = _change(config)
    rest = max(1, training.images - change)
    return [
        Stage("autoencoder", 0, replace(training, images=change)),
        Stage("diffusion", change, replace(training, images=rest)),
    ]


def stage_at(images: int, config: Config) -> Stage:
    """The stage of the step that begins after `images` images."""
    return [stage for stage in stages_of(config) if stage.start <= images][-1]


def _change(config: Config) -> int:
    """Images after which encoder and decoder are frozen: a whole number of batches, at least one."""
    training = config.training
    return training.batch * max(1, round(config.stages.autoencoder * training.images / training.batch))


def enter(state: TrainingState, config: Config, data: Dataset) -> None:
    """Do what has to be done where a stage begins; elsewhere, nothing.

    Before the diffusion stage, all copies of the network become the published average, whose encoder and decoder stay
    as they are from then on, and its latents are normalised by their mean and standard deviation over the data.
    """
    network = state.published
    if not isinstance(network, ThreeNetworks) or config.onestep is not None or state.counters.images != _change(config):
        return
    network.normalise(*_latent_moments(network, data))
    for copy in (state.network, *state.averages):
        copy.load_state_dict(network.state_dict())


@torch.no_grad()
def _latent_moments(network: Network, data: Dataset) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and standard deviation of each latent channel over images spread evenly over the data."""
    chosen = np.linspace(0, len(data) - 1, min(len(data), MEASURED)).astype(np.int64)
    with eager():
        parts = [network.encode(to_float(x.to(network.device))).cpu() for x in read_all(data, chosen)[0].split(256)]
    z = torch.cat(parts).flatten(0, 1).double()
    return z.mean(0).float(), z.std(0).clamp(min=1e-4).float()
