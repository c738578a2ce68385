"""The state of a training and its files: exact to the bit, all or nothing.

A checkpoint is `checkpoints/<images>/` with the network, its averages and the optimizers (safetensors), counters
(`state.json`) and, last, `COMPLETE`, which lists the size of every file. It is written into a temporary folder,
flushed to the disk and renamed: a process killed at any moment leaves either a whole checkpoint or one that is seen
to be none. Random numbers need no state: those of a step come from a generator seeded with (seed, images,
rollbacks), and the order of the data is a function of (seed, images).
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold import settings
from onefold.compute import compile_blocks
from onefold.errors import UserError, reason
from onefold.files import UNFINISHED, unfinished
from onefold.networks.base import Network, build
from onefold.networks.ratio import RatioNet
from onefold.training import ema
from onefold.training.config import Config
from onefold.training.critic import Duel
from onefold.training.log import Window
from onefold.training.optimizer import build_optimizers

__all__ = ["Counters", "Skips", "TrainingState", "checkpoints", "is_amid_skips", "load", "publish", "save"]

FORMAT = "onefold checkpoint 1"


@dataclass
class Counters:
    """What is counted along a run."""

    images: int = 0
    """Images seen, the run's clock."""
    skipped: int = 0
    """Steps skipped because the loss or its gradient was not finite, as of the last `TrainingState.read_skips` …"""
    skipped_in_row: int = 0
    """… and how many of them were the last ones without a good one between."""
    rollbacks: int = 0
    """Returns to an earlier checkpoint after too many skipped steps in a row."""
    generator_updates: int = 0
    """Of a one-step generator: its updates, which the critic's outnumber. Those that were skipped count too, since
    the host does not know of them; the ramp of the averages follows this number."""
    best: float | None = None
    """Of a one-step generator: the least Fréchet distance measured along the run …"""
    best_images: int = 0
    """… and when."""


class Skips:
    """Counts skipped steps on the device, so that no step makes the host wait for it."""

    def __init__(self, device: torch.device, total: int = 0, in_row: int = 0) -> None:
        self.total = torch.tensor(total, device=device)
        self.in_row = torch.tensor(in_row, device=device)
        self.last = torch.tensor(False, device=device)

    def count(self, skipped: Bool[Tensor, ""], *, whole: bool = True) -> None:
        """A step was taken, or skipped. One that is not `whole`, of a critic alone, does not end a row."""
        self.last = skipped
        self.total = self.total + skipped
        self.in_row = torch.where(skipped, self.in_row + 1, 0 if whole else self.in_row)


@dataclass
class TrainingState:
    """Everything that a step reads and changes."""

    network: Network
    averages: list[Network]
    optimizers: list[Optimizer]
    skips: Skips
    counters: Counters = field(default_factory=Counters)
    window: Window = field(default_factory=Window)
    """What the next log line is the mean of."""
    duel: Duel | None = None
    """What a one-step generator learns from."""

    @classmethod
    def fresh(cls, config: Config, device: torch.device, teacher: Network | None = None) -> "TrainingState":
        """Random weights from the run's seed, drawn on the CPU and so the same for every device.

        A one-step generator begins with what `config.onestep` takes from the teacher.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            network = build(config.network).to(device)
            network.sampler = config.sampler
            duel = None if teacher is None else Duel.fresh(network, teacher, config)
        averages = [ema.average_of(network) for _ in config.training.ema_half_lives]
        return cls(network, averages, build_optimizers(network, config.training), Skips(device), duel=duel)

    @property
    def published(self) -> Network:
        """What is saved as the run's model, sampled and evaluated: the last average, of a one-step run the best."""
        best = self.duel.best if self.duel else None
        return best or self.averages[-1]

    def compile(self) -> None:
        """Compile all blocks that a step uses, in place."""
        used = [self.averages[0]] if self.duel is None else [self.duel.teacher, self.duel.critic]
        for module in (self.network, *used):
            compile_blocks(module, dynamic=False)

    @property
    def all_optimizers(self) -> list[Optimizer]:
        """Those of the network, and the critic's."""
        return self.optimizers if self.duel is None else [*self.optimizers, self.duel.optimizer]

    def read_skips(self) -> int:
        """Bring the counters of skipped steps up to date and return the number in a row; the host waits for it."""
        counts = torch.stack([self.skips.total, self.skips.in_row]).tolist()
        self.counters.skipped, self.counters.skipped_in_row = counts
        return self.counters.skipped_in_row

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """The source of the next step's random numbers."""
        key = np.random.SeedSequence([seed, self.counters.images, self.counters.rollbacks])
        return torch.Generator(device).manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a run folder, oldest first; half-written ones are passed over."""
    found = (path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    return sorted((path for path in found if is_complete(path)), key=lambda path: int(path.name))


def is_complete(path: Path) -> bool:
    """Whether `COMPLETE` is there and every file has the size that it names."""
    try:
        sizes = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def is_amid_skips(path: Path) -> bool:
    """Whether the last step before a complete checkpoint was skipped: a signal may come at any time."""
    described = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return described["counters"]["skipped_in_row"] > 0


def save(state: TrainingState, config: Config, folder: Path) -> Path:
    """Write a checkpoint of `state` below the run folder, publish its model and delete what is not to be kept.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are as they were.
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
        publish(state, folder)
    except (OSError, SafetensorError) as error:
        _sweep(folder)
        raise UserError(
            f"{final}: the checkpoint could not be written ({reason(error)}); earlier ones are whole: mend this and "
            "go on with --resume"
        ) from error
    _prune(config, folder)
    return final


