"""Pixels: between uint8 images, as files and `network.sample` have them, and what networks take; mirrored, moved."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from onefold.errors import UserError

__all__ = ["mirrored", "shifted", "to_float", "to_images", "to_tensor", "to_uint8"]


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


def to_tensor(images: Any) -> Float[Tensor, "n C H W"]:
    """Images as files have them, or as `network.sample` returns them, as networks take them.

    Args:
        images: uint8 (n, H, W, C), an array or a tensor; or a list of uint8 (H, W, C) or of Pillow's images, all alike.

    Returns:
        float32 (n, C, H, W) in [−1, 1], on the device of `images`; `to_images` is the inverse.

    Raises:
        UserError: another type, layout or number of axes, or images that differ in size or channels.
    """
    if isinstance(images, Image.Image):
        raise UserError("images: a single image; give a list, [image]")
    x = _stacked(images) if isinstance(images, Sequence) else images
    if isinstance(x, np.ndarray):
        try:
            x = torch.from_numpy(x.copy())
        except TypeError:
            raise UserError(f"images: an array of {x.dtype}; give uint8 (n, H, W, C)") from None
    if not isinstance(x, Tensor):
        raise UserError(f"images: {type(x).__name__} is no array; give uint8 (n, H, W, C), or a list of images")
    if x.dtype != torch.uint8:
        raise UserError(f"images: {_range_text(x)}, not uint8; {_uint8_cure(x)}")
    if x.ndim != 4 or 0 in x.shape:
        cure = "give grey images one channel, images[..., None]" if x.ndim == 3 else "stack at least one image"
        if x.ndim == 3 and x.shape[2] in (1, 3, 4):
            cure = "put a single image into a batch, images[None]"
        raise UserError(f"images: shape {tuple(x.shape)} is not (n, H, W, C); {cure}")
    if x.shape[1] <= 4 < min(x.shape[2:]):
        raise UserError(f"images: shape {tuple(x.shape)} looks channels first; put them last, {_last(images)}")
    return to_float(x.permute(0, 3, 1, 2).contiguous())


def to_images(x: Float[Tensor, "n C H W"]) -> UInt8[np.ndarray, "n H W C"]:
    """What networks give, float (n, C, H, W) in [−1, 1], as uint8 (n, H, W, C): clamped, rounded, on the CPU.

    Raises:
        UserError: no float tensor of four axes, or numbers that are not finite.
    """
    if not isinstance(cast(object, x), Tensor):
        cure = "give a tensor, torch.from_numpy(x)" if isinstance(x, np.ndarray) else "give a tensor (n, C, H, W)"
        raise UserError(f"x: {type(x).__name__} is no tensor; {cure}")
    if x.ndim != 4 or x.numel() == 0:
        cure = "put a single image into a batch, x[None]" if x.ndim == 3 else "give a batch of images"
        raise UserError(f"x: shape {tuple(x.shape)} is not (n, C, H, W); {cure}")
    if not x.is_floating_point():
        raise UserError(f"x: {_name(x)}, not float in [-1, 1]; uint8 images need no conversion but .numpy()")
    if x.shape[3] <= 4 < min(x.shape[1:3]):
        raise UserError(f"x: shape {tuple(x.shape)} looks channels last; put them first, x.permute(0, 3, 1, 2)")
    if not bool(x.isfinite().all()):
        raise UserError("x: holds NaN or infinity; look for the step that made it")
    return to_uint8(x.detach()).permute(0, 2, 3, 1).cpu().numpy()


def _stacked(images: Sequence[Any]) -> Any:
    """A list of images as one array or tensor."""
    if not images:
        raise UserError("images: none were given; give at least one")
    if isinstance(images, str | bytes) or isinstance(images[0], str | bytes):
        raise UserError("images: text or bytes where images belong; open files with PIL.Image.open")
    if all(isinstance(image, Tensor) for image in images):
        images = [image.numpy(force=True) for image in images]
    arrays: list[np.ndarray[Any, Any]] = []
    for k, image in enumerate(images):
        if isinstance(image, Image.Image) and image.mode not in ("L", "RGB", "RGBA"):
            raise UserError(f'images: {k} has mode {image.mode}; convert it, image.convert("RGB")')
        array = np.asarray(image)
        arrays.append(array[..., None] if isinstance(image, Image.Image) and array.ndim == 2 else array)
    for k, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise UserError(f"images: {k} has shape {array.shape} and the first {arrays[0].shape}; make them alike")
    return np.stack(arrays)


def _last(images: object) -> str:
    return "images.permute(0, 2, 3, 1)" if isinstance(images, Tensor) else "images.transpose(0, 2, 3, 1)"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _range_text(x: Tensor) -> str:
    """Type and range, such as "float32 from 0 to 1"."""
    if x.numel() == 0 or x.is_complex():
        return _name(x)
    return f"{_name(x)} from {float(x.min()):.3g} to {float(x.max()):.3g}"


def _uint8_cure(x: Tensor) -> str:
    """How numbers of this range become uint8."""
    if x.numel() == 0 or x.is_complex():
        return "give uint8 with values from 0 to 255"
    low, high = float(x.min()), float(x.max())
    if low >= 0 and high <= 1:
        return "multiply by 255, round and convert to uint8"
    if low >= -1.001 and high <= 1.001 and x.is_floating_point():
        return "floats in [-1, 1] are what networks take: give them (n, C, H, W) as they are"
    return "round to 0…255 and convert to uint8"
