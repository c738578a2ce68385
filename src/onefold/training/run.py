"""A run: the folder that a training fills, and what can be read back from it."""

import json
import subprocess
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from onefold import __version__, settings
from onefold.data import Dataset, holdout, open_dataset
from onefold.data.messages import count_text as counted
from onefold.data.messages import shape_text
from onefold.errors import UserError, writing
from onefold.files import is_unused, write_whole
from onefold.networks.base import Network
from onefold.sampling import check_guidance
from onefold.training.config import Config, DataConfig
from onefold.training.log import read_log

__all__ = ["Run", "check_new", "create_folder", "fitted", "load_run", "note_skipped", "open_data"]


@dataclass(frozen=True)
class Run:
    """A run folder. `config`, `history` and `network` are read from its files."""

    folder: Path
    config: Config

    @cached_property
    def network(self) -> Network:
        """The published average, ready for use. Raises UserError before the first checkpoint."""
        if not (self.folder / "model" / "model.safetensors").is_file():
            raise UserError(
                f"{self.folder}: no model yet; train it on with `onefold train … --out {self.folder} --resume`"
            )
        network = Network.from_pretrained(self.folder / "model")
        network.sampler = self.config.sampler
        return network

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return read_log(self.folder / "log.jsonl")


def load_run(folder: str | Path) -> Run:
    """Open a run folder.

    Raises:
        UserError: not a run's folder, or a configuration that this version cannot read.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a run (no config.json); give the folder that `onefold train --out` made")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of a run; give the folder of a run") from error
    return Run(folder, settings.from_json(Config, json.dumps(described), str(path)))


def check_new(folder: Path) -> None:
    """Refuse a folder that cannot become that of a new run.

    Raises:
        UserError: it holds a run or other files already.
    """
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: holds a run already; continue it with --resume or choose another --out")
    if not is_unused(folder):
        raise UserError(f"{folder}: is not an empty folder; choose another --out")


def create_folder(folder: Path, config: Config) -> Run:
    """Make the folder of a new run and write its configuration.

    Raises:
        UserError: the folder holds a run or other files already, or cannot be made.
    """
    check_new(folder)
    described = {
        "onefold": __version__,
        "commit": _git_commit(),
        "config": json.loads(settings.to_json(config)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return Run(folder, config)


def open_data(data: DataConfig) -> tuple[Dataset, Dataset]:
    """The images to train on, and those that training never sees.

    Raises:
        UserError: data that cannot be read, or test images unlike the training images.
    """
    train = open_dataset(data.source, unreadable=data.unreadable)
    if data.test is None:
        return holdout(train, data.holdout)
    test = open_dataset(data.test, unreadable=data.unreadable)
    kinds = [f"{shape_text(part.image_shape)} with {part.classes} classes" for part in (test, train)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{data.test}: {kinds[0]}, but {data.source}: {kinds[1]}; give test images of the same kind")
    numbered = tuple(map(str, range(train.classes)))  # as where a file holds numbers alone
    if numbered not in (test.class_names, train.class_names) and test.class_names != train.class_names:
        pairs = zip(test.class_names, train.class_names, strict=True)
        own, other = next(pair for pair in pairs if pair[0] != pair[1])
        raise UserError(f"{data.test}: has a class {own} where {data.source} has {other}; name its classes alike")
    return train, test


def note_skipped(run: Run, *parts: Dataset) -> str:
    """List the images that were left out since they cannot be read in the run's `skipped.txt`; says so in a line."""
    names = list(dict.fromkeys(name for part in parts for name in part.skipped))
    if not names:
        return ""
    path = run.folder / "skipped.txt"
    with writing(path):
        write_whole(path, "\n".join(names) + "\n")
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{run.config.data.source}: left out {counted(len(names))} that cannot be read ({some}); see {path}"


def fitted(config: Config, data: Dataset) -> Config:
    """The configuration with the network's image size, channels and classes taken from the data.

    A network with `classes` = 0 stays unconditional.

    Raises:
        UserError: a patch that does not divide the images, or a sampler with guidance where there are no classes.
    """
    height, width, channels = data.image_shape
    classes = data.classes if config.network.classes else 0
    network = replace(config.network, image_size=(height, width), channels=channels, classes=classes)
    _ = network.grid  # says so if the patch does not divide the images
    check_guidance(config.sampler.guidance, classes)
    return replace(config, network=network)


def _git_commit() -> str | None:
    """The commit of the working tree that onefold is run from, if it is one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
