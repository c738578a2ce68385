"""Pixels: between uint8 images and the network's range, grids of images, PNG files that know their origin."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from onefold.errors import UserError, writing

__all__ = ["grid", "mirrored", "save_png", "to_float", "to_uint8"]


def to_float(x: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 0…255 to float32 in [−1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Floats in [−1, 1] to uint8, clamped and rounded (not truncated); the exact inverse of `to_float`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def mirrored(x: Float[Tensor, "B C H W"], chosen: Bool[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """The images, those chosen left to right."""
    return torch.where(chosen[:, None, None, None], x.flip(3), x)


def grid(
    images: UInt8[np.ndarray, "n H W C"],
    *,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
) -> UInt8[np.ndarray, "rows columns C"]:
    """Lay images out row by row on white ground, each pixel enlarged `scale` times.

    By default the grid is about square and small images are enlarged to some 48 pixels.
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    scale = scale or max(1, 48 // max(height, width))
    cell_height, cell_width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8)
    for k, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = gap + (k // columns) * cell_height, gap + (k % columns) * cell_width
        sheet[top : top + height * scale, left : left + width * scale] = image
    return sheet


def save_png(path: Path, image: UInt8[np.ndarray, "H W C"], metadata: Mapping[str, object] | None = None) -> None:
    """Write one image with text metadata. Two channels: the first is shown; more than four: the first three.

    Raises a UserError if the name does not end in .png or the file cannot be written.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    channels = image.shape[2]
    shown = image[..., 0] if channels < 3 else image if channels == 4 else image[..., :3]
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: is not the name of a PNG file; end it with .png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(shown)).save(path, format="PNG", pnginfo=info)
