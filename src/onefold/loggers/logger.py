"""What every logger does: hand over the lines of the log, new pictures, and histograms at each checkpoint.

    line        each number under its name in `log.jsonl`: train/denoising, health/psnr, onestep/auc/2
    pictures    samples and reconstructions, as drawn into RUN/samples
    histograms  of the published weights (weights/…) and of their latents of test images (latents)

The step is the number of images seen. A logger leaves a folder in the run, RUN/<its name>, by which a run that is
resumed goes on with the series that it began. In a run that it did not follow from the beginning, it begins with all of
the log.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from onefold.compute import resolve_device
from onefold.data import read_all
from onefold.errors import UserError
from onefold.files import write_whole
from onefold.pixels import to_float
from onefold.training.checkpoint import checkpoints
from onefold.training.run import Run

__all__ = ["Logger", "numbers"]

IMAGES = 32
"""Maximum number of test images whose latents are shown."""


class Logger(ABC):
    """A callback of `onefold.train`; a context manager, which in the end hands over what is left.

    Raises:
        UserError: its package is not installed.
    """

    name: ClassVar[str]
    """Of the service, of the package that it needs, and of the extra that installs that."""

    def __init__(self) -> None:
        found = importlib.util.find_spec(self.name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UserError(f"--log {self.name}: needs {self.name}; pip install 'onefold[{self.name}]'")
        self.run: Run | None = None
        self.images = self.drawn = self.weighed = -1
        """Images seen at the last line, picture and checkpoint that were handed over."""

    def __call__(self, run: Run, line: Mapping[str, Any]) -> None:
        """A line of the log is written."""
        begins = self.run is None or line["images"] <= self.images  # the run has gone back to a checkpoint
        if begins:
            self._begin(run, line["images"])
        self.run = run
        for seen in [seen for seen in run.history if seen["images"] > self.images] if begins else [line]:
            self._hand_over(seen["images"] - 1)  # pictures and checkpoint of this very step come after its line
            self.images = seen["images"]
            self.write(numbers(seen), self.images)
            if "alarm" in seen:
                self.alarm(seen["alarm"], self.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            self._hand_over(self.images)
            self.end()

    def _begin(self, run: Run, images: int) -> None:
        """Begin a series, or go on with one behind the last line before `images`."""
        folder = run.folder / self.name
        mark = folder / "id"
        before = [seen["images"] for seen in run.history if seen["images"] < images] if mark.exists() else []
        if not mark.exists():
            write_whole(mark, uuid4().hex[:8])
        self.images = self.drawn = self.weighed = before[-1] if before else -1
        self.begin(run, folder, mark.read_text(encoding="utf-8"), self.images)

    def _hand_over(self, images: int) -> None:
        """Pictures and histograms that are new, up to those at `images`, in their order."""
        assert self.run is not None
        new = [(_number(path), path) for path in sorted(self.run.folder.glob("samples/*.png"))]
        saved = [(_number(path), path) for path in checkpoints(self.run.folder)[-1:]]
        new = [each for each in new if self.drawn < each[0] <= images]
        saved = [each for each in saved if self.weighed < each[0] <= images]
        for number, path in sorted(new + saved):
            if path.suffix == ".png":
                self.picture("reconstructions" if "-" in path.stem else "samples", path, number)
                self.drawn = number
            else:
                self.histograms(_distributions(self.run), number)
                self.weighed = number

    def view(self, folder: Path) -> str:
        """Where a person looks at the series of a run's folder."""
        return f"kept in {folder / self.name}"

    @abstractmethod
    def begin(self, run: Run, folder: Path, identity: str, images: int) -> None:
        """Begin a series, or go on with one.

        Args:
            run: The run.
            folder: Its folder for this logger.
            identity: Of the series: eight characters.
            images: What there is beyond so many images is of an abandoned continuation; −1 at the beginning.
        """

    @abstractmethod
    def write(self, values: Mapping[str, float], images: int) -> None:
        """The numbers of a line."""

    @abstractmethod
    def alarm(self, text: str, images: int) -> None:
        """A monitor has raised an alarm."""

    @abstractmethod
    def picture(self, name: str, path: Path, images: int) -> None:
        """A PNG file."""

    @abstractmethod
    def histograms(self, values: Mapping[str, np.ndarray], images: int) -> None:
        """Numbers, by name, whose distribution is shown."""

    @abstractmethod
    def end(self) -> None:
        """All is handed over."""


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of the log, named by their path in it; those on top by "train/…"."""
    found = {f"train/{name}": value for name, value in line.items() if not isinstance(value, dict | list)}
    found |= _flat({name: value for name, value in line.items() if isinstance(value, dict | list)})
    found.pop("train/images", None)
    return {name: value for name, value in found.items() if isinstance(value, int | float) and np.isfinite(value)}


def _flat(values: Mapping[str, Any] | list[Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries under one name each."""
    found: dict[str, Any] = {}
    for name, value in enumerate(values) if isinstance(values, list) else values.items():
        path = f"{prefix}{name}"
        found |= _flat(value, f"{path}/") if isinstance(value, dict | list) else {path: value}
    return found


def _number(path: Path) -> int:
    """Images seen, as in the name of a picture or checkpoint; −1 for any other name."""
    digits = path.stem.removesuffix("-reconstructions")
    return int(digits) if digits.isdecimal() else -1


@torch.no_grad()
def _distributions(run: Run) -> dict[str, np.ndarray]:
    """Each weight of the published network, and its latents of test images."""
    network = replace(run).network.to(resolve_device(run.config.training.device))  # read anew
    found: dict[str, Tensor] = {f"weights/{name}": value for name, value in network.named_parameters()}
    _, test = run.datasets or run.open_data()
    x, _ = read_all(test, range(min(len(test), IMAGES)))
    found["latents"] = network.encode(to_float(x.to(network.device)))
    return {name: value.float().flatten().cpu().numpy() for name, value in found.items()}
