"""A contact sheet: many images of a data set at one glance."""

import math

from PIL import Image

from onefold.data.dataset import Dataset
from onefold.data.decode import over_white, to_image
from onefold.data.pictures import spread
from onefold.errors import UserError

_MOST = 100
_GAP = 2

# Tiles are enlarged or reduced to about these sides: 8×8 digits stay visible, photographs do not fill a wall.
_SMALLEST, _LARGEST = 64, 256


def contact_sheet(dataset: Dataset, count: int = 64) -> Image.Image:
    """Draw `count` images (at most 100), evenly spread over a data set, on one RGB sheet.

    Of images with other channels than grey, RGB or RGBA the first channel is drawn. Raises UserError when
    `count` is less than 1 or an image cannot be read.
    """
    if count < 1:
        raise UserError(f"a contact sheet of {count} images: draw at least 1")
    chosen = spread(len(dataset), min(count, _MOST))
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    height, width = dataset.image_shape[:2]
    longer = max(height, width)
    scale = math.ceil(_SMALLEST / longer) if longer < _SMALLEST else min(1, _LARGEST / longer)
    tile = max(1, round(width * scale)), max(1, round(height * scale))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    size = columns * (tile[0] + _GAP) + _GAP, rows * (tile[1] + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    for place, index in enumerate(chosen):
        pixels = dataset[index][0]
        image = to_image(pixels if pixels.shape[2] in (1, 3, 4) else pixels[:, :, :1])
        image = over_white(image) if image.mode == "RGBA" else image.convert("RGB")
        row, column = divmod(place, columns)
        corner = _GAP + column * (tile[0] + _GAP), _GAP + row * (tile[1] + _GAP)
        sheet.paste(image.resize(tile, method), corner)
    return sheet
