"""trackio: a dashboard without an account. It keeps its data on this machine; watch them with `trackio show`."""

import contextlib
import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onefold import settings
from onefold.loggers.logger import Logger
from onefold.training.run import Run

__all__ = ["Trackio"]


class Trackio(Logger):
    """The project is `onefold`, the run's name that of its folder and the id of its series."""

    name = "trackio"

    def view(self, folder: Path) -> str:
        return "`trackio show --project onefold` shows it"

    def begin(self, run: Run, folder: Path, identity: str, images: int) -> None:
        self.trackio: Any = importlib.import_module("trackio")
        if self.run is not None:  # it has no way to take back what was logged
            return
        name = f"{run.folder.resolve().name}-{identity}"
        config = json.loads(settings.to_json(run.config))
        with contextlib.redirect_stdout(io.StringIO()):
            self.series = self.trackio.init(project="onefold", name=name, config=config, resume="allow", embed=False)

    def write(self, values: Mapping[str, float], images: int) -> None:
        self.series.log(dict(values), step=images)

    def alarm(self, text: str, images: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # which the training says itself
            self.series.alert("alarm", f"at {images:,} images: {text}")

    def picture(self, name: str, path: Path, images: int) -> None:
        self.series.log({name: self.trackio.Image(str(path))}, step=images)

    def histograms(self, values: Mapping[str, np.ndarray], images: int) -> None:
        shown = {name: self.trackio.Histogram(value) for name, value in values.items()}
        self.series.log(shown, step=images)

    def end(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()
