"""The images of a run: opened, cut into those to train on and those to test on, described, and recorded.

`data.json` in the run's folder keeps what they were: where they came from, how many there are of each class, and a
fingerprint. Whoever opens them later is told what has changed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onefold import settings
from onefold.data import Dataset, Subset, as_dataset, holdout, open_dataset, with_classes_of
from onefold.data.messages import count_text, shape_text, shortened
from onefold.data.source import absolute, exists, path_of
from onefold.errors import UserError
from onefold.files import write_whole
from onefold.training.config import Config, DataConfig

__all__ = ["LEAST_HELD_OUT", "DataRecord", "PartRecord", "check_there", "check_unchanged", "describe", "given_again"]
__all__ += ["held_out_count", "open_data", "place", "placed", "split", "unsplit"]

FILE = "data.json"
SHOWN = 12
"""Classes that a line names."""
OWN = {
    "fashion-mnist": "the folder of Fashion-MNIST's four IDX files, as in Debian's package dataset-fashion-mnist",
    "cifar10-train.zip": "a zip of CIFAR-10's training images, a folder for each class",
    "cifar10-test.zip": "a zip of CIFAR-10's test images, a folder for each class",
    "imagenet256-train.zip": "a zip of ImageNet's training images at 256×256, as `onefold data convert` makes it",
    "imagenet256-val.zip": "a zip of ImageNet's validation images at 256×256, as `onefold data convert` makes it",
}
"""What the recipes' own data are, which nobody but the user brings."""
LEAST_HELD_OUT = 8
"""Images that are set apart for evaluation, where there are enough: of fewer the alarms and the numbers know little."""


def open_data(data: DataConfig) -> tuple[Dataset, Dataset]:
    """The images to train on, and those that training never sees.

    Without test images of their own, those of a part beside the training part are taken, as in a folder with train/ and
    test/; else `data.holdout` of the training images are set apart.

    Raises:
        UserError: data that cannot be read, or test images unlike the training images.
    """

    def opened(source: str, option: str = "data") -> Dataset:
        if source in OWN and not exists(Path(source)):
            cure = f"nothing is downloaded; say with --{option} where yours is"
            raise UserError(f"{source}: no such file or folder; for the recipe, it is {OWN[source]}; {cure}")
        return open_dataset(source, unreadable=data.unreadable, labels_from=data.labels_from)

    train = opened(data.source)
    if data.test is not None:
        return split(train, opened(data.test, "test-data"), data)
    reasons: list[str] = []
    for source in train.test_sources:
        test = opened(source)
        if bool(test.class_names) == bool(train.class_names):
            return split(train, test, data)
        has = "has no classes" if train.class_names else "has classes, which the training images lack"
        reasons.append(f"{source} {has}, and is not used")
    train.notes = (*train.notes, *reasons)
    return split(train, None, data)


def split(train: object, test: object, data: DataConfig) -> tuple[Dataset, Dataset]:
    """Training and test images, of a kind; without test images, `data.holdout` of the training images are set apart.

    At least `LEAST_HELD_OUT` are, or a quarter of fewer; sets too small for that serve for both. Classes of test images
    are those of the training images that have the same names.

    Raises:
        UserError: what is no data set, or test images unlike the training images.
    """
    train = as_dataset(train)
    if test is None:
        held = held_out_count(len(train), data.holdout)
        return holdout(train, held / len(train)) if held else (train, train)
    test = as_dataset(test)
    if test.image_shape != train.image_shape:
        kinds = [shape_text(part.image_shape) for part in (test, train)]
        raise UserError(f"{test.source}: {kinds[0]}, but {train.source}: {kinds[1]}; give test images of the same kind")
    return train, with_classes_of(test, train)


def unsplit(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset | None]:
    """What `split` was given: a whole data set and None, where the test images were set apart from it."""
    if train is test:
        return train, None
    if isinstance(train, Subset) and isinstance(test, Subset) and train.whole is test.whole:
        return train.whole, None
    return train, test


def place(data: Dataset) -> str:
    """Where a data set comes from, as a run keeps it; a Python object by its name."""
    return absolute(data.source) if exists(path_of(data.source) or Path()) else data.source


@dataclass(frozen=True)
class PartRecord:
    """Training images, or test images."""

    source: str
    images: int
    counts: tuple[int, ...] = ()
    """Of each class; none where it would take reading every image."""
    fingerprint: str | None = None
    """See `Dataset.fingerprint`."""

    @classmethod
    def of(cls, data: Dataset) -> "PartRecord":
        fingerprint = data.fingerprint()
        counts: tuple[int, ...] = ()
        if fingerprint is not None and data.classes:
            counts = tuple(np.bincount(data.labels, minlength=data.classes).tolist())
        return cls(data.source, len(data), counts, fingerprint)


