"""Images as every feature extractor takes them: uint8 (n, C, H, W), in batches.

A batch is a matter of memory only: each image goes through its network alone, so that the size of the batch
does not change the numbers beyond rounding. Convolutions on a GPU are in whole float32, not in its TF32.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor

from onefold.errors import UserError


def check_images(images: Tensor, shape: tuple[int | None, ...] = (None, None, None)) -> None:
    """Raise `UserError` unless `images` is uint8 (n, C, H, W) with n ≥ 1 and its (C, H, W) is `shape`."""
    if not isinstance(cast(object, images), Tensor):
        cure = "use torch.from_numpy(images)" if isinstance(images, np.ndarray) else "stack them into one"
        last = isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[3] in (1, 3, 4)
        cure += ", channels first: .permute(0, 3, 1, 2)" if last else ""
        raise UserError(f"images: {type(images).__name__} where a uint8 tensor (n, C, H, W) belongs; {cure}")
    if images.ndim != 4 or images.numel() == 0:
        cure = "put a single image into a batch, images[None]" if images.ndim == 3 else "stack at least one image"
        raise UserError(f"images: shape {tuple(images.shape)} is not (n, C, H, W); {cure}")
    if images.dtype != torch.uint8:
        cure = "round to 0…255 as a file would"
        if images.is_floating_point():
            cure = "as a file has it: torch.from_numpy(onefold.to_images(x)).permute(0, 3, 1, 2), of x in [-1, 1]"
        raise UserError(f"images: {str(images.dtype).removeprefix('torch.')} is not uint8; {cure}")
    if images.shape[3] in (1, 3, 4):
        _check_layout(images, shape)
    if any(want not in (None, have) for want, have in zip(shape, images.shape[1:], strict=True)):
        want, have = (" × ".join(str(s or "any") for s in sizes) for sizes in (shape, images.shape[1:]))
        raise UserError(f"images: C × H × W is {have}, the feature extractor takes {want}; choose another")


def _check_layout(images: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse images with the channels last, where that would fit or they could not be anything else."""
    turned = (images.shape[3], *images.shape[1:3])
    fits = all(want in (None, have) for want, have in zip(shape, turned, strict=True))
    if fits and min(images.shape[1:3]) > 4:
        raise UserError(f"images: shape {tuple(images.shape)} looks channels last; use images.permute(0, 3, 1, 2)")


@torch.no_grad()
def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """Outputs of `network` for all `images`, `batch` at a time, as float32 on the CPU."""
    if batch < 1:
        raise UserError(f"batch: {batch} images at a time are none; give 1 or more")
    with _without_tf32():
        return torch.cat([network(part).to("cpu", torch.float32) for part in images.split(batch)])


@contextmanager
def _without_tf32() -> Generator[None]:
    """Ten bits of a mantissa, which torch allows convolutions by default, would be another feature space."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
