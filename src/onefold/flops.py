"""Arithmetic of the network, counted: a product of (m × k) by (k × n) matrices is 2·m·k·n operations.

Norms, activations and the like are left out; a backward pass costs twice its forward pass.
"""

from onefold.network import NetworkConfig
from onefold.objectives.self_distillation import SelfDistillation
from onefold.trunk import hidden_width

__all__ = ["forward_flops", "training_flops"]


def forward_flops(config: NetworkConfig) -> float:
    """Operations of one pass of one image through the trunk, one entrance and one exit."""
    n, w, hidden = config.tokens, config.width, hidden_width(config.width)
    block = 2 * n * w * (4 * w + 3 * hidden) + 4 * n**2 * w
    ends = 2 * n * w * (config.patch**2 * config.channels + config.latent_channels)
    return config.depth * block + ends + 14 * w**2


def training_flops(network: NetworkConfig, objective: SelfDistillation) -> float:
    """Operations of one image's training step: encode, decode and the draws thrice, the EMA target once."""
    passes = 3 * (2 + objective.draws) + (objective.target == "ema") + 4 * (objective.perceptual_weight > 0)
    return passes * forward_flops(network)
