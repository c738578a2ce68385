"""A study: the same training under several settings and seeds, to be compared.

    OUT/study.json                what the study is; a continuation must match it
    OUT/runs/<arm>-seed<k>/       an ordinary run for each arm and seed: a trial
        evaluation/study.json     its record, written last: a trial that has one is finished
        evaluation/spectrum.json  standard deviations of the latents along their principal directions
        failed.json               instead of a record, if training could not continue
    OUT/table.* and pictures      made only from the runs, so they can be made again

The arms differ from the study's configuration only in the settings that they name, and a seed gives the same data
order, noise and initial weights in every arm of equal shape. Precision and compilation are resolved once, when the
study begins, since a measurement repeated for each trial could choose differently.
"""

import json
import shlex
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from onefold import __version__, metrics, settings
from onefold.compute import resolve_device
from onefold.data import Dataset
from onefold.errors import UserError
from onefold.extractor import extractor_for
from onefold.files import is_unused, write_whole
from onefold.metrics import Record
from onefold.recipes import recipe
from onefold.spaces import LEAST_IMAGES
from onefold.training.config import Config
from onefold.training.conversion import one_step_config
from onefold.training.datasets import open_data
from onefold.training.prepare import decide, fit_to_data

__all__ = ["Arm", "Column", "Study", "Trial", "begin", "check", "check_changes", "configured"]
__all__ += ["explain_disk_errors", "told"]

NAME = "study.json"
KEYS = ("study", "onefold", "arguments", "seeds", "images", "arms", "config", "resolved")

Say = Callable[[str], None]


class Column(NamedTuple):
    """A number from the records, as a table shows it."""

    key: str
    title: str
    digits: int


@dataclass(frozen=True)
class Arm:
    """One setting of a study."""

    name: str
    """Name on the command line and of folders: letters, digits, hyphens."""
    title: str
    """Name in tables and pictures."""
    changes: Mapping[str, Any]
    """Settings that differ from the study's, such as {"objective.target": "stopped"}."""
    family: str = ""
    """Arms of one family share a colour in pictures …"""
    variant: str = ""
    """… and those of one variant a line style."""
    ignored_settings: tuple[str, ...] = ()
    """Settings of other arms that do not apply to this one."""
    teacher: str = ""
    """Name of the arm whose runs this one turns into one-step generators."""


KEPT = ("network", "sampler")
"""Groups of settings that a one-step arm has from its teacher and from being one."""
MEASURED = 5000
"""Generated and reference images per evaluation, unless it is said."""


def configured(name: str, changes: Mapping[str, Any]) -> Config:
    """A recipe with the further settings of all arms.

    Raises:
        UserError: no such recipe, or settings that it does not take.
    """
    recipe(name)  # whose name is no matter of --change
    try:
        return recipe(name, **changes)
    except UserError as error:
        raise UserError(f"--change: {error}") from error


def check_changes(changes: Mapping[str, Any], decided: Collection[str], arms: Sequence[Arm]) -> None:
    """Refuse further settings that would have no effect, since the study or each of its arms decides them.

    Raises:
        UserError: naming the first.
    """
    options = {"training.images": "--budget", "training.seed": "--seeds"}
    for name, _ in _flat(changes):
        if name in options:
            raise UserError(f"--change: {name} is the study's own; give {options[name]}")
        if name in decided:
            raise UserError(f"--change: {name} is decided by the study; leave it out")
        if all(name in arm.changes for arm in arms):
            raise UserError(f"--change: {name} is decided by each of the arms; leave it out")


def told(changes: Mapping[str, Any] | None) -> str | None:
    """Settings as words of a command, those of a group by their whole names."""
    words = [f"{name}={json.dumps(value)}" for name, value in _flat(changes or {})]
    return " ".join(map(shlex.quote, words)) or None


@dataclass(frozen=True)
class Trial:
    """One arm with one seed; once trained, its run is in `folder`."""

    arm: Arm
    seed: int
    folder: Path
    config: Config
    teacher: Path | None = None
    """The folder of the trial that this one starts from."""
    features: str | None = None
    """See `Study.features`."""

    @property
    def record_path(self) -> Path:
        return self.folder / "evaluation" / "study.json"

    @property
    def spectrum_path(self) -> Path:
        return self.folder / "evaluation" / "spectrum.json"

    @property
    def failure_path(self) -> Path:
        return self.folder / "failed.json"

    @property
    def record(self) -> Record | None:
        return Record.read(self.record_path) if self.record_path.exists() else None

    @property
    def failure(self) -> str | None:
        """Why training could not continue."""
        return _failure(self.failure_path)

    @property
    def teacher_failure(self) -> str | None:
        """Why there is nothing to start from, if the teacher's training could not continue."""
        return None if self.teacher is None else _failure(self.teacher / self.failure_path.name)

    @property
    def is_settled(self) -> bool:
        """Finished or failed: not to be trained again."""
        return self.record_path.exists() or self.failure_path.exists()


