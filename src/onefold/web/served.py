"""A run that is served: its newest network, and what its folder tells while it trains.

Nothing outside the run's folder is read, and nothing is written.
"""

import math
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from onefold.compute import resolve_device, resolve_precision, sampling_context
from onefold.errors import UserError, printable
from onefold.networks.base import Network, NetworkConfig
from onefold.sampling import SOLVERS, Sampler, resolve_labels
from onefold.settings import Precision
from onefold.training.log import read_log
from onefold.training.run import Run, load_run
from onefold.web.schema import RunInfo, Sample, Sampling, Training

__all__ = ["NotYet", "Served"]

T = TypeVar("T")
PICTURE = re.compile(r"(\d{1,18})(-reconstructions)?\.png")
"""Names of the pictures that training writes."""
POINTS = 400
"""Most lines of a log that are told."""


class NotYet(UserError):
    """The run has no network yet."""


class Served:
    """A run's folder, a saved network's folder or one on the hub, or either of them in memory.

    Raises:
        UserError: neither of them is there, or a network that cannot be read.
    """

    def __init__(
        self, source: Run | Network | str | Path, *, device: str = "auto", precision: Precision = "float32"
    ) -> None:
        self.device = resolve_device(device)
        self.precision: Precision = resolve_precision(precision, self.device)
        self.check: Callable[..., None] = lambda *ignored: None
        """Called before each pass through a trunk; what it raises ends the computation."""
        self.run: Run | None = None
        self._network: Network | None = None
        self._loaded: str | None = None
        self._lock = threading.Lock()
        if isinstance(source, Run):
            self.run, self.name = source, source.folder.resolve().name
        elif isinstance(source, Network):
            self.name = type(source).__name__
            self._take(source.eval())
        else:
            folder = Path(source)
            self.name = (folder.resolve() if folder.exists() else folder).name
            if _is_run(folder):
                self.run = load_run(folder)
            else:
                self._take(Network.from_pretrained(source))
        self.name = printable(self.name)
        if self._published():
            self.network()

    # --- the network --------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str | None:
        """What tells one published network from the next; None before the first."""
        return self._published() if self.run else "saved"

    @property
    def config(self) -> NetworkConfig:
        """What the network is, also before there is one."""
        if self._network is not None:
            return self._network.config
        assert self.run is not None
        return self.run.config.network

    @property
    def sampler(self) -> Sampler:
        if self._network is not None:
            return self._network.sampler
        assert self.run is not None
        return self.run.config.sampler

    def network(self) -> Network:
        """The newest network: of a run that trains, read anew whenever training has published one.

        Raises:
            NotYet: the run has published none. UserError: it cannot be read.
        """
        with self._lock:
            published = self.model
            if published is None:
                raise NotYet(f"{self.name}: no model yet; a run has one after its first checkpoint")
            if self.run and published != self._loaded:
                try:
                    self._take(Network.from_pretrained(self.run.model))
                    self._loaded = published
                except UserError:  # training replaces its files one by one: then the next call reads them whole
                    if self._network is None:
                        raise
        assert self._network is not None
        return self._network

    @contextmanager
    def computing(self) -> Generator[Network]:
        """The newest network, within the context in which it computes."""
        network = self.network()
        with sampling_context(network, self.device, precision=self.precision):
            yield network

    def _take(self, network: Network) -> None:
        def check(module: object, inputs: object) -> None:
            self.check()

        for trunk in network.trunks:
            trunk.register_forward_pre_hook(check)
        self._network = network

    def _published(self) -> str | None:
        if self.run is None:
            return None
        try:
            found = (self.run.folder / "model" / "model.safetensors").stat()
        except OSError:
            return None
        return f"{found.st_mtime_ns:x}-{found.st_size:x}"

    # --- what is asked for --------------------------------------------------------------------------------------------

    def sampler_for(self, wanted: Sampling) -> Sampler:
        """The run's sampler with what is wanted.

        Raises:
            UserError: a solver that is unknown or not for this network, or guidance that it cannot have.
        """
        own = self.sampler
        if wanted.solver is not None and wanted.solver not in SOLVERS:
            raise UserError(f"solver: {wanted.solver!r} is not known; choose one of {', '.join(self.solvers)}")
        guidance = wanted.guidance
        jumps = own.jumps if wanted.solver is None else wanted.solver in self._jumps
        if guidance not in (None, 1) and jumps:
            cure = "leave it at 1, or choose the solver euler"
            raise UserError(f"guidance: {guidance:g} cannot guide a one-step generator while it samples; {cure}")
        sampler = own.with_options(solver=wanted.solver, steps=wanted.steps, guidance=guidance)
        sampler.check_for(own)
        return sampler

    def labels_for(self, words: list[str], n: int, seed: int) -> list[int] | None:
        """A class for each image; see `schema.Images`.

        Raises:
            UserError: a word that is no class, or another number of them.
        """
        config = self.config
        if not words:
            return resolve_labels(n, None, seed, config.classes)
        none = "none" not in config.class_names
        labels: list[int | str] = [config.classes if none and word == "none" else word for word in words]
        found = resolve_labels(n, labels * n if len(labels) == 1 else labels, seed, config.classes, config.class_names)
        return found if config.classes else None

    def label_name(self, label: int | None) -> str:
        """What a class is called."""
        if label is None:
            return ""
        if label == self.config.classes:
            return "no class"
        return printable(self.config.class_names[label]) if self.config.class_names else str(label)

    @property
    def _jumps(self) -> list[str]:
        return [name for name in SOLVERS if Sampler(1, name).jumps]

    @property
    def solvers(self) -> list[str]:
        """Solvers that work with the network."""
        paints = [name for name in self._jumps if Sampler(1, name).paints]
        left_out = {*([] if self.sampler.jumps else self._jumps), *([] if self.config.jump_exit else paints)}
        return [name for name in SOLVERS if name not in left_out]

    # --- what the folder tells ----------------------------------------------------------------------------------------

    def info(self) -> RunInfo:
        """What the run is, and where it stands."""
        config, sampler, log = self.config, self.sampler, self._log()
        return RunInfo(
            name=self.name,
            image_size=config.image_size,
            channels=config.channels,
            classes=config.classes,
            class_names=[printable(name) for name in config.class_names],
            model=self.model,
            one_step=sampler.jumps,
            steps=sampler.steps,
            guidance=sampler.guidance,
            solver=sampler.solver,
            solvers=self.solvers,
            jumps=[name for name in self.solvers if name in self._jumps],
            trains=self.run is not None,
            images=log[-1]["images"] if log else 0,
            length=self.run.length if self.run else 0,
            pictures=len(self._pictures(reconstructions=False)),
            written=self._written(),
        )

    def training(self) -> Training:
        """The log, thinned, and the pictures.

        Raises:
            UserError: a saved network, which has neither.
        """
        if self.run is None:
            raise UserError(f"{self.name}: is a saved network, not a run; it has no log")
        log = self._log()
        shown = _thinned(log)
        numbers = [dict(_numbers(line)) for line in shown]
        names = dict.fromkeys(name for line in numbers for name in line if name != "images")
        alarms = [line.get("alarm") for line in log if _is_measured(line)]
        return Training(
            images=[line["images"] for line in shown],
            series={name: [line.get(name) for line in numbers] for name in names},
            alarm=printable(alarms[-1]) if alarms and alarms[-1] else None,
            samples=self._pictures(reconstructions=False),
            reconstructions=self._pictures(reconstructions=True),
        )

    def picture(self, name: str) -> Path | None:
        """The file of a picture that training wrote; None if there is none of that name in the run's folder."""
        if self.run is None or not PICTURE.fullmatch(name):
            return None
        folder = (self.run.folder / "samples").resolve()
        path = (folder / name).resolve()  # a link could lead anywhere
        inside = path.parent == folder and folder.parent == self.run.folder.resolve()
        return path if inside and path.is_file() else None

    def _pictures(self, *, reconstructions: bool) -> list[Sample]:
        if self.run is None:
            return []
        names = [path.name for path in (self.run.folder / "samples").glob("*.png") if self.picture(path.name)]
        named = [found for found in map(PICTURE.fullmatch, names) if found and bool(found[2]) == reconstructions]
        return sorted((Sample(name=found[0], images=int(found[1])) for found in named), key=lambda each: each.images)

    def _log(self) -> list[dict[str, Any]]:
        if self.run is None:
            return []
        path = self.run.folder / "log.jsonl"
        try:
            found = path.stat()
        except OSError:
            return []
        return _log_of(path, found.st_mtime_ns, found.st_size)

    def _written(self) -> float | None:
        try:
            return max(0.0, time.time() - (self.run.folder / "log.jsonl").stat().st_mtime) if self.run else None
        except OSError:
            return None


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's, which has its network in a folder of its own, and not a saved network's."""
    return (folder / "config.json").is_file() and not (folder / "model.safetensors").is_file()


@lru_cache(maxsize=4)
def _log_of(path: Path, changed: int, size: int) -> list[dict[str, Any]]:
    """The log, read again when it has changed."""
    return [line for line in read_log(path) if isinstance(line.get("images"), int)]


def _is_measured(line: Mapping[str, Any]) -> bool:
    """Whether a line of the log holds a monitor's measurement."""
    return any(isinstance(value, Mapping) for value in line.values())


def _thinned(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some lines of a log, its last one and the latest measurements among them."""
    places = range(len(log) - 1, -1, -(math.ceil(len(log) / POINTS) or 1))
    measured = [k for k, line in enumerate(log) if _is_measured(line)]
    return [log[k] for k in sorted({*places, *measured[-POINTS:]})]


def _numbers(line: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float | None]]:
    """The single numbers of a log's line by name, those of a measurement as "health.psnr"; None: not finite."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield before + name, value if math.isfinite(value) else None
