"""Encoded bytes to pixels: JPEG, PNG, WebP and BMP become uint8 arrays of grey, RGB or RGBA.

Every file kind passes here, so an image has the same pixels whether it lies in a folder, a zip or a parquet
file. Camera orientation (EXIF) is applied. Palettes become RGB, one bit becomes grey, grey with alpha becomes
RGBA. More than 8 bits a channel would lose information silently, so it is refused.
"""

from io import BytesIO
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels: TypeAlias = UInt8[np.ndarray, "H W C"]
"""One image."""

Shape: TypeAlias = tuple[int, int, int]
"""(H, W, C)."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

# Only these decoders ever see foreign bytes: Pillow has others that start programs (EPS) or are little used.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

_BECOMES = {
    **dict.fromkeys(("1", "L"), "L"),
    **dict.fromkeys(("P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"),
    **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), "RGBA"),
}
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}

# The tag of the camera's orientation, and its values that exchange height and width.
_ORIENTATION = 0x0112
_SIDEWAYS = frozenset({5, 6, 7, 8})


def is_image(name: str) -> bool:
    """Whether a relative path with forward slashes names an image that is neither hidden nor macOS litter."""
    path = PurePosixPath(name)
    visible = not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return visible and path.suffix.lower() in SUFFIXES


def decode(data: bytes) -> Pixels:
    """Decode a whole image file to uint8 (H, W, C) with C = 1, 3 or 4.

    Raises whatever Pillow raises on broken data, and ValueError on pixels deeper than 8 bits; `reason` turns
    any of them into words.
    """
    with _open_image(data) as image:
        mode = _mode(image)
        upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
        if upright.mode == "P" and "transparency" in upright.info:
            upright = over_white(upright.convert("RGBA"))
        elif upright.mode != mode:
            upright = upright.convert(mode)
        pixels = np.asarray(upright, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def header_shape(data: bytes) -> Shape:
    """Give the (H, W, C) that `decode` would return, from the first bytes of a file alone.

    Raises like `decode`, also when `data` ends before the header does.
    """
    with _open_image(data) as image:
        width, height = image.size
        if "exif" in image.info and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        return height, width, _CHANNELS[_mode(image)]


def to_image(pixels: Pixels) -> Image.Image:
    """Make a Pillow image of uint8 (H, W, C) with C = 1, 3 or 4."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def over_white(image: Image.Image) -> Image.Image:
    """Lay an RGBA image on white paper: RGB. (Dropping alpha would show the colours hidden beneath it.)"""
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def reason(error: Exception) -> str:
    """Say in a few words, on one line, why reading or decoding failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _open_image(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise UnidentifiedImageError("not a JPEG, PNG, WebP or BMP image") from error


def _mode(image: Image.Image) -> str:
    """Give the mode, "L", "RGB" or "RGBA", in which an image of this file is returned."""
    if image.mode not in _BECOMES:
        raise ValueError(f"more than 8 bits per channel (mode {image.mode}); save it with 8")
    return _BECOMES[image.mode]