def load(config: Config, path: Path, device: torch.device, teacher: Network | None = None) -> TrainingState:
    """The state saved in a checkpoint folder; that of a one-step generator needs its teacher.

    Raises:
        UserError: a checkpoint that is incomplete, damaged, or of another configuration.
    """
    if not is_complete(path):
        raise UserError(f"{path}: the checkpoint is incomplete; delete it to go on from the one before")
    state = TrainingState.fresh(config, device, teacher)
    try:
        described = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise UserError(f"{path}: written as {described['format']!r}, this version reads {FORMAT!r}")
        if described["network"] != json.loads(settings.to_json(config.network)):
            raise UserError(f"{path}: belongs to another network than this run's config.json describes")
        state.network.load_state_dict(load_file(path / "network.safetensors", device=str(device)))
        for k, average in enumerate(state.averages):
            average.load_state_dict(load_file(path / f"average-{k}.safetensors", device=str(device)))
        if state.duel is not None:
            state.duel.critic.load_state_dict(load_file(path / "critic.safetensors", device=str(device)))
        moments = load_file(path / "optimizer.safetensors", device=str(device))
        if described["optimizer"] != _kind(state.all_optimizers, moments):
            raise UserError(f"{path}: its optimizer.safetensors is not what this run's optimizer left")
        _set_optimizer_tensors(state.all_optimizers, moments)
        state.counters = Counters(**described["counters"])
        state.skips = Skips(device, state.counters.skipped, state.counters.skipped_in_row)
        state.window = Window.from_json(described["window"], device)
        if state.duel is not None and state.counters.best is not None:
            state.duel.best = ema.average_of(state.averages[-1]).cpu()
            state.duel.best.load_state_dict(load_file(path / "best.safetensors"))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):  # which blame something else
            raise
        raise UserError(
            f"{path}: not a checkpoint of this run ({reason(error)}); delete it or choose another run"
        ) from error
    return state


def _write(state: TrainingState, config: Config, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(_tensors(state.network), folder / "network.safetensors")
    for k, average in enumerate(state.averages):
        save_file(_tensors(average), folder / f"average-{k}.safetensors")
    if state.duel is not None:
        save_file(_tensors(state.duel.critic), folder / "critic.safetensors")
        if state.duel.best is not None:
            save_file(_tensors(state.duel.best), folder / "best.safetensors")
    moments = _optimizer_tensors(state.all_optimizers)
    save_file(moments, folder / "optimizer.safetensors")
    state.read_skips()
    described = {
        "format": FORMAT,
        "optimizer": _kind(state.all_optimizers, moments),
        "counters": asdict(state.counters),
        "window": state.window.to_json(),
        "network": json.loads(settings.to_json(config.network)),
    }
    (folder / "state.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
    _flush(folder)


def _kind(optimizers: list[Optimizer], moments: dict[str, Tensor]) -> list[str]:
    """What an optimizer's file must agree in: the optimizers, and the name and shape of every tensor."""
    names = [type(optimizer).__name__ for optimizer in optimizers]
    return names + [f"{name} {list(value.shape)}" for name, value in sorted(moments.items())]


def _sweep(folder: Path) -> None:
    """Delete what a save that was killed has left."""
    for path in [*folder.glob(f"{UNFINISHED}*"), *(folder / "checkpoints").glob(f"{UNFINISHED}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def publish(state: TrainingState, folder: Path) -> None:
    """Replace `model/` by the published network, and `ratio/` by the ratio network if there is one."""
    _exchange(state.published, folder, "model")
    if state.duel is not None and state.duel.critic.ratio is not None:
        _exchange(state.duel.critic.ratio, folder, "ratio")


def _exchange(module: Network | RatioNet, folder: Path, name: str) -> None:
    """Write a network into a folder; all files are exchanged whole."""
    final = folder / name
    temporary = unfinished(final)
    shutil.rmtree(temporary, ignore_errors=True)
    module.save_pretrained(temporary)
    _flush(temporary)
    final.mkdir(exist_ok=True)
    for path in temporary.iterdir():
        path.replace(final / path.name)
    temporary.rmdir()


def _prune(config: Config, folder: Path) -> None:
    training = config.training
    for path in checkpoints(folder)[: -training.keep_last]:
        if not (training.keep_every and int(path.name) % training.keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in network.state_dict().items()}


def _optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """State tensors by "optimizer.parameter.name"; hyperparameters are the configuration's, not the state's."""
    tensors: dict[str, Tensor] = {}
    for k, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                tensors[f"{k}.{index}.{name}"] = value.contiguous()
    return tensors


def _set_optimizer_tensors(optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    for k, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            number, index, name = key.split(".")
            if int(number) == k:
                states.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
