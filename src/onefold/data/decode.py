"""Encoded bytes to pixels: image files become uint8 arrays of grey, RGB or RGBA.

Every file kind passes here, so an image has the same pixels whether it lies in a folder, a zip or a parquet
file. A camera's orientation is applied, wherever it stands (EXIF, XMP). Of several pictures in a file the first is
taken. One bit becomes grey, grey with alpha becomes RGBA, and so does a PNG with a transparent colour. Palettes
become RGB, transparent entries white. 16 bits a channel become 8: grey is divided by 257 and rounded, of colours
Pillow gives the higher byte; `Header.is_deep` tells. More, or floats, are refused.
"""

import warnings
from importlib.util import find_spec
from io import BytesIO
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from PIL.TiffImagePlugin import TiffImageFile

from onefold.errors import placeholder

Pixels: TypeAlias = UInt8[np.ndarray, "H W C"]
"""One image."""

Shape: TypeAlias = tuple[int, int, int]
"""(H, W, C)."""

# Only these decoders of Pillow ever see foreign bytes: others start programs (EPS), know no signature or are little
# used. AVIF came with Pillow 11.3.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "JPEG2000": (".jp2", ".j2k"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_FORMATS = tuple(name for name in _SUFFIXES if name != "AVIF" or find_spec("PIL.AvifImagePlugin"))

SUFFIXES = frozenset(suffix for name in _FORMATS for suffix in _SUFFIXES[name])

FORMATS_TEXT = ", ".join(_FORMATS[:-1]) + " and " + _FORMATS[-1]
"""What messages say of the formats that are read."""

_BECOMES = {
    **dict.fromkeys(("1", "L", "I;16", "I;16B", "I;16L", "I;16N"), "L"),
    **dict.fromkeys(("P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"),
    **dict.fromkeys(("LA", "La", "PA", "RGBA", "RGBa"), "RGBA"),
}
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}

# The tag of the camera's orientation, what its values mean, and those that exchange height and width.
_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})

# Where a PNG may hold an orientation; behind the pixels, only loading them finds it.
_LATE_CHUNKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")

# The tags of a TIFF's width and height as it is stored, and of its bits per channel.
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS = 256, 257, 258

# Pillow warns of half as many, which is no matter here, and refuses more.
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Files that systems leave in folders of images.
_LITTER = frozenset({"thumbs.db", "desktop.ini"})


class Header(NamedTuple):
    """What the header of an image file tells: the (H, W, C) that `decode` returns, and whether it has 16 bits."""

    shape: Shape
    is_deep: bool


def is_visible(name: str) -> bool:
    """Whether a relative path with forward slashes is neither hidden nor the litter of some system."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.name.lower() not in _LITTER


def is_image(name: str) -> bool:
    """Whether a relative path with forward slashes names an image that is neither hidden nor litter."""
    return is_visible(name) and not name.endswith("/") and PurePosixPath(name).suffix.lower() in SUFFIXES


def decode(data: bytes) -> Pixels:
    """Decode a whole image file to uint8 (H, W, C) with C = 1, 3 or 4.

    Raises whatever Pillow raises on broken data, and ValueError on pixels deeper than 16 bits; `reason` turns
    any of them into words.
    """
    with _open_image(data) as image:
        mode, is_deep = _mode(image), _is_deep(image, data)
        image.load()
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I;16"):
            pixels = _eight_bits(upright)
        else:
            if is_deep and isinstance(colour := upright.info.get("transparency"), tuple):
                upright.info["transparency"] = tuple(value >> 8 for value in colour)
            if mode == "RGB" and "transparency" in upright.info:  # of a palette
                upright = over_white(upright.convert("RGBA"))
            elif upright.mode != mode:
                upright = upright.convert(mode)
            pixels = np.asarray(upright, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def read_header(data: bytes) -> Header:
    """Tell the shape that `decode` would return, from the first bytes of a file alone.

    Raises like `decode`, also when `data` ends before the header does. An orientation behind the pixels of a PNG is
    seen when it is in `data`.
    """
    with _open_image(data) as image:
        mode, is_deep = _mode(image), _is_deep(image, data)
        width, height = image.size
        if isinstance(image, TiffImageFile):  # of which Pillow exchanges the sides itself, when depends on its version
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        late = image.format == "PNG" and any(chunk in data for chunk in _LATE_CHUNKS)
        # PNG's own getexif decodes the pixels if the header has none.
        exif = image.getexif() if late else Image.Image.getexif(image)
        if exif.get(_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        return Header((height, width, _CHANNELS[mode]), is_deep)


def to_image(pixels: Pixels) -> Image.Image:
    """Make a Pillow image of uint8 (H, W, C) with C = 1, 3 or 4."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def over_white(image: Image.Image) -> Image.Image:
    """Lay an RGBA image on white paper: RGB. (Dropping alpha would show the colours hidden beneath it.)"""
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image).convert("RGB")


def _open_image(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
        if image.width * image.height > _MOST_PIXELS:  # where somebody has told Pillow to open everything
            raise Image.DecompressionBombError
        return image
    except Image.DecompressionBombError as error:  # a small file that fills the memory
        cure = f"reduce it to {_MOST_PIXELS // 1_000_000:,} million or fewer"
        raise ValueError(f"an image of too many pixels to be opened; {cure}") from error
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        if (what := placeholder(data[:512])) is not None:
            raise ValueError(what) from error
        raise UnidentifiedImageError(f"not a {FORMATS_TEXT.replace(' and ', ' or ')} image") from error


def _mode(image: Image.Image) -> str:
    """Give the mode, "L", "RGB" or "RGBA", in which an image of this file is returned."""
    if image.mode not in _BECOMES:
        raise ValueError(f"more than 16 bits per channel (mode {image.mode}); save it with 8 or 16")
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        return "RGBA"
    if image.format == "GIF":  # whose grey is a palette
        return "RGB" if "transparency" in image.info else _BECOMES[image.mode]
    return _BECOMES[image.mode]


def _is_deep(image: Image.Image, data: bytes) -> bool:
    if image.mode.startswith("I;16"):
        return True
    if image.format == "PNG":
        return data[24:25] == b"\x10"  # the bit depth, in the first chunk
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(_TIFF_BITS, (1,))) > 8
    return False


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Make 8 bits of a grey image with 16, (H, W); or of one with a transparent level, (H, W, 4)."""
    levels = np.asarray(image).astype(np.uint32)
    grey = ((levels + 128) // 257).astype(np.uint8)
    level = image.info.get("transparency")
    if level is not None:
        return np.dstack([grey, grey, grey, np.where(levels == level, 0, 255).astype(np.uint8)])
    return grey
