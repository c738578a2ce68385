"""Reconstruction: images encoded and decoded by a network, as arrays, or as a picture beside the originals."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from onefold import metrics
from onefold.data import open_dataset, read_all
from onefold.data.decode import decode, to_image
from onefold.data.messages import convert_command, shape_text
from onefold.data.source import is_source
from onefold.errors import UserError, reason
from onefold.networks.base import Network, NetworkConfig
from onefold.pictures.grids import encode_decode, pair_grid, save_png
from onefold.training.run import Run

__all__ = ["reconstruct", "write_reconstructions"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST = 30
"""Images of a data source that a picture shows."""


def reconstruct(
    run: Run | Network | str | Path,
    images: np.ndarray | Tensor | str | Path | Sequence[str | Path],
    *,
    batch: int = 256,
) -> UInt8[np.ndarray, "n H W C"]:
    """Encode and decode images.

    Args:
        run: A run, a network, or the folder of either.
        images: uint8 (n, H, W, C), an array or a tensor; or image files; or one data source (folder, .zip, …).
        batch: Images per call of the network; does not change the result but for rounding.

    Returns:
        The reconstructions, in the order of the images.

    Raises:
        UserError: images of another shape or type than the network's, files that cannot be read, or a batch below 1.
    """
    if batch < 1:
        raise UserError(f"batch: {batch} is not positive; give at least 1")
    if not isinstance(cast(object, run), Run | Network | str | Path):
        raise UserError(f"run: {type(run).__name__} is neither a run, a network nor a folder")
    network = run.network if isinstance(run, Run) else run if isinstance(run, Network) else Network.from_pretrained(run)
    if isinstance(images, np.ndarray | Tensor):
        x = _checked(images, network.config)
    else:
        if not isinstance(cast(object, images), str | Path | Sequence):
            raise UserError(f"images: {type(images).__name__} is neither an array nor paths; give uint8 (n, H, W, C)")
        paths = [images] if isinstance(images, str | Path) else images
        x = _read([_path(path) for path in paths], network.config)
    return encode_decode(network, x, batch=batch)


def write_reconstructions(run: str | Path, images: Sequence[Path], out: Path) -> tuple[float, int]:
    """Draw image files, or the first images of one data source, each row above its reconstructions, into a PNG file.

    Returns the mean PSNR in dB and the number of images.

    Raises:
        UserError: no images, one that cannot be read, or one of another size than the network's.
    """
    network = Network.from_pretrained(run)
    x = _read(images, network.config, most=MOST)
    x_hat = encode_decode(network, x)
    pairs = pair_grid(x.permute(0, 2, 3, 1).numpy(), x_hat, columns=min(10, len(x)))
    save_png(out, pairs, {"network": run, "rows": "original, reconstruction, …"})
    return metrics.psnr(torch.from_numpy(x_hat).permute(0, 3, 1, 2), x), len(x)


def _checked(images: np.ndarray | Tensor, config: NetworkConfig) -> UInt8[Tensor, "n C H W"]:
    """An array or tensor (n, H, W, C) as the network takes it.

    Raises:
        UserError: another shape or type.
    """
    wanted = (*config.image_size, config.channels)
    found = tuple(images.shape)
    if len(found) != 4 or found[0] == 0 or found[1:] != wanted:
        shape = f"(n, {', '.join(map(str, wanted))})"
        if found == wanted:
            cure = "put a single image into an array, images[None]"
        elif len(found) == 4 and (*found[2:], found[1]) == wanted:
            cure = "put the channels last"
        else:
            cure = f"give at least one image of {shape_text(wanted)}"
        raise UserError(f"images: shape {found} is not {shape}, which the network takes; {cure}")
    if images.dtype not in (np.uint8, torch.uint8):
        low, high = (f"{float(value):g}" for value in (images.min(), images.max()))
        text = str(images.dtype).removeprefix("torch.")
        raise UserError(f"images: {text} from {low} to {high}, not uint8; scale to 0…255, round, and convert to uint8")
    x = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
    return x.permute(0, 3, 1, 2)


def _path(path: object) -> Path:
    if not isinstance(path, str | Path):
        raise UserError(f"images: {type(path).__name__} is neither an array nor a path; stack images into one array")
    return Path(path)


def _read(images: Sequence[Path], config: NetworkConfig, most: int | None = None) -> UInt8[Tensor, "n C H W"]:
    """Image files, or all images of one data source, or the first `most` of it."""
    if not images:
        raise UserError("images: none were given; name image files or a data source")
    height, width = config.image_size
    wanted = (height, width, config.channels)
    if len(images) == 1 and (is_source(str(images[0]))):
        data = open_dataset(str(images[0]), labels_from="none")  # which could only be in the way
        if data.image_shape != wanted:
            cure = f"make them so: {convert_command(str(images[0]), (height, width))}"
            if data.image_shape[2] != config.channels:
                cure = f"give images of {shape_text(wanted)}"
            found = shape_text(data.image_shape)
            raise UserError(f"{images[0]}: images of {found}, but the network takes {shape_text(wanted)}; {cure}")
        return read_all(data, np.arange(len(data) if most is None else min(most, len(data))))[0]
    if config.channels not in MODES:
        raise UserError(f"{images[0]}: the network takes {shape_text(wanted)}; give them in an .npz file")
    return torch.stack([_read_file(path, MODES[config.channels], height, width) for path in images])


def _read_file(path: Path, mode: str, height: int, width: int) -> UInt8[Tensor, "C H W"]:
    try:
        pixels = decode(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # whatever Pillow raises on broken data
        raise UserError(f"{path}: cannot be read as an image ({reason(error)}); give another") from error
    if pixels.shape[:2] != (height, width):
        found, wanted = (f"{size[0]}×{size[1]}" for size in (pixels.shape, (height, width)))
        cure = f"resize it to {wanted}, as of a folder `{convert_command('FOLDER', (height, width))}` does"
        raise UserError(f"{path}: is {found}, but the network takes {wanted}; {cure}")
    converted = np.array(to_image(pixels).convert(mode)).reshape(height, width, -1)
    return torch.from_numpy(converted).permute(2, 0, 1)
