"""Reconstruction of image files: the originals above, what encoding and decoding makes of them below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onefold import metrics
from onefold.data import open_dataset, read_all
from onefold.data.decode import decode, to_image
from onefold.data.messages import channels_text, convert_command, shape_text
from onefold.data.source import is_source
from onefold.errors import UserError, reason
from onefold.networks.base import Network, NetworkConfig
from onefold.pictures.grids import reconstructions
from onefold.pixels import grid, save_png

__all__ = ["reconstruct_files"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST = 30


def reconstruct_files(run: str | Path, images: Sequence[Path], out: Path) -> tuple[float, int]:
    """Reconstruct image files, or the first images of one data source, into a picture of pairs of rows.

    Returns the mean PSNR in dB and the number of images.

    Raises:
        UserError: no images, one that cannot be read, or one of another size than the network's.
    """
    network = Network.from_pretrained(run)
    given = _read(images, network.config)
    made = reconstructions(network, given)
    original = given.permute(0, 2, 3, 1).numpy()
    columns = min(10, len(given))
    rows = [part[k : k + columns] for k in range(0, len(given), columns) for part in (original, made)]
    blank = np.full((columns, *original.shape[1:]), 255, np.uint8)
    sheet = np.concatenate([np.concatenate([row, blank[len(row) :]]) for row in rows])
    save_png(out, grid(sheet, columns=columns), {"network": run, "rows": "original, reconstruction, …"})
    return metrics.psnr(torch.from_numpy(made).permute(0, 3, 1, 2), given), len(given)


def _read(images: Sequence[Path], config: NetworkConfig) -> Tensor:
    if not images:
        raise UserError("images: none were given; name image files or a data source")
    height, width = config.image_size
    if len(images) == 1 and (is_source(str(images[0]))):
        data = open_dataset(str(images[0]))
        if data.image_shape != (height, width, config.channels):
            wanted = (height, width, config.channels)
            cure = f"make them so: {convert_command(str(images[0]), (height, width))}"
            if data.image_shape[2] != config.channels:
                cure = f"give images of {channels_text(config.channels)}"
            found = shape_text(data.image_shape)
            raise UserError(f"{images[0]}: images of {found}, but the network takes {shape_text(wanted)}; {cure}")
        return read_all(data, np.arange(min(MOST, len(data))))[0]
    if config.channels not in MODES:
        raise UserError(f"{images[0]}: the network takes {config.channels} channels; give an .npz file instead")
    return torch.stack([_read_one(path, MODES[config.channels], height, width) for path in images])


def _read_one(path: Path, mode: str, height: int, width: int) -> Tensor:
    try:
        pixels = decode(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # whatever Pillow raises on broken data
        raise UserError(f"{path}: cannot be read as an image ({reason(error)}); give another") from error
    if pixels.shape[:2] != (height, width):
        raise UserError(
            f"{path}: is {pixels.shape[0]}×{pixels.shape[1]}, but the network takes {height}×{width}; resize it first"
        )
    converted = np.array(to_image(pixels).convert(mode)).reshape(height, width, -1)
    return torch.from_numpy(converted).permute(2, 0, 1)
