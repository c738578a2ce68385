"""Checkpoints: the training state in files, exact to the bit, all or nothing.

`checkpoints/<images>/` has a file of tensors (safetensors) for each module of the state, by its name, one for all
optimizers, the counters (`state.json`), the SHA-256 of all these (`checksums.json`) and, last, `COMPLETE`, which lists
the size of every file. It is written into a temporary folder, flushed to the disk and renamed: a process killed at any
moment leaves either a complete checkpoint or one that is recognised as incomplete. One that the disk has changed since
is refused by its checksums.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold import settings
from onefold.errors import UserError, reason
from onefold.files import UNFINISHED, read_tensors, sha256_of, unfinished, write_tensors
from onefold.training.config import Config
from onefold.training.log import Window
from onefold.training.phases import phases_of
from onefold.training.state import Counters, Skips, TrainingState

__all__ = ["checkpoints", "is_amid_skips", "publish", "restore", "save"]

FORMAT = "onefold checkpoint 2"
CHECKSUMS = "checksums.json"
"""Checkpoints of earlier versions have none."""


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run folder, oldest first; half-written ones are ignored."""
    found = (path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    return sorted((path for path in found if is_complete(path)), key=lambda path: int(path.name))


def is_complete(path: Path) -> bool:
    """Whether `COMPLETE` exists and every file has the size that it lists."""
    try:
        sizes = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def is_amid_skips(path: Path) -> bool:
    """Whether the last step before a complete checkpoint was skipped, since a signal may come at any time."""
    described = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return described["counters"]["skipped_in_row"] > 0


def save(state: TrainingState, config: Config, folder: Path) -> Path:
    """Write a checkpoint of `state` into the run folder, publish its model and delete checkpoints no longer kept.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are unaffected.
    """
    final = folder / "checkpoints" / f"{state.counters.images:09d}"
    temporary = unfinished(final)
    _sweep(folder)
    try:
        _write(state, config, temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sizes = {path.name: path.stat().st_size for path in sorted(final.iterdir())}
        (final / "COMPLETE").write_text(json.dumps(sizes), encoding="utf-8")
        _flush(final)
        publish(state, config, folder)
    except (OSError, SafetensorError) as error:
        _sweep(folder)
        raise UserError(
            f"{final}: the checkpoint could not be written ({reason(error)}); earlier ones are intact: fix this and "
            "continue with --resume"
        ) from error
    _prune(config, folder, final)
    return final


def restore(state: TrainingState, config: Config, path: Path) -> None:
    """Load the state saved in a checkpoint folder into `state`, in place.

    Raises:
        UserError: a checkpoint that is incomplete, damaged, or of another configuration.
    """
    if not is_complete(path):
        raise UserError(f"{path}: the checkpoint is incomplete; delete it to continue from the previous one")
    try:
        _check_sums(path)
        described = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise UserError(f"{path}: written as {described['format']!r}, this version reads {FORMAT!r}")
        own = settings.from_json(type(config.network), json.dumps(described["network"]), str(path))
        if own != config.network:
            raise UserError(f"{path}: belongs to another network than this run's config.json describes")
        counters = Counters(**described["counters"])
        if counters.phase != state.counters.phase:
            state.enter(phases_of(config)[counters.phase])
        for name, module in state.modules.items():
            module.load_state_dict(read_tensors(path / f"{name}.safetensors", _device_of(module, state))[0])
        device = state.network.device
        moments, _ = read_tensors(path / "optimizer.safetensors", device)
        if described["optimizer"] != _kind(state.optimizers, moments):
            raise UserError(f"{path}: its optimizer.safetensors does not match this run's optimizer")
        _set_optimizer_tensors(state.optimizers, moments)
        state.counters = counters
        state.skips = Skips(device, counters.skipped, counters.skipped_in_row)
        state.window = Window.from_json(described["window"], device)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):  # which have another cause
            raise
        raise UserError(
            f"{path}: not a checkpoint of this run ({reason(error)}); delete it or choose another run"
        ) from error


def _check_sums(path: Path) -> None:
    if not (path / CHECKSUMS).is_file():
        return
    for name, expected in json.loads((path / CHECKSUMS).read_text(encoding="utf-8")).items():
        if sha256_of(path / name) != expected:
            cure = "delete the checkpoint to continue from the previous one"
            raise UserError(f"{path}: {name} is damaged: its checksum does not match; {cure}")


def publish(state: TrainingState, config: Config, folder: Path) -> None:
    """Replace `model/` with the published network; what else the phase publishes goes into folders of its own."""
    others = phases_of(config)[state.counters.phase].published(state.modules)
    for name, module in {"model": state.published, **others}.items():
        assert isinstance(module, Saveable)
        _exchange(module, folder / name)


@runtime_checkable
class Saveable(Protocol):
    """A network that can be published."""

    def save_pretrained(self, folder: Path, /) -> None:
        """Write all its files into a folder."""
        ...


def _exchange(module: Saveable, final: Path) -> None:
    """Write a network into a folder, replacing each file as a whole."""
    temporary = unfinished(final)
    shutil.rmtree(temporary, ignore_errors=True)
    module.save_pretrained(temporary)
    _flush(temporary)
    final.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(final / path.name)
    temporary.rmdir()


def _write(state: TrainingState, config: Config, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, module in state.modules.items():
        write_tensors(module.state_dict(), folder / f"{name}.safetensors")
    moments = _optimizer_tensors(state.optimizers)
    write_tensors(moments, folder / "optimizer.safetensors")
    state.read_skips()
    described = {
        "format": FORMAT,
        "optimizer": _kind(state.optimizers, moments),
        "counters": asdict(state.counters),
        "window": state.window.to_json(),
        "network": json.loads(settings.to_json(config.network)),
    }
    (folder / "state.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    checksums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    _flush(folder)


def _kind(optimizers: Mapping[str, Sequence[Optimizer]], moments: dict[str, Tensor]) -> list[str]:
    """What an optimizer file must match: the optimizers, and the name and shape of every tensor."""
    names = [f"{module} {type(each).__name__}" for module, several in optimizers.items() for each in several]
    return names + [f"{name} {list(value.shape)}" for name, value in sorted(moments.items())]


def _optimizer_tensors(optimizers: Mapping[str, Sequence[Optimizer]]) -> dict[str, Tensor]:
    """State tensors by "module/optimizer/parameter/name"; hyperparameters belong to the configuration."""
    return {
        f"{module}/{k}/{index}/{name}": value.contiguous()
        for module, several in optimizers.items()
        for k, optimizer in enumerate(several)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _set_optimizer_tensors(optimizers: Mapping[str, Sequence[Optimizer]], tensors: dict[str, Tensor]) -> None:
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for key, value in tensors.items():
        module, k, index, name = key.split("/")
        found.setdefault((module, int(k)), {}).setdefault(int(index), {})[name] = value
    for module, several in optimizers.items():
        for k, optimizer in enumerate(several):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": found.get((module, k), {}), "param_groups": groups})


def _device_of(module: nn.Module, state: TrainingState) -> torch.device:
    """Where a module is; one without tensors, where the network is."""
    return next(chain(module.parameters(), module.buffers(), state.network.parameters())).device


def _prune(config: Config, folder: Path, newest: Path) -> None:
    """Delete old checkpoints, and those with more images than `newest`, the one just written.

    They are of a future that a roll-back gave up: resuming from one would undo the roll-back.
    """
    training, found = config.training, checkpoints(folder)
    kept = found.index(newest) + 1
    for path in found[kept:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in found[:kept][: -training.keep_last]:
        if not (training.keep_every and int(path.name) % training.keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Delete the remains of a save that was killed."""
    for path in [*folder.glob(f"{UNFINISHED}*"), *(folder / "checkpoints").glob(f"{UNFINISHED}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
