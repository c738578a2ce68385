"""Pictures along a run: samples of fixed seeds, and test images above their reconstructions."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from onefold.networks.base import Network
from onefold.pixels import grid, save_png, to_float, to_uint8

__all__ = ["reconstructions", "sample_grid", "save_grids"]


@torch.no_grad()
def reconstructions(network: Network, x: UInt8[Tensor, "n C H W"]) -> UInt8[np.ndarray, "n H W C"]:
    """Encode and decode uint8 images."""
    x_hat = network.decode(network.encode(to_float(x.to(network.device))))
    return to_uint8(x_hat).permute(0, 2, 3, 1).cpu().numpy()


def sample_grid(network: Network, path: Path, *, count: int, seed: int = 0, columns: int | None = None) -> None:
    """Write a grid of the images with seeds `seed` … `seed + count − 1`, sampled as the network's sampler says."""
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
    """Write `samples/<images>.png` and `…-reconstructions.png`, where each row of images stands above its own."""
    columns = 10
    sample_grid(network, folder / "samples" / f"{images:09d}.png", count=50, columns=columns)
    shown = test[: 3 * columns]
    made = reconstructions(network, shown)
    given = shown.permute(0, 2, 3, 1).cpu().numpy()
    rows = [half[k : k + columns] for k in range(0, len(shown), columns) for half in (given, made)]
    sheet = np.concatenate([_filled(row, columns) for row in rows])
    save_png(folder / "samples" / f"{images:09d}-reconstructions.png", grid(sheet, columns=columns))


def _filled(row: np.ndarray, columns: int) -> np.ndarray:
    blank = np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)
    return np.concatenate([row, blank])
