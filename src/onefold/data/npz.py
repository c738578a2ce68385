"""Arrays of images in a .npz file: any number of channels, with or without labels.

`images` is uint8 (n, H, W, C) or (n, H, W); `labels` is optional: n integers or words. Also understood:
`x` and `y`, and the names that `numpy.savez` gives to arrays without one. Nothing is ever unpickled.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onefold.data.listing import ArrayListing, list_arrays
from onefold.errors import UserError

_IMAGES = ("images", "x", "arr_0")
_LABELS = ("labels", "y", "arr_1")


def list_npz(source: str, path: Path) -> ArrayListing:
    """Read the arrays. Raises UserError when they are missing, not uint8, or of shapes that do not fit."""
    images, values = _load(source, path)
    return list_arrays(source, images, values)


def _load(source: str, path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = list(file.files)
            image_key = next((key for key in _IMAGES if key in arrays), None)
            label_key = next((key for key in _LABELS if key in arrays), None)
            if image_key is not None:
                return file[image_key], None if label_key is None else file[label_key]
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{source}: not a .npz file of plain arrays; write it with numpy.savez") from error
    found = ", ".join(arrays) or "none"
    raise UserError(f"{source}: holds no array named images (found: {found}); rename the one that is meant")
