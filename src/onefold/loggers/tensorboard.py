"""TensorBoard: event files in RUN/tensorboard. Watch them with `tensorboard --logdir runs`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from onefold import settings
from onefold.errors import quoted
from onefold.loggers.logger import Logger
from onefold.training.run import Run

__all__ = ["TensorBoard"]


class TensorBoard(Logger):
    """Scalars, pictures, histograms; alarms and the configuration as text."""

    name = "tensorboard"

    def view(self, folder: Path) -> str:
        return f"`tensorboard --logdir {quoted(folder)}` shows it"

    def begin(self, run: Run, folder: Path, identity: str, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self.run is not None:
            self.writer.close()
        # Readers drop what the folder holds from this step on.
        self.writer = SummaryWriter(folder, purge_step=images + 1 if images >= 0 else None)
        if images < 0:
            self.writer.add_text("config", f"```json\n{settings.to_json(run.config)}```", 0)

    def write(self, values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images)
        self.writer.flush()

    def alarm(self, text: str, images: int) -> None:
        self.writer.add_text("alarm", text, images)

    def picture(self, name: str, path: Path, images: int) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), images, dataformats="HWC")
        self.writer.flush()

    def histograms(self, values: Mapping[str, np.ndarray], images: int) -> None:
        for name, value in values.items():
            if np.isfinite(value).all():
                self.writer.add_histogram(name, value, images)
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()
