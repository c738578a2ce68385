"""Pixels: uint8 and back, grids, PNG files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image

from onefold.pictures.grids import grid, save_png
from onefold.pixels import to_float, to_uint8


def test_all_values_survive():
    x = torch.arange(256, dtype=torch.uint8)
    floats = to_float(x)
    assert floats.dtype == torch.float32
    assert (floats[0], floats[-1]) == (-1, 1)
    assert torch.equal(floats.diff() > 0, torch.ones(255, dtype=torch.bool))
    assert torch.equal(to_uint8(floats), x)


@given(st.floats(-0.49, 0.49), st.integers(1, 254))
def test_values_between_are_rounded(offset: float, level: int):
    x = torch.tensor([(level + offset) / 127.5 - 1])
    assert to_uint8(x).item() == level
    assert to_uint8(x.double()).item() == level


def test_values_beyond_are_clamped():
    x = torch.tensor([[-5.0, -1.001, 1.001, 7.0, float("inf"), float("-inf")]])
    assert to_uint8(x).tolist() == [[0, 0, 255, 255, 255, 0]]


def test_low_precision_is_rounded_once():
    x = to_float(torch.arange(256, dtype=torch.uint8)).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_kinds_of_numbers_are_checked_in_tests():
    for call in (lambda: to_uint8(torch.zeros(2, dtype=torch.uint8)), lambda: to_float(torch.zeros(2))):
        with pytest.raises(TypeCheckError):
            call()


# --- grids ---


def images(n: int, height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
@pytest.mark.parametrize(("columns", "scale", "gap"), [(3, 1, 1), (2, 3, 0), (7, 2, 4)])
def test_grid_is_row_by_row_on_white(n: int, columns: int, scale: int, gap: int):
    x = images(n, 3, 5, 2)
    sheet = grid(x, columns=columns, scale=scale, gap=gap)
    rows = -(-n // columns)
    assert sheet.shape == (rows * (3 * scale + gap) + gap, columns * (5 * scale + gap) + gap, 2)
    assert sheet.dtype == np.uint8
    seen = np.zeros(sheet.shape[:2], dtype=bool)
    for k in range(n):
        top, left = gap + k // columns * (3 * scale + gap), gap + k % columns * (5 * scale + gap)
        area = slice(top, top + 3 * scale), slice(left, left + 5 * scale)
        assert np.array_equal(sheet[area], np.kron(x[k], np.ones((scale, scale, 1), dtype=np.uint8)))
        assert not seen[area].any()
        seen[area] = True
    assert (sheet[~seen] == 255).all()


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_grid_is_about_square_by_default(n: int, columns: int):
    sheet = grid(images(n, 64, 64, 1))
    assert sheet.shape == (-(-n // columns) * 65 + 1, columns * 65 + 1, 1)


@pytest.mark.parametrize(("size", "shown"), [(8, 48), (20, 40), (47, 47), (64, 64)])
def test_small_images_are_enlarged_by_default(size: int, shown: int):
    assert grid(images(1, size, size // 2, 1)).shape == (shown + 2, size // 2 * (shown // size) + 2, 1)


# --- PNG ---


@pytest.mark.parametrize(
    ("channels", "mode", "kept"), [(1, "L", 1), (2, "L", 1), (3, "RGB", 3), (4, "RGBA", 4), (6, "RGB", 3)]
)
def test_png_holds_the_pixels_and_their_origin(tmp_path: Path, channels: int, mode: str, kept: int):
    x, path = images(1, 5, 7, channels)[0], tmp_path / "a" / "b.png"
    save_png(path, x, {"seed": 3, "class": "größer 7", "labels": [1, 2]})
    with Image.open(path) as file:
        assert file.format == "PNG"
        assert file.mode == mode
        assert np.array_equal(np.asarray(file).reshape(5, 7, -1), x[..., :kept])
        assert file.text == {"seed": "3", "class": "größer 7", "labels": "[1, 2]"}


def test_png_without_metadata_and_of_a_view(tmp_path: Path):
    x = images(1, 6, 8, 3)[0]
    save_png(tmp_path / "x.png", x[::2, ::-1])
    with Image.open(tmp_path / "x.png") as file:
        assert np.array_equal(np.asarray(file), x[::2, ::-1])
        assert file.text == {}