@dataclass(frozen=True)
class Study:
    """Arms × seeds on one configuration."""

    name: str
    """The command is `onefold study NAME`."""
    arguments: Mapping[str, Any]
    """The command's options that define the study, except for seeds and arms."""
    config: Config
    """What all arms share."""
    arms: tuple[Arm, ...]
    seeds: int
    """Every arm is trained with training.seed = 0 … seeds − 1."""
    images: int = MEASURED
    """Generated and reference images per evaluation, at most as many as there are training images."""
    columns: tuple[Column, ...] = ()
    """Columns of the human-readable table."""
    shows_settings: bool = True
    """Whether that table has a column for each setting in which the arms differ, or only their titles."""
    features: str | None = None
    """File of the feature extractor of all evaluations. None: a small classifier of the data."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of all arms, among them those that follow for one-step arms unless they are given."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise UserError("--arms: none given; leave the option out for all")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"--arms: {name} is given twice")
        for arm in self.arms:
            if arm.teacher and arm.teacher not in names:
                raise UserError(f"--arms: {arm.name} starts from {arm.teacher}; name it too")
        if self.images < LEAST_IMAGES:
            raise UserError(f"--images: {self.images} are too few to measure anything; give at least {LEAST_IMAGES}")
        if self.seeds < 1:
            raise UserError(f"--seeds: {self.seeds} is not positive; give at least 1")

    def arm_config(self, arm: Arm, seed: int = 0, teacher: Path | None = None) -> Config:
        config = self.config
        if arm.teacher:
            rank = arm.changes.get("network.jump_rank", 0)  # all weights learn, but where this is the arm's subject
            given = {name: value for name, value in _flat(self.changes) if name.partition(".")[0] not in KEPT}
            config = one_step_config(config, rank=rank).with_changes({"start": str(teacher or ""), **given})
        return config.with_changes({**arm.changes, "training.seed": seed})

    def trials(self, out: Path) -> list[Trial]:
        """All trials, seed by seed, so that a first complete comparison is available early."""

        def folder(name: str, seed: int) -> Path:
            return out / "runs" / f"{name}-seed{seed}"

        def trial(arm: Arm, seed: int) -> Trial:
            teacher = folder(arm.teacher, seed) if arm.teacher else None
            config = self.arm_config(arm, seed, teacher)
            return Trial(arm, seed, folder(arm.name, seed), config, teacher, self.features)

        return [trial(arm, seed) for seed in range(self.seeds) for arm in self.arms]

    @property
    def command(self) -> str:
        """The command that reproduces this study."""
        default = [f"--{name} {value}" for name, value in self.arguments.items() if value is not None]
        names = " ".join(arm.name for arm in self.arms)
        return " ".join(["onefold study", self.name, *default, f"--seeds {self.seeds} --arms {names}"])


def check(study: Study, out: Path, say: Say = lambda line: None) -> Dataset:
    """Check for everything that can be wrong before anything is written.

    Returns the images used for the study's reconstructions.

    Raises:
        UserError: data that cannot be read or do not fit, or an `out` that holds another study or something else.
    """
    train, test = open_data(study.config.data)
    for arm in study.arms:
        fit_to_data(study.arm_config(arm), train)
    device = resolve_device(study.config.training.device)
    if (out / NAME).exists():
        _check_same(_read(out / NAME), _description(study), out)
    elif not is_unused(out):
        raise UserError(f"{out}: is not an empty folder; choose another --out")
    if study.features is None:
        extractor_for(train, say, device)  # if it needs training, now, and not in several trials at once
    else:
        metrics.from_file(study.features)
    return test


def begin(study: Study, out: Path) -> Study:
    """Write `study.json`, or add new seeds and arms to it; returns the study with every "auto" resolved."""
    path, described = out / NAME, _description(study)
    if path.exists():
        resolved_settings = _read(path)["resolved"]
    else:
        training = decide(study.config, resolve_device(study.config.training.device)).training
        resolved_settings = {"training.precision": training.precision, "training.compile": training.compile}
    write_whole(path, json.dumps({**described, "resolved": resolved_settings}, indent=2, ensure_ascii=False) + "\n")
    return replace(study, config=study.config.with_changes(resolved_settings))


@contextmanager
def explain_disk_errors(out: Path) -> Generator[None]:
    """Turn a disk error into one line."""
    try:
        yield
    except OSError as error:
        cure = "finished arms are kept: fix this and run the same command again"
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {cure}") from error


def _failure(path: Path) -> str | None:
    return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else None


def _description(study: Study) -> dict[str, Any]:
    return {
        "study": study.name,
        "onefold": __version__,
        "arguments": dict(study.arguments),
        "seeds": study.seeds,
        "images": study.images,
        "arms": {arm.name: {"title": arm.title, "changes": dict(arm.changes)} for arm in study.arms},
        "config": json.loads(settings.to_json(study.config)),
    }


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """A study continues as it began, except for more seeds and further arms."""
    now = json.loads(json.dumps(now))  # tuples are lists in a file

    def refuse(what: str, was: object, given: object) -> None:
        if was != given:
            cure = "give the same again, or choose another --out"
            raise UserError(f"{out}: was started with {what} {_quoted(was)}, not {_quoted(given)}; {cure}")

    refuse("study", before["study"], now["study"])
    for name in {**before["arguments"], **now["arguments"]}.keys() - {"change", "images"}:  # which are seen below
        refuse(f"--{name}", before["arguments"].get(name), now["arguments"].get(name))
    if now["seeds"] < before["seeds"]:
        refuse("--seeds", before["seeds"], now["seeds"])
    for name, arm in before["arms"].items():
        if name not in now["arms"]:
            refuse("--arms", " ".join(before["arms"]), " ".join(now["arms"]))
        refuse(f"arm {name} as", arm["changes"], now["arms"][name]["changes"])
    refuse("images", before["images"], now["images"])
    read = settings.from_json(Config, json.dumps(before["config"]), str(out))  # with what has come since at its default
    was, given = dict(_flat(json.loads(settings.to_json(read)))), dict(_flat(now["config"]))
    for name in {**was, **given}:
        refuse(name, was.get(name), given.get(name))
    refuse("onefold", before["onefold"], now["onefold"])


def _quoted(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return {key: described[key] for key in KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not describe a study; restore it or choose another --out") from error