@dataclass(frozen=True)
class DataRecord:
    """What the images of a run were when it was created."""

    class_names: tuple[str, ...]
    train: PartRecord
    test: PartRecord

    @classmethod
    def of(cls, datasets: tuple[Dataset, Dataset]) -> "DataRecord":
        train, test = datasets
        return cls(train.class_names, PartRecord.of(train), PartRecord.of(test))

    @classmethod
    def read(cls, folder: Path) -> "DataRecord | None":
        """That of a run's folder; None if it has none. Raises a UserError when it cannot be read."""
        path = folder / FILE
        return settings.from_file(cls, path) if path.is_file() else None

    def write(self, folder: Path) -> None:
        described: dict[str, Any] = json.loads(settings.to_json(self))
        described["train"]["counts"], described["test"]["counts"] = self.train.counts, self.test.counts
        write_whole(folder / FILE, json.dumps(described, indent=2, ensure_ascii=False) + "\n")

    def changes(self, now: "DataRecord") -> list[str]:
        """What has changed since, a line each, besides the classes."""
        lines: list[str] = []
        for use, then, new in (("training", self.train, now.train), ("test", self.test, now.test)):
            if then.images != new.images:
                now_has = count_text(new.images, f"{use} image")
                lines.append(f"{new.source}: now has {now_has}; the run began with {then.images:,}")
            elif None not in (then.fingerprint, new.fingerprint) and then.fingerprint != new.fingerprint:
                lines.append(f"{new.source}: its {use} images or their labels are others than when the run began")
        return lines


def check_unchanged(
    folder: Path, datasets: tuple[Dataset, Dataset], say: Callable[[str], None] = lambda line: None
) -> None:
    """Compare a run's data with what they were when it began; what has changed is told to `say`, a line each.

    Raises:
        UserError: other classes, or in another order: numbers of classes would mean others.
    """
    record = DataRecord.read(folder)
    if record is None:
        return
    train = datasets[0]
    if record.class_names != train.class_names:
        gone = [name for name in record.class_names if name not in train.class_names]
        new = [name for name in train.class_names if name not in record.class_names]
        what = [f"{verb} {shortened(names, 5)}" for verb, names in (("lacks", gone), ("has", new)) if names]
        raise UserError(
            f"{train.source}: its classes are not those that the run {folder} began with: it now "
            f"{' and '.join(what) or 'has them in another order'}; restore the data or start a new run"
        )
    for line in record.changes(DataRecord.of(datasets)):
        say(line)


def describe(datasets: tuple[Dataset, Dataset]) -> str:
    """One line: how many images there are to train and to test on, and the classes with their numbers of images."""
    record = DataRecord.of(datasets)
    train, test = record.train, record.test
    where = "set apart from them" if unsplit(*datasets)[1] is None else f"from {test.source}"
    line = f"{train.source}: {count_text(train.images)} to train on, {test.images:,} to test on, {where}; "
    if not record.class_names:
        return line + "no classes"
    counts = [f" ({number:,})" for number in train.counts] or [""] * len(record.class_names)
    classes = [name + number for name, number in zip(record.class_names, counts, strict=True)]
    return line + f"{count_text(len(classes), 'class', 'classes')}: {shortened(classes, SHOWN)}"


def placed(data: DataConfig, datasets: tuple[Dataset, Dataset]) -> DataConfig:
    """The settings as a run keeps them: by whole paths, and with the test images, where they are a part beside those to
    train on.
    """
    train, test = datasets
    beside = test.source if data.test is None and test.source in train.test_sources else data.test
    return replace(data, source=absolute(data.source), test=None if beside is None else absolute(beside))


def held_out_count(count: int, fraction: float) -> int:
    """Of so many images, how many are set apart for evaluation; 0 where there are too few."""
    held = max(round(count * fraction), min(LEAST_HELD_OUT, count // 4))
    return held if held >= 2 else 0


def given_again(folder: Path, config: Config, data: object, test_data: object) -> tuple[Dataset, Dataset]:
    """Training and test images of a run that are given anew, in whole or in part."""

    def opened(given: object, option: str, recorded: str | None) -> Dataset | None:
        if given is None and recorded is None:
            return None
        if given is None:
            check_there(folder, option, recorded)
        source = recorded if given is None else given
        if isinstance(source, str | Path):
            return open_dataset(source, unreadable=config.data.unreadable, labels_from=config.data.labels_from)
        return as_dataset(source)

    recorded, part = config.data.test, f"{config.data.source}:"
    if test_data is None and isinstance(data, str | Path) and recorded is not None and recorded.startswith(part):
        recorded = f"{data}:{recorded.removeprefix(part)}"  # a part of the training images moves with them
    train, test = opened(data, "data", config.data.source), opened(test_data, "test_data", recorded)
    assert train is not None
    network = config.network
    wanted = (*network.image_size, network.channels), network.classes
    found = train.image_shape, train.classes if network.classes else 0
    if found != wanted:
        kinds = [
            f"{shape_text(shape)} with {count_text(classes, 'class', 'classes')}" for shape, classes in (found, wanted)
        ]
        raise UserError(f"{train.source}: {kinds[0]}, but {folder} was trained on {kinds[1]}; give the same images")
    return split(train, test, config.data)


def check_there(folder: Path, option: str, source: str | None) -> None:
    """Refuse a run whose images have gone, in words that say whose path it is."""
    path = None if source is None else path_of(source)
    if path is None or exists(path):
        return
    key = "data.source" if option == "data" else "data.test"
    cure = f"onefold.load_run(folder, {option}=…)"
    if str(source).endswith("(a Python object)"):
        raise UserError(f"{folder}: was trained on {source}, which only Python can give: {cure}")
    options = f"--{option.replace('_', '-')} with evaluate, onestep and train --resume"
    raise UserError(
        f"{source}: no such file or folder, but {folder} was trained on it ({key} in its config.json); "
        f"say where it is now: {options}, or {cure}"
    )
