"""Pixels: between uint8 images and the network's range; mirrored, and moved."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

__all__ = ["mirrored", "shifted", "to_float", "to_uint8"]


def to_float(x: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 0…255 to float32 in [−1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Floats in [−1, 1] to uint8, clamped and rounded (not truncated); the exact inverse of `to_float`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def mirrored(x: Float[Tensor, "B C H W"], mask: Bool[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """The images, those of the mask left to right."""
    return torch.where(mask[:, None, None, None], x.flip(3), x)


def shifted(x: Float[Tensor, "B C H W"], offset: Float[Tensor, "B 2"]) -> Float[Tensor, "B C H W"]:
    """The images, moved up and to the left by `offset` (in shares of height and width, rounded to whole pixels).

    What comes in at the border repeats it.
    """
    rows, columns = (
        (torch.arange(size, device=x.device) + (offset[:, k, None] * size).round().long()).clamp(0, size - 1)
        for k, size in enumerate(x.shape[2:])
    )
    images = torch.arange(len(x), device=x.device)[:, None, None]
    return x[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
