"""The engine: how a step is executed on the available devices. Currently one process and one device."""

import torch

from onefold.training.config import TrainingConfig

__all__ = ["autocast"]


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context in which losses are computed. Norms, losses and attention on a CPU stay in float32 inside it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16")
