"""How near a reconstruction comes to its original: PSNR and SSIM.

    PSNR = 10 log10(L² / mean (x − y)²)   in dB, per image; L = 2 is the range of [−1, 1] from peak to peak
    SSIM = mean over windows of  (2 μ_x μ_y + c₁)(2 σ_xy + c₂) / ((μ_x² + μ_y² + c₁)(σ_x² + σ_y² + c₂))

with c₁ = 0.01², c₂ = 0.03² on images in [0, 1]: SSIM compares brightness with black, so it is not the same
on [−1, 1]. The window is a Gaussian of σ = 1.5 over 11×11 pixels, only where it lies wholly inside the
image (a package that reflects the border differs in the third digit). An image with a side below 11 takes
the largest odd window that fits (8×8: 7×7), renormalised; such values compare only with values of the same
image size.

Both are means over images of one value per image, the usual way; the PSNR of the mean error would be lower.

Shapes: images (B, C, H, W), uint8 in [0, 255] or float in [−1, 1]; values (B,). Reference: Wang et al. 2004,
"Image quality assessment: from error visibility to structural similarity".
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.errors import UserError

WINDOW = 11
SIGMA = 1.5
CAP = 100.0  # dB
CHUNK = 256


def psnr(reconstruction: Tensor, original: Tensor) -> float:
    """Mean over images of the PSNR in dB, at most 100: identical images count as 100 dB, not as infinity.

    Images are (B, C, H, W), uint8 or float in [−1, 1]; a float reconstruction is clamped to that range, as
    a file would be, but not rounded. Raises `UserError` for unequal shapes or an original outside of its
    range.
    """
    return image_psnr(reconstruction, original).mean().item()


def ssim(reconstruction: Tensor, original: Tensor) -> float:
    """Mean over images of the SSIM, in [−1, 1], 1 for identical images; images and errors as `psnr`."""
    return image_ssim(reconstruction, original).mean().item()


def image_psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """PSNR of each image in dB, at most 100: (B,) float64. Images and errors as `psnr`."""
    errors = [(x - y).square().flatten(1).mean(1) for x, y in _pairs(reconstruction, original)]
    return (-10 * torch.cat(errors).log10()).clamp(max=CAP)  # on [0, 1], where L = 1


def image_ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """SSIM of each image: (B,) float64. Images and errors as `psnr`."""
    pairs = _pairs(reconstruction, original)
    side = min(WINDOW, *original.shape[2:])
    weights = _gaussian(side - 1 + side % 2)
    return torch.cat([_ssim_map(x, y, weights).flatten(1).mean(1) for x, y in pairs])


def _ssim_map(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _local_mean(x, weights), _local_mean(y, weights)
    var_x = _local_mean(x * x, weights) - mean_x**2
    var_y = _local_mean(y * y, weights) - mean_y**2
    covariance = _local_mean(x * y, weights) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def _local_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean in each window, without padding: down the columns, then along the rows."""
    b, c, h, w = x.shape
    x = F.conv2d(x.reshape(b * c, 1, h, w), weights.view(1, 1, -1, 1))
    x = F.conv2d(x, weights.view(1, 1, 1, -1))
    return x.reshape(b, c, *x.shape[2:])


def _gaussian(size: int) -> Tensor:
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    return torch.softmax(-(x**2) / (2 * SIGMA**2), 0)


def _pairs(reconstruction: Tensor, original: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in chunks of images, as float64 in [0, 1] on the CPU. What is wrong is said at once."""
    for images in (reconstruction, original):
        if not isinstance(cast(object, images), Tensor):
            cure = "use onefold.to_tensor(images)"
            raise UserError(f"images: {type(images).__name__} where a tensor (B, C, H, W) belongs; {cure}")
    if reconstruction.shape != original.shape or original.ndim != 4 or original.numel() == 0:
        shapes = f"{tuple(reconstruction.shape)} and {tuple(original.shape)}"
        raise UserError(f"images: shapes {shapes} are not one (B, C, H, W); pair each with its original")
    if original.is_floating_point() and not bool((original.abs() <= 1.001).all()):
        low, high = float(original.min()), float(original.max())
        raise UserError(f"images: the originals ({low:.3g} to {high:.3g}) leave [-1, 1]; give uint8, or scale them")
    if not bool(reconstruction.isfinite().all()):
        raise UserError("images: the reconstructions hold NaN or infinity; the network has diverged")
    if original.shape[3] <= 4 < min(original.shape[1:3]):
        raise UserError(f"images: shape {tuple(original.shape)} looks channels last; use .permute(0, 3, 1, 2) on both")
    chunks = zip(reconstruction.split(CHUNK), original.split(CHUNK), strict=True)
    return ((_unit(x), _unit(y)) for x, y in chunks)


def _unit(images: Tensor) -> Tensor:
    x = images.detach().cpu()
    if x.dtype == torch.uint8:
        return x.double() / 255
    if x.is_floating_point():
        return (x.double().clamp(-1, 1) + 1) / 2
    raise UserError(f"images: {x.dtype} is neither uint8 nor float; convert them")
