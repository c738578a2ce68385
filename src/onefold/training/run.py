"""A run: the folder that a training fills, and what can be read back from it."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from onefold import __version__, settings
from onefold.data import Dataset
from onefold.data.digits import DIGITS
from onefold.data.messages import count_text
from onefold.data.source import absolute
from onefold.errors import UserError, printable, quoted, writing
from onefold.files import is_unused, read_tensors, refuse_placeholder, sha256_of, write_whole
from onefold.networks import Network
from onefold.networks.source import is_run, packaged
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.datasets import DataRecord, check_there, check_unchanged, describe, given_again, open_data
from onefold.training.log import read_log
from onefold.training.phases import length

__all__ = ["Run", "check_new", "create_folder", "data_notes", "extend", "git_commit", "load_run", "move_data"]


WITHOUT_ONE_STEP = {"self_distillation", "autoencoder", "diffusion"}
"""Phases that read no settings of one-step training."""


@dataclass(frozen=True)
class Run:
    """A run folder. `config`, `history` and `network` are read from its files."""

    folder: Path
    config: Config
    datasets: tuple[Dataset, Dataset] | None = field(default=None, compare=False)
    """Training and test images, where they do not come from a source that the configuration names."""
    average: int | None = None
    """Half-life of the average whose network this is, in the newest checkpoint; None: the published one."""

    @property
    def model(self) -> Path:
        """Folder of the published network. Raises UserError before the first checkpoint."""
        folder = self.folder / "model"
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{self.folder}: no model yet; train it on with `{self.resume_command}`")
        return folder

    @property
    def resume_command(self) -> str:
        """What makes it go on, for messages."""
        return f"onefold train --resume --out {quoted(self.folder)}"

    @cached_property
    def network(self) -> Network:
        """The published average, or that of `average`, ready for use. Raises UserError before the first checkpoint."""
        network = Network.from_pretrained(self.model)
        if self.average is not None:
            network.load_state_dict(read_tensors(self._average_file())[0])
        if not (self.model / "sampler.json").is_file():
            network.sampler = self.config.sampler
        return network

    @property
    def model_sha256(self) -> str:
        """Of the published network's weights, or of `average`. Raises UserError before the first checkpoint."""
        return sha256_of(self.model / "model.safetensors" if self.average is None else self._average_file())

    @property
    def half_life(self) -> int:
        """Of the average that the network is, in images."""
        return self.average or self.config.training.ema_half_lives[-1]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the log so far."""
        return read_log(self.folder / "log.jsonl")

    @property
    def images(self) -> int:
        """Images seen at the last line of the log."""
        history = self.history
        return history[-1]["images"] if history else 0

    @property
    def length(self) -> int:
        """Images of the whole run."""
        return length(self.config)

    def _average_file(self) -> Path:
        """Where the newest checkpoint has the average."""
        known = self.config.training.ema_half_lives
        if self.average not in known:
            choice = ", ".join(map(str, known))
            raise UserError(f"average: {self.average} is not the half-life of one; choose one of {choice}")
        found = checkpoints(self.folder)
        if not found:
            raise UserError(f"{self.folder}: has no checkpoint with its averages; only the published one can be used")
        return found[-1] / f"average-{known.index(self.average)}.safetensors"

    def open_data(self, say: Callable[[str], None] = lambda line: None) -> tuple[Dataset, Dataset]:
        """The images that it trains on, and those that training never sees.

        `say` is told what has changed in them since the run began, a line each.

        Raises:
            UserError: data that cannot be read, test images unlike the training images, or other classes than those
                that the run began with.
        """
        self.check_data()
        datasets = self.datasets or open_data(self.config.data)
        check_unchanged(self.folder, datasets, say)
        return datasets

    def check_data(self) -> None:
        """Raises a UserError that names the run, where its data have gone."""
        for option, source in (("data", self.config.data.source), ("test_data", self.config.data.test)):
            if self.datasets is None:
                check_there(self.folder, option, source)


def load_run(folder: str | Path, *, data: object = None, test_data: object = None) -> Run:
    """Open a run folder.

    Args:
        folder: What `onefold train --out` made.
        data: The images that it was trained on: as they were given, where that was a Python object (see
            `onefold.train`), or the place that their files have now.
        test_data: Likewise.

    Raises:
        UserError: not a run's folder, a configuration that this version cannot read, or images of another kind.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a run (no config.json); {_meant(folder)}")
    refuse_placeholder(path)
    try:
        described = json.loads(path.read_text(encoding="utf-8"))["config"]
        phases = described["phases"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the configuration of a run; {_meant(folder)}") from error
    try:
        config = settings.from_json(Config, json.dumps(described), str(path))
    except UserError as error:
        if "onestep" not in str(error) or "unknown setting" not in str(error):
            raise
        if not WITHOUT_ONE_STEP.issuperset(phases):
            cure = f"{folder / 'model'} can still be sampled; for more, convert the run that it came from again"
            raise UserError(f"{error}; a one-step run of an earlier version: {cure}") from error
        described.pop(
            "onestep", None
        )  # settings of a phase that the run does not have, by the names of an earlier version
        config = settings.from_json(Config, json.dumps(described), str(path))
    if data is None and test_data is None:
        return Run(folder, config)
    return Run(folder, config, given_again(folder, config, data, test_data))


def _meant(folder: Path) -> str:
    """What to give in place of what is no run."""
    for other in (Path("runs") / folder, folder.parent):
        if is_run(other / "config.json"):
            return f"give {quoted(other)}"
    if held := ["images"] * (str(folder) in DIGITS) + ["a network"] * (str(folder) in packaged()):
        has = f"the package has {' and '.join(held)} of that name, but no run"
        return f"{has}; make one with `onefold train digits` and give its folder"
    return "give the folder that `onefold train --out` made"


def check_new(folder: Path) -> None:
    """Refuse a folder that cannot become that of a new run.

    Raises:
        UserError: it holds a run or other files already.
    """
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: holds a run already; continue it with --resume or choose another --out")
    if not is_unused(folder):
        raise UserError(f"{folder}: is not an empty folder; choose another --out")


def create_folder(run: Run) -> None:
    """Make the folder of a new run and write its configuration, and what its data are.

    Raises:
        UserError: the folder holds a run or other files already, or cannot be made.
    """
    check_new(run.folder)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_config(run.folder, run.config, [])
        DataRecord.of(run.open_data()).write(run.folder)
    except OSError as error:
        raise UserError(f"{run.folder}: cannot be written ({error.strerror}); choose another --out") from error


def write_config(folder: Path, config: Config, extensions: Sequence[Mapping[str, int]]) -> None:
    """Write `config.json`: version, commit, configuration, and by how much the run was made longer, and when."""
    described = {
        "onefold": __version__,
        "commit": git_commit(),
        "config": json.loads(settings.to_json(config)),
        "extensions": list(extensions),
    }
    write_whole(folder / "config.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")


def extend(run: Run, images: int) -> Run:
    """The same run, made longer: to `images` images in all. Recorded in `config.json`, with the images seen so far.

    The schedule is that of the new length: a rate that had fallen rises again, and falls at the new end.

    Raises:
        UserError: a run of several phases, whose lengths depend on one another, or one that is as long already.
    """
    if len(run.config.phases) > 1:
        raise UserError(f"--images: {run.folder} has several phases and cannot be made longer; start a new run")
    config = run.config.with_changes({"training.images": images})
    if length(config) <= run.length:
        raise UserError(f"--images: {images:,} do not make {run.folder} longer, which has {run.length:,}; give more")
    described = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    extension = {"at": run.images, "from": run.length, "to": length(config)}
    with writing(run.folder):
        write_config(run.folder, config, [*described.get("extensions", ()), extension])
    return replace(run, config=config)


def move_data(run: Run, data: str | Path | None, test_data: str | Path | None) -> Run:
    """The same run, whose images lie elsewhere now; recorded in `config.json`.

    Raises:
        UserError: it cannot be written.
    """
    new = {"data.source": data, "data.test": test_data}
    changes = {name: absolute(str(source)) for name, source in new.items() if source is not None}
    config = run.config.with_changes(changes)
    if config == run.config:
        return run
    described = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    with writing(run.folder):
        write_config(run.folder, config, described.get("extensions", ()))
    return replace(run, config=config)


def data_notes(run: Run) -> list[str]:
    """What a person should know of a run's data before it is trained, a line each: first what they are.

    Images that were left out since they cannot be read are listed in the run's `skipped.txt`.
    """
    changed: list[str] = []
    parts = run.open_data(changed.append)
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    (train, test), source = parts, run.config.data.source
    if test is train:
        consequence = "reconstructions, health and numbers are of training images"
        notes.append(f"{source}: {count_text(len(train))}, too few to set some apart; {consequence}")
    elif run.config.data.test is None and (count := len(train) + len(test)) * run.config.data.holdout < len(test) - 1:
        notes.append(
            f"{source}: {len(test)} of {count_text(count)} are set apart for evaluation; fewer would tell little"
        )
    if len(test) == 1:
        notes.append("of one test image the latents have no spread: a collapse is not seen")
    names = list(dict.fromkeys(name for part in parts for name in part.skipped))
    if names:
        path = run.folder / "skipped.txt"
        with writing(path):
            write_whole(path, "\n".join(map(printable, names)) + "\n")
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        left_out = f"left out {count_text(len(names))} that cannot be read ({some}); see {path}"
        notes.append(f"{run.config.data.source}: {left_out}")
    lines = [describe(parts), *(f"note: {note}" for note in [*notes, *changed])]
    return list(map(printable, lines))


@cache
def git_commit() -> str | None:
    """The commit of the clone that onefold runs from, "-dirty" if files have changed; None if it is no clone."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        answer = subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
        )
        return answer.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside another project's clone is none of it
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
