"""Grids of images, PNG files with their origin as metadata, and the two grids that a run draws of its network.

Samples have fixed seeds; test images are shown above their reconstructions.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from onefold.errors import UserError, printable, writing
from onefold.networks.base import Network
from onefold.pixels import to_float, to_uint8

__all__ = ["SAMPLES", "encode_decode", "grid", "pair_grid", "png_bytes", "sample_grid", "save_grids", "save_png"]

SAMPLES = 50
"""Samples in each picture of a training."""


def grid(
    images: UInt8[np.ndarray, "n H W C"],
    *,
    columns: int | None = None,
    scale: int | None = None,
    gap: int = 1,
) -> UInt8[np.ndarray, "rows columns C"]:
    """Lay out images row by row on a white background, each pixel enlarged `scale` times.

    By default the grid is roughly square and small images are enlarged to about 48 pixels.
    """
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    scale = scale or max(1, 48 // max(height, width))
    cell_height, cell_width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, channels), 255, np.uint8)
    for k, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = gap + (k // columns) * cell_height, gap + (k % columns) * cell_width
        sheet[top : top + height * scale, left : left + width * scale] = image
    return sheet


def save_png(path: Path, image: UInt8[np.ndarray, "H W C"], metadata: Mapping[str, object] | None = None) -> None:
    """Write one image with text metadata; see `png_bytes`.

    Raises a UserError if the name does not end in .png or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: is not the name of a PNG file; end it with .png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image, metadata))


def png_bytes(image: UInt8[np.ndarray, "H W C"], metadata: Mapping[str, object] | None = None) -> bytes:
    """A PNG file with text metadata. Of two channels the first is shown, of more than four the first three."""
    info, file = PngInfo(), BytesIO()
    for key, value in (metadata or {}).items():
        info.add_text(key, printable(value))
    Image.fromarray(_shown(image)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def _shown(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W *C"]:
    """The channels that a picture has room for."""
    channels = image.shape[2]
    return np.ascontiguousarray(image[..., 0] if channels < 3 else image if channels == 4 else image[..., :3])


def pair_grid(
    above: UInt8[np.ndarray, "n H W C"], below: UInt8[np.ndarray, "n H W C"], *, columns: int
) -> UInt8[np.ndarray, "rows columns C"]:
    """A grid with each row of `above` over the matching row of `below`."""
    rows = [part[k : k + columns] for k in range(0, len(above), columns) for part in (above, below)]
    blank = np.full((columns, *above.shape[1:]), 255, np.uint8)
    return grid(np.concatenate([np.concatenate([row, blank[len(row) :]]) for row in rows]), columns=columns)


@torch.no_grad()
def encode_decode(network: Network, x: UInt8[Tensor, "n C H W"], *, batch: int = 256) -> UInt8[np.ndarray, "n H W C"]:
    """Encode and decode uint8 images; `batch` affects only memory."""
    parts = (to_float(part.to(network.device)) for part in x.split(batch))  # one at a time: as floats they are large
    x_hat = torch.cat([to_uint8(network.decode(network.encode(part))).cpu() for part in parts])
    return x_hat.permute(0, 2, 3, 1).numpy()


def sample_grid(network: Network, path: Path, *, count: int, seed: int = 0, columns: int | None = None) -> None:
    """Write a grid of the images with seeds `seed` … `seed + count − 1`, sampled with the network's sampler."""
    images = network.sample(count, seed=seed)
    classes, sampler = network.config.classes, network.sampler
    labels = f"(seed + k) mod {classes}" if classes else "none"
    save_png(
        path,
        grid(images, columns=columns),
        {
            "seeds": f"{seed}…{seed + count - 1}",
            "labels": labels,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
        },
    )


def save_grids(network: Network, test: UInt8[Tensor, "n C H W"], folder: Path, images: int) -> None:
    """Write `samples/<images>.png` and `…-reconstructions.png`, with each row of images above its reconstructions."""
    columns = 10
    sample_grid(network, folder / "samples" / f"{images:09d}.png", count=SAMPLES, columns=columns)
    shown = test[: 3 * columns]
    pairs = pair_grid(shown.permute(0, 2, 3, 1).cpu().numpy(), encode_decode(network, shown), columns=columns)
    save_png(folder / "samples" / f"{images:09d}-reconstructions.png", pairs)
