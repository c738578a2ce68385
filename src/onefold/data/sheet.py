"""A contact sheet: many images of a source at one glance, whatever their sizes."""

import math
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

from PIL import Image

from onefold.data.decode import over_white, to_image
from onefold.data.listing import Unreadable, spread
from onefold.data.parallel import each
from onefold.data.source import list_source
from onefold.errors import UserError

_MOST = 100
_GAP = 2

# Tiles are enlarged or reduced to about these sides: 8×8 digits stay visible, photographs do not fill a wall.
_SMALLEST, _LARGEST = 64, 256


def contact_sheet(source: str | Path, count: int = 64) -> tuple[Image.Image, tuple[str, ...]]:
    """Draw `count` images (at most 100), evenly spread over a source, on one RGB sheet.

    Each fills its tile as far as its aspect ratio allows. Of images with other channels than grey, RGB or RGBA the
    first channel is drawn. Also gives the names of those images that cannot be read and so are left out.

    Raises UserError when `count` is less than 1, when the source cannot be opened, and when none can be read.
    """
    if count < 1:
        raise UserError(f"a contact sheet of {count} images: draw at least 1")
    listing = list_source(source)
    chosen = spread(len(listing), min(count, _MOST))
    sizes: list[tuple[int, int]] = []
    for index in chosen:
        with suppress(Unreadable):
            sizes.append(listing.shape(index)[:2])
    # Not rounded yet: images of one size then fill their tile to the pixel.
    tile_height = max((height * _scale(height, width) for height, width in sizes), default=Fraction(1))
    tile_width = max((width * _scale(height, width) for height, width in sizes), default=Fraction(1))

    def draw(index: int) -> Image.Image | None:
        try:
            pixels = listing.image(index)
        except Unreadable:
            return None
        image = to_image(pixels if pixels.shape[2] in (1, 3, 4) else pixels[:, :, :1])
        image = over_white(image) if image.mode == "RGBA" else image.convert("RGB")
        scale = min(tile_width / image.width, tile_height / image.height)
        whole = scale > 1 and scale.denominator == 1
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)

    drawn = dict(zip(chosen, each(draw, chosen, chunk=1), strict=True))
    images = [image for image in drawn.values() if image is not None]
    if not images:
        raise UserError(f"{listing.source}: none of the images drawn can be read; check the files")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(1, round(tile_width)), max(1, round(tile_height))
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        left = _GAP + column * (width + _GAP) + (width - image.width) // 2
        top = _GAP + row * (height + _GAP) + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet, tuple(listing.names[index] for index, image in drawn.items() if image is None)


def _scale(height: int, width: int) -> Fraction:
    """What an image is enlarged by, a whole number, or reduced by, when all images are like it."""
    longer = max(height, width)
    if longer < _SMALLEST:
        return Fraction(math.ceil(_SMALLEST / longer))
    return min(Fraction(1), Fraction(_LARGEST, longer))
