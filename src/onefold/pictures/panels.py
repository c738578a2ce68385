"""Grids of images side by side, each under its title, in one picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from onefold.errors import writing
from onefold.pictures.grids import grid
from onefold.pictures.style import STYLE

__all__ = ["write"]


def write(
    path: Path, panels: Sequence[tuple[str, UInt8[np.ndarray, "n H W C"]]], *, columns: int = 10, width: float = 3.6
) -> None:
    """Draw panels of (title, images) into a PNG file; `columns` images per row, each panel `width` inches wide.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sheets = [grid(images, columns=columns) for _, images in panels]
    height = max(width * sheet.shape[0] / sheet.shape[1] for sheet in sheets)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * len(panels), height + 0.45), dpi=110, layout="constrained")
        for k, ((title, _), sheet) in enumerate(zip(panels, sheets, strict=True)):
            ax = figure.add_subplot(1, len(panels), k + 1)
            ax.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255)
            ax.set_title(title)
            ax.axis("off")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
