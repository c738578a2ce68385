"""Weights & Biases. Needs `wandb login`, or WANDB_MODE=offline, with which the log stays in RUN/wandb."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onefold import settings
from onefold.errors import UserError
from onefold.loggers.logger import Logger
from onefold.training.run import Run

__all__ = ["WandB"]


class WandB(Logger):
    """The project is $WANDB_PROJECT or `onefold`, the run's name that of its folder.

    Steps only rise there: what a resumed run repeats is dropped.
    """

    name = "wandb"

    def __init__(self) -> None:
        super().__init__()
        self.wandb: Any = importlib.import_module("wandb")
        self.online = self.wandb.setup().settings.mode in ("online", "shared")
        if self.online and not self.wandb.login(prompt=False, verify=False):
            raise UserError("--log wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")

    def view(self, folder: Path) -> str:
        place = self.wandb.setup().settings.project or "onefold"
        return f"the project {place} of your account shows it" if self.online else f"kept in {folder / 'wandb'}"

    def begin(self, run: Run, folder: Path, identity: str, images: int) -> None:
        if self.run is not None:
            return
        own = self.wandb.setup().settings
        self.series = self.wandb.init(
            project=own.project or "onefold",
            name=own.run_name or run.folder.resolve().name,
            id=identity,
            resume="allow",
            dir=str(run.folder),
            config=json.loads(settings.to_json(run.config)),
            settings=self.wandb.Settings(console="off", silent=True),
        )

    def write(self, values: Mapping[str, float], images: int) -> None:
        self.series.log(dict(values), step=images)

    def alarm(self, text: str, images: int) -> None:
        self.series.alert("alarm", f"at {images:,} images: {text}")

    def picture(self, name: str, path: Path, images: int) -> None:
        self.series.log({name: self.wandb.Image(str(path), caption=f"{images:,} images")}, step=images)

    def histograms(self, values: Mapping[str, np.ndarray], images: int) -> None:
        shown = {name: self.wandb.Histogram(value) for name, value in values.items() if np.isfinite(value).all()}
        self.series.log(shown, step=images)

    def end(self) -> None:
        self.series.finish()
