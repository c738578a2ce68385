"""Images as every feature extractor takes them: uint8 (n, C, H, W), in batches.

A batch is a matter of memory only: each image goes through its network alone, so that the size of the batch
does not change the numbers beyond rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from onefold.errors import UserError


def check_images(images: Tensor, shape: tuple[int | None, ...] = (None, None, None)) -> None:
    """Raise `UserError` unless `images` is uint8 (n, C, H, W) with n ≥ 1 and its (C, H, W) is `shape`."""
    if images.ndim != 4 or images.numel() == 0:
        raise UserError(f"images: shape {tuple(images.shape)} is not (n, C, H, W); stack at least one image")
    if images.dtype != torch.uint8:
        raise UserError(f"images: {images.dtype} is not uint8; round to 0…255 as a file would")
    if any(want not in (None, have) for want, have in zip(shape, images.shape[1:], strict=True)):
        want, have = (" × ".join(str(s or "any") for s in sizes) for sizes in (shape, images.shape[1:]))
        raise UserError(f"images: C × H × W is {have}, the feature extractor takes {want}; choose another")


@torch.no_grad()
def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """Outputs of `network` for all `images`, `batch` at a time, as float32 on the CPU."""
    if batch < 1:
        raise UserError(f"batch: {batch} images at a time are none; give 1 or more")
    return torch.cat([network(part).to("cpu", torch.float32) for part in images.split(batch)])
