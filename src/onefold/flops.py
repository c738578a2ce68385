"""Arithmetic of the network, counted: a product of (m × k) by (k × n) matrices is 2·m·k·n operations.

Norms, activations and the like are left out; a backward pass costs twice its forward pass.
"""

from onefold.networks.base import NetworkConfig
from onefold.networks.three_networks import depths
from onefold.networks.trunk import hidden_width
from onefold.objectives.self_distillation import SelfDistillation
from onefold.objectives.two_stages import TwoStages

__all__ = ["forward_flops", "sampling_flops", "training_flops"]


def forward_flops(config: NetworkConfig, depth: int | None = None) -> float:
    """Operations of one pass of one image through the trunk (or `depth` of its blocks), one entrance and one exit."""
    n, w, hidden = config.tokens, config.width, hidden_width(config.width)
    block = 2 * n * w * (4 * w + 3 * hidden) + 4 * n**2 * w
    ends = 2 * n * w * (config.patch**2 * config.channels + config.latent_channels)
    return (depth or config.depth) * block + ends + 14 * w**2


def training_flops(network: NetworkConfig, objective: SelfDistillation, stages: TwoStages) -> float:
    """Operations of one image's training step; for three networks, the mean over the run.

    One network encodes, decodes and denoises the draws, each thrice with the backward pass, and encodes the EMA target
    once. Three networks encode and decode in the first stage, encode once and denoise in the second. Where the latents
    are the pixels, there are the draws alone.
    """
    perceptual = 3 * (objective.perceptual_weight > 0)
    if network.space == "pixels":
        return 3 * objective.draws * forward_flops(network)
    if network.architecture == "one_network":
        passes = 3 * (2 + objective.draws) + (objective.target == "ema") + perceptual
        return passes * forward_flops(network)
    encode, denoise, decode = _role_flops(network)
    first, second = (3 + perceptual) * encode + 3 * decode, encode + 3 * objective.draws * denoise
    return stages.autoencoder * first + (1 - stages.autoencoder) * second


def sampling_flops(network: NetworkConfig, evaluations: int) -> float:
    """Operations of one sample: so many evaluations of the denoiser, and decoding."""
    _, denoise, decode = _role_flops(network)
    return evaluations * denoise + decode


def _role_flops(network: NetworkConfig) -> tuple[float, float, float]:
    """Operations of encoding, denoising and decoding."""
    if network.space == "pixels":
        return 0.0, forward_flops(network), 0.0
    one = network.architecture == "one_network"
    encoder, denoiser, decoder = (network.depth,) * 3 if one else depths(network)
    return forward_flops(network, encoder), forward_flops(network, denoiser), forward_flops(network, decoder)
