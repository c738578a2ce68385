"""Checkpoints: the training state in files, exact to the bit, all or nothing.

`checkpoints/<images>/` has a file of tensors (safetensors) for each module of the state, by its name, one for all
optimizers, the counters (`state.json`), the SHA-256 of all these (`checksums.json`) and, last, `COMPLETE`, which lists
the size of every file. Of sharded modules and their optimizers, each rank writes its rows to files of its own (see
`pieces`), and any number of ranks goes on from either. It is written into a temporary folder, flushed to the disk and
renamed: a process killed at any moment leaves either a complete checkpoint or one that is recognised as incomplete. One
that the disk has changed since is refused by its checksums.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold import settings
from onefold.errors import UserError, reason
from onefold.files import UNFINISHED, read_tensors, sha256_of, unfinished
from onefold.training.config import Config
from onefold.training.engine import ranks
from onefold.training.log import Window
from onefold.training.phases import phases_of
from onefold.training.pieces import Pieces, write_piece
from onefold.training.sharding import from_rows, is_sharded, local, own_rows
from onefold.training.state import Counters, Skips, TrainingState

__all__ = ["checkpoints", "is_amid_skips", "publish", "restore", "save"]

FORMAT = "onefold checkpoint 3"
READS = ("onefold checkpoint 2", FORMAT)
"""The former has no shards."""
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

    Of several ranks, each has to call it; the first writes, or each its shard.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are unaffected.
    """
    final = folder / "checkpoints" / f"{state.counters.images:09d}"
    temporary, group = unfinished(final), ranks()
    if not (group.first or group.shards):
        return final
    if group.first:
        _sweep(folder)
    try:
        _write(state, config, temporary)
        if not group.first:
            return final
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sizes = {path.name: path.stat().st_size for path in sorted(final.iterdir())}
        (final / "COMPLETE").write_text(json.dumps(sizes), encoding="utf-8")
        _flush(final)
        publish(state, config, folder, final)
    except (OSError, SafetensorError) as error:
        if group.first:
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
        if described["format"] not in READS:
            raise UserError(f"{path}: written as {described['format']!r}, this version reads {FORMAT!r}")
        own = settings.from_json(type(config.network), json.dumps(described["network"]), str(path))
        if own != config.network:
            raise UserError(f"{path}: belongs to another network than this run's config.json describes")
        counters = Counters(**described["counters"])
        if counters.phase != state.counters.phase:
            state.enter(phases_of(config)[counters.phase])
        count, device = described.get("shards", 1), state.network.device
        for name, module in state.modules.items():
            likes = module.state_dict()
            module.load_state_dict(_read(path, name, count, likes.get, _device_of(module, state)))
        moments = _read(path, "optimizer", count, _weights_by_moment(state.optimizers), device)
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
    sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    for name, expected in [*sums.items()][ranks().rank :: ranks().count]:  # a rank that finds one damaged ends all
        if sha256_of(path / name) != expected:
            cure = "delete the checkpoint to continue from the previous one"
            raise UserError(f"{path}: {name} is damaged: its checksum does not match; {cure}")


def publish(state: TrainingState, config: Config, folder: Path, path: Path) -> None:
    """Replace `model/` with the published network; what else the phase publishes goes into folders of its own.

    The weights of sharded ones are joined from a checkpoint of the same state.
    """
    others = phases_of(config)[state.counters.phase].published(state.modules)
    for name, module in {"model": state.published, **others}.items():
        assert isinstance(module, Saveable)
        sharded = any(map(is_sharded, module.parameters()))
        _exchange(partial(_join, module, state, path) if sharded else module.save_pretrained, folder / name)


def _join(module: nn.Module, state: TrainingState, path: Path, folder: Path) -> None:
    """Write a sharded network into a folder, with the weights that a checkpoint has."""
    places = [
        (name, prefix) for name, own in state.modules.items() for prefix, part in own.named_modules() if part is module
    ]
    name, prefix = places[0]
    module.save_config(folder)  # type: ignore[operator]
    count = json.loads((path / "state.json").read_text(encoding="utf-8")).get("shards", 1)
    Pieces(path, name, count).join(folder / "model.safetensors", f"{prefix}." if prefix else "")


@runtime_checkable
class Saveable(Protocol):
    """A network that can be published."""

    def save_pretrained(self, folder: Path, /) -> None:
        """Write all its files into a folder."""
        ...


def _exchange(write: Callable[[Path], None], final: Path) -> None:
    """Write a network into a folder, replacing each file as a whole."""
    temporary = unfinished(final)
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    _flush(temporary)
    final.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(final / path.name)
    temporary.rmdir()


def _write(state: TrainingState, config: Config, folder: Path) -> None:
    group = ranks()
    count = group.count if group.shards else 1
    if group.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if count > 1:
        group.wait()
    moments = _optimizer_tensors(state.optimizers)
    tensors = {name: module.state_dict() for name, module in state.modules.items()} | {"optimizer": moments}
    own = [write_piece(_own(each, group.rank), folder, name, group.rank, count) for name, each in tensors.items()]
    checksums = {path.name: sha256_of(path) for path in own}
    state.read_skips()
    if count > 1:
        for path in own:
            _flush_file(path)
        for text in group.texts(json.dumps(checksums)):
            checksums |= json.loads(text)
        if not group.first:
            return
    described = {
        "format": FORMAT,
        "shards": count,
        "optimizer": _kind(state.optimizers, moments),
        "counters": asdict(state.counters),
        "window": state.window.to_json(),
        "network": json.loads(settings.to_json(config.network)),
    }
    (folder / "state.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    checksums["state.json"] = sha256_of(folder / "state.json")
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
    _flush(folder)


def _own(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a rank saves: its rows, and the first also what is whole."""
    rows = {name: local(value) for name, value in tensors.items() if is_sharded(value) or rank == 0}
    return {name: value for name, value in rows.items() if rank == 0 or len(value)}


def _read(
    path: Path, name: str, count: int, like: Callable[[str], Tensor | None], device: torch.device
) -> dict[str, Tensor]:
    """Tensors that `count` ranks have saved; sharded where `like` is, of the same shape."""
    if count == 1 and not ranks().shards:
        return read_tensors(path / f"{name}.safetensors", device)[0]
    pieces, found = Pieces(path, name, count), dict[str, Tensor]()
    for key, shape in pieces.shapes.items():
        own = like(key)
        if own is not None and is_sharded(own) and own.shape == shape:
            found[key] = from_rows(pieces.rows(key, *own_rows(shape[0])).to(device), own)
        else:
            found[key] = pieces.whole(key).to(device)
    return found


def _weights_by_moment(optimizers: Mapping[str, Sequence[Optimizer]]) -> Callable[[str], Tensor | None]:
    """The weight that a tensor of the optimizers is about, by the latter's name."""

    def weight(key: str) -> Tensor | None:
        module, k, index, _ = key.split("/")
        groups = optimizers[module][int(k)].param_groups
        return [p for group in groups for p in group["params"]][int(index)]

    return weight


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
        _flush_file(path)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
