"""PSNR and SSIM against closed forms and torchmetrics."""

import math

import pytest
import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.reconstruction import image_psnr, image_ssim, psnr, ssim


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return (noise(seed, *shape) * 127.5 + 127.5).round().to(torch.uint8)


def test_psnr_of_a_constant_error():
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x + 0.2, x) == pytest.approx(20, abs=1e-5)  # 20 log10(2 / 0.2)
    levels = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    assert psnr(levels + 5, levels) == pytest.approx(20 * math.log10(255 / 5))


def test_psnr_is_the_mean_of_values_and_not_the_value_of_the_mean():
    x = torch.zeros(2, 1, 4, 4)
    y = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.02)])
    assert image_psnr(y, x).tolist() == pytest.approx([20, 40], abs=1e-5)
    assert psnr(y, x) == pytest.approx(30, abs=1e-5)


def test_identical_images_count_100_decibels():
    x = pictures(2, 1, 8, 8)
    assert psnr(x, x) == 100
    assert psnr(x.float() / 127.5 - 1, x) == 100  # float32 rounding is no error


def test_bytes_and_floats_are_the_same_images():
    x, y = pictures(3, 3, 16, 16), pictures(3, 3, 16, 16, seed=1)
    float_x, float_y = x / 127.5 - 1, y / 127.5 - 1
    assert psnr(float_y, float_x) == pytest.approx(psnr(y, x), rel=1e-6)
    assert ssim(float_y, float_x) == pytest.approx(ssim(y, x), rel=1e-5)


def test_an_overshoot_is_clamped_as_a_file_would_be():
    x = torch.ones(1, 1, 8, 8)
    assert psnr(x * 1.5, x) == 100


@pytest.mark.parametrize("channels", [1, 3])
def test_agree_with_torchmetrics(channels: int):
    image = pytest.importorskip("torchmetrics.functional.image")
    x = pictures(4, channels, 32, 24)
    y = (x.float() + 40 * noise(1, *x.shape)).round().clamp(0, 255).to(torch.uint8)
    a, b = y.double() / 255, x.double() / 255
    theirs = image.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(image_psnr(y, x), theirs)
    # They also average over windows that hang over the border, filled by reflection; Wang et al. do not.
    _, everywhere = image.structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    theirs = everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(image_ssim(y, x), theirs)


def test_ssim_of_two_flat_images():
    x, y = torch.full((1, 1, 16, 16), 0.0), torch.full((1, 1, 16, 16), 1.0)  # 0.5 and 1 in [0, 1]
    assert ssim(x, y) == pytest.approx((2 * 0.5 * 1 + 1e-4) / (0.25 + 1 + 1e-4))
    assert ssim(x, x) == pytest.approx(1)


def test_ssim_knows_anticorrelation():
    x = noise(0, 1, 1, 32, 32)
    assert ssim(-x, x) < -0.5


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 9), (2, 5), (1, 1), (11, 12)])
def test_small_images_take_a_smaller_window(h: int, w: int):
    x = noise(0, 2, 1, h, w)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(0.5 * x, x) < 1


def test_the_window_of_8_by_8_is_the_gaussian_of_7_by_7():
    x, y = noise(0, 1, 1, 8, 8).double() / 2 + 0.5, noise(1, 1, 1, 8, 8).double() / 2 + 0.5
    line = torch.exp(-(torch.arange(-3.0, 4).double() ** 2) / (2 * 1.5**2))
    w = torch.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(2):
        for j in range(2):
            a, b = x[0, 0, i : i + 7, j : j + 7], y[0, 0, i : i + 7, j : j + 7]
            mean_a, mean_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mean_a) ** 2).sum(), (w * (b - mean_b) ** 2).sum()
            cov = (w * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    assert ssim(2 * x - 1, 2 * y - 1) == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)


def test_each_image_alone_has_the_value_it_has_in_company():
    x, y = noise(0, 300, 1, 12, 12), noise(1, 300, 1, 12, 12)  # more than one chunk
    torch.testing.assert_close(
        image_ssim(y, x)[[0, 299]], torch.cat([image_ssim(y[i : i + 1], x[i : i + 1]) for i in (0, 299)])
    )
    assert image_psnr(y, x)[299] == image_psnr(y[299:], x[299:])


def test_wrong_images_are_one_line():
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(UserError, match="are not one"):
        psnr(x, x[:1])
    with pytest.raises(UserError, match="leave"):
        psnr(x, x + 200)
    with pytest.raises(UserError, match="diverged"):
        psnr(x * torch.nan, x)
    with pytest.raises(UserError, match="neither uint8 nor float"):
        ssim(x.long(), x)
