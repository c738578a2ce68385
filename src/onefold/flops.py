"""Arithmetic of sampling and training, counted from that of a network's roles (`Network.role_flops`).

A backward pass costs twice its forward pass.
"""

from onefold.networks.base import NetworkConfig
from onefold.objectives.self_distillation import SelfDistillation
from onefold.objectives.two_stages import TwoStages

__all__ = ["sampling_flops", "training_flops"]


def training_flops(network: NetworkConfig, objective: SelfDistillation, stages: TwoStages) -> float:
    """Operations of one image's training step: the mean over the phases of the run.

    Self-distillation encodes, decodes and denoises the draws, each thrice with the backward pass, and encodes the EMA
    target once. Of the two stages, the first encodes and decodes, the second encodes once and denoises.
    """
    encode, denoise, decode = network.kind.role_flops(network)
    perceptual, target = 3 * (objective.perceptual_weight > 0), objective.target == "ema"
    work = {
        "self_distillation": (3 + target + perceptual) * encode + 3 * objective.draws * denoise + 3 * decode,
        "autoencoder": (3 + perceptual) * encode + 3 * decode,
        "diffusion": encode + 3 * objective.draws * denoise,
    }
    share = {"autoencoder": stages.autoencoder, "diffusion": 1 - stages.autoencoder}
    return sum(share.get(phase, 1) * work[phase] for phase in network.kind.phases)


def sampling_flops(network: NetworkConfig, evaluations: int) -> float:
    """Operations of one sample: so many evaluations of the denoiser, and decoding."""
    _, denoise, decode = network.kind.role_flops(network)
    return evaluations * denoise + decode
