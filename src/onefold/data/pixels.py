"""Bytes and numbers: pixels are uint8 in files and float32 in [−1, 1] in the network."""

import torch


def to_float(x: torch.Tensor) -> torch.Tensor:
    """Map uint8 0…255 to float32 −1…1, any shape."""
    return x.to(torch.float32) / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Map floating point −1…1 to uint8 0…255, any shape: rounded, and clamped to the ends.

    It undoes `to_float` exactly. Truncation instead of rounding would darken every image by half a step.
    """
    return ((x.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
