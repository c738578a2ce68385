"""An image from outside, as a network takes it: bounded in bytes and pixels, cropped at its centre, and resized."""

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from onefold.data.decode import decode, over_white, read_header, to_image
from onefold.errors import UserError, reason
from onefold.networks.base import NetworkConfig
from onefold.reconstruction import MODES
from onefold.web.schema import MOST_PIXELS

__all__ = ["fitted"]


def fitted(data: bytes, config: NetworkConfig) -> UInt8[Tensor, "1 C H W"]:
    """The image in a file's bytes, in the size and with the channels of a network.

    Raises:
        UserError: no image, one of too many pixels, or a network whose images no file holds.
    """
    if config.channels not in MODES:
        raise UserError(f"image: the network takes {config.channels} channels, which no image file has")
    try:
        height, width, _ = read_header(data).shape
        if height * width > MOST_PIXELS:
            most = f"reduce it to {MOST_PIXELS // 1_000_000} million"
            raise UserError(f"image: {height}×{width} are too many pixels; {most}")
        image = to_image(decode(data))
    except UserError:
        raise
    except Exception as error:  # whatever Pillow raises on broken data
        raise UserError(f"image: cannot be read ({reason(error)}); send another file") from error
    mode = MODES[config.channels]
    if image.mode == "RGBA" and mode != "RGBA":
        image = over_white(image)
    height, width = config.image_size
    image = ImageOps.fit(image.convert(mode), (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image).reshape(1, height, width, -1)).permute(0, 3, 1, 2)
