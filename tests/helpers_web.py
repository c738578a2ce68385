"""A real run, and the one-step run made of it, to be served."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conftest import randomised
from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold.training.loop import train
from onefold.training.run import load_run


def make_runs(folder: Path) -> tuple[Path, Path]:
    """Folders of a plain run with pictures and health, and of a one-step run; their networks' weights are random."""
    plain, fast = folder / "plain", folder / "fast"
    changes = {"training__sample_every": 80, "training__health_every": 64}
    train(tiny(**changes), plain, quiet=True)
    train(one_step_from(plain, training__sample_every=80), fast, quiet=True)
    for run in (plain, fast):  # after ten steps images hardly differ, and a test would see nothing
        publish(run, seed=1)
    return plain, fast


def publish(run: Path, seed: int) -> None:
    """Replace a run's published network by one of random weights, as training does."""
    network = randomised(load_run(run).network, seed)
    network.save_pretrained(run / "new")
    for path in (run / "new").iterdir():
        path.replace(run / "model" / path.name)
    (run / "new").rmdir()


def pixels(png: str | bytes) -> np.ndarray:
    """An answer's image, (H, W, C)."""
    with Image.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else png)) as image:
        found = np.array(image)
    return found if found.ndim == 3 else found[..., None]


def stacked(answer: dict[str, Any]) -> np.ndarray:
    """The images of an answer, (n, H, W, C)."""
    return np.stack([pixels(image["png"]) for image in answer["images"]])


def png(image: np.ndarray) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="PNG")
    return file.getvalue()
