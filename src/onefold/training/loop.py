"""The training loop, to be read from top to bottom.

    data → x, y → training_step → log and monitor → pictures → checkpoint

`train` prepares a run and owns its files; `Trainer` takes the steps. All that changes weights is `training_step`. Of
several ranks (see `engine`), each goes through all of this, and the first alone touches the folder.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from onefold import settings
from onefold.compute import eager, products, resolve_device
from onefold.data import Loader, read_all
from onefold.data.messages import count_text
from onefold.errors import Interrupted, TrainingAborted, UserError, writing
from onefold.files import locked
from onefold.networks import Network
from onefold.pictures import curves
from onefold.pictures.grids import save_grids
from onefold.pixels import to_float
from onefold.training import checkpoint
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.datasets import open_data, place, placed, split
from onefold.training.engine import Engine, alone, joined, ranks, running
from onefold.training.graphs import recorded
from onefold.training.interruption import Interruption
from onefold.training.log import RunLog, Window, peak_memory
from onefold.training.monitor import Monitor
from onefold.training.phases import Phase, Say, check_parts_of, phase_at, phases_of
from onefold.training.prepare import (
    IN_MEMORY,
    beginning,
    check_fit,
    check_same,
    decide,
    fit_to_data,
    mirror_note,
    start_notes,
)
from onefold.training.progress import ImageProgress, in_words
from onefold.training.run import Run, check_new, create_folder, data_notes, extend, load_run, move_data
from onefold.training.sharding import is_sharded
from onefold.training.state import Skips, TrainingState
from onefold.training.step import training_step

__all__ = ["Callback", "train"]

SKIPS_IN_ROW = 10
"""Where the host sees so many steps in a row without a finite gradient, or more, it gives the present weights up. It
looks at least once in so many steps, so that fewer than twice as many pass before.
"""

Callback = Callable[[Run, dict[str, Any]], None]
"""Called with the run and each line of its log, once that is written."""


@joined()
def train(
    config: Config | None,
    out: str | Path | None = None,
    *,
    data: object = None,
    test_data: object = None,
    network: Network | None = None,
    callbacks: Iterable[Callback] = (),
    resume: bool = False,
    images: int | None = None,
    quiet: bool = False,
    engine: Engine = "ddp",
) -> Run:
    """Train one network; returns the finished run. Started by a launcher, the processes train it together.

    Args:
        config: A recipe's configuration; image size, channels and classes are taken from the data (see
            `training.prepare.fit_to_data`). Not needed to resume; if it is given, it must be the run's.
        out: The run's folder; default `runs/<recipe>`.
        data: Images to train on, in place of `config.data.source`: any object with `image_shape` (H, W, C), `classes`,
            `len()` and `[i]` → (uint8 (H, W, C), label); or a source. With `resume`, the place that they have now.
        test_data: Images of the same kind for evaluation alone; default: some of `data` are set apart.
        network: A network whose weights to start from, such as `OneFold.from_pretrained(…)`; it stays as it is.
        callbacks: Called with (run, line) after each line of the log; of several ranks, by the first.
        resume: Continue the run in `out` from its newest complete checkpoint, with its own configuration.
        images: With `resume`, make the run longer: so many images in all (see `training.run.extend`).
        quiet: No progress bar, nor lines of it.
        engine: Of several processes, whether each holds everything (ddp) or a shard of it (fsdp; see `sharding`).

    Raises:
        UserError: settings, data or a folder that cannot be used.
        TrainingAborted: gradients that stay non-finite, or latents that collapse with `on_collapse="stop"`.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint has been written.
    """
    _check_arguments(config, network, callbacks, engine)
    if test_data is not None and data is None and not resume:
        raise UserError("test_data: goes with data; for data that the configuration names, set data.test")
    folder = Path(out) if out else Path("runs") / (config.recipe if config else "")
    told: list[str] = []
    if resume:
        if network is not None:
            raise UserError(f"network: the run in {folder} goes on with its own weights; leave it out")
        run = load_run(folder, data=data, test_data=test_data)
        run = replace(run, datasets=run.open_data())
        check_fit(run)
        if config is not None:
            check_same(config, run, images, moved=data is not None or test_data is not None)
    elif images is not None:
        raise UserError("images: makes a run longer that is resumed; a new one has training.images")
    elif config is None:
        raise UserError("config: nothing to train; give a configuration, or a run to resume")
    else:
        run = _new(config, folder, data, test_data, network, told.append)
        if network is not None or run.config.start:  # what is wrong is said before anything is written
            network = beginning(run.config, network)
        if ranks().first:
            check_new(folder)
    group, run = ranks(), _of_first(run)
    group.check_batch(run.config.training.batch)
    if engine == "fsdp":
        check_parts_of(run.config, group.count)
    device, quiet = resolve_device(run.config.training.device), quiet or not group.first
    with running(engine) as group, locked(folder) if group.first else nullcontext():
        if group.first and not resume:
            create_folder(run)
        elif group.first:
            run = run if images is None else extend(run, images)
            run = move_data(run, *(given if isinstance(given, str | Path) else None for given in (data, test_data)))
        run = _of_first(run)
        notes = [*data_notes(run), *start_notes(run)] if group.first else []
        if not quiet:
            print("\n".join(notes))
        state = _begin(run, device, network)
        with (
            writing(folder),
            products(run.config.training.precision, device),
            Interruption(launched=group.count > 1) as interruption,
            ImageProgress("training", run.length, done=state.counters.images, quiet=quiet) as progress,
        ):
            for line in told:
                progress.tell(line)
            if group.count > 1:
                each = f"{count_text(run.config.training.batch // group.count)} of a batch each"
                progress.tell(f"{group.count} ranks, {each}{', a shard of each weight' if group.shards else ''}")
            elif engine == "fsdp":
                progress.tell("engine fsdp: a single process holds every weight itself; torchrun starts several")
            Trainer(run, state, device, interruption, progress, tuple(callbacks)).train()
    return replace(run)  # which has not read the network yet


def _check_arguments(config: object, network: object, callbacks: object, engine: object) -> None:
    """Refuse what a typing slip hands over, before anything is opened."""
    if not isinstance(config, Config | None):
        raise UserError(f"config: {config!r} is no configuration; give one, such as onefold.recipe('digits')")
    if not isinstance(network, Network | None):
        raise UserError(f"network: {network!r} is no network; load one with onefold.OneFold.from_pretrained")
    if not isinstance(callbacks, Iterable):
        raise UserError("callbacks: give a list of functions, callbacks=[function]")
    if engine not in get_args(Engine):
        raise UserError(f"engine: {engine!r} is not one of {', '.join(get_args(Engine))}")


def _new(config: Config, folder: Path, data: object, test_data: object, network: Network | None, say: Say) -> Run:
    """A new run, fitted to its data and its machine; nothing is written yet."""
    if isinstance(data, str | Path):  # the same as in the configuration
        config = config.with_changes({"data.source": str(data), "data.test": None})
        data = None
        if isinstance(test_data, str | Path):
            config, test_data = config.with_changes({"data.test": str(test_data)}), None
    if data is None and test_data is None:
        datasets = open_data(config.data)
        config = replace(config, data=placed(config.data, datasets))
    else:
        datasets = split(config.data.source if data is None else data, test_data, config.data)
        test = None if test_data is None else place(datasets[1])
        config = config.with_changes({"data.source": place(datasets[0]), "data.test": test})
    if network is not None:
        config = replace(config, network=network.config, start=config.start or IN_MEMORY)
    wanted, config = config, fit_to_data(config, datasets[0])
    note = mirror_note(wanted, config)
    if note is not None:
        say(note)
    return Run(folder, decide(config, resolve_device(config.training.device), say), datasets)


def _of_first(run: Run) -> Run:
    """The run as the first rank sees it, whose decisions and measurements hold for all."""
    if ranks().count == 1:
        return run
    config = ranks().of_first(settings.to_json(run.config))
    return replace(run, config=settings.from_json(Config, config, str(run.folder)))


def _begin(run: Run, device: torch.device, network: Network | None) -> TrainingState:
    """The state of the newest checkpoint, or a fresh one, which is saved at once if its weights come from elsewhere."""
    group, saved, start = ranks(), checkpoints(run.folder), run.config.start
    if not saved and start == IN_MEMORY and network is None:
        raise UserError(f"{run.folder}: ended before its first checkpoint, and began with {IN_MEMORY}; start it anew")
    if not saved and network is None and start:
        network = beginning(run.config)
    state = TrainingState.fresh(run.config, device, network, run.open_data()[0])
    if saved:
        checkpoint.restore(state, run.config, saved[-1])
        if group.first:  # in case that a kill came between the checkpoint and this
            checkpoint.publish(state, run.config, run.folder, saved[-1])
    elif network is not None:
        checkpoint.save(state, run.config, run.folder)
    places = list(map(int, group.texts(str(state.counters.images))))
    if len(set(places)) > 1:
        found = f"rank {places.index(min(places))} finds it at {min(places):,} images, another at {max(places):,}"
        where = group.of_first(str(run.folder))
        raise UserError(f"{where}: is not one folder for all ranks ({found}); choose one that all machines share")
    return state


class Trainer:
    """Takes the steps of a run, and after each does what is due."""

    def __init__(
        self,
        run: Run,
        state: TrainingState,
        device: torch.device,
        interruption: Interruption,
        progress: ImageProgress,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.run, self.state, self.device = run, state, device
        self.interruption, self.progress, self.callbacks = interruption, progress, tuple(callbacks)
        self.config, self.training = run.config, run.config.training
        self.data, self.test = run.open_data()
        self.saved = self.images
        """Images at the newest checkpoint; 0 before there is one."""
        self.group = ranks()
        if self.group.first:
            self.log = RunLog(run.folder / "log.jsonl", images=self.images)
        shown, _ = read_all(self.test, np.arange(min(len(self.test), 30)))
        self.shown = shown.to(device)
        self.watch(phases_of(self.config)[state.counters.phase])

    def train(self) -> None:
        """From where the state stands to the end of the run."""
        training, workers = self.training, self.config.data.workers
        with Loader(
            self.data,
            batch=training.batch,
            seed=training.seed,
            start=self.images,
            workers=workers,
            device=self.device,
            part=self.group.span(training.batch),
        ) as loader:
            self.draw_missing()
            while not self.finished:
                self.enter_phase()
                self.step(loader)
                if self.gives_up():
                    self.roll_back(loader)
                    continue
                stops = self.tell()
                self.save_or_stop(stops, self.heard())
                self.draw()

    # --- where the run stands ---

    @property
    def images(self) -> int:
        return self.state.counters.images

    @property
    def finished(self) -> bool:
        return self.images >= self.run.length

    def due(self, every: int) -> bool:
        """Whether a multiple of `every` images has been reached by the last step, or the end."""
        return self.finished or self.images // every > (self.images - self.training.batch) // every

    @property
    def shows_first(self) -> bool:
        """Whether the first tenth of the run is done by the last step, where there are pictures in any case."""
        tenth = self.run.length / 10
        return self.images >= tenth > self.images - self.training.batch

    def heard(self) -> int:
        """The number of a signal that came to any rank, or 0."""
        return self.group.largest(self.interruption.signal)

    # --- what a step consists of ---

    def enter_phase(self) -> None:
        """Where a phase begins, the state becomes that which it begins with."""
        phase = phase_at(self.images, self.config)
        if phase.index == self.state.counters.phase:
            return
        phase.adapt(self.state.published, self.data)
        self.state.enter(phase)
        self.watch(phase)

    def watch(self, phase: Phase) -> None:
        """Compile what the phase trains, and look at it by its own monitor; all ranks have the weights of the first."""
        for module in self.state.modules.values():
            tensors = [*module.parameters(), *module.buffers()]
            self.group.copy([tensor for tensor in tensors if not is_sharded(tensor)])
        if self.training.compile == "yes":
            self.state.compile(phase)
            self.progress.tell("compiling the network in the first steps: half a minute, or some on a busy machine")
        self.take = recorded(self.training, self.device, self.progress.tell) or training_step
        self.alarmed: Monitor | None = None
        """Which monitor has raised the last alarm."""
        if self.group.first:
            self.monitors: Sequence[Monitor] = phase.monitors(
                self.run, self.data, self.test, self.device, self.progress.say
            )

    def step(self, loader: Loader) -> None:
        """A step. A signal breaks off a compiled one, which may take a minute, where there is nothing to save."""
        self.state.window.begin()
        compiles = self.training.compile == "yes"
        at_once = compiles and self.images == self.saved
        try:
            with self.interruption.at_once(at_once):
                x, y = next(loader)
                values = self.take(self.state, to_float(x), y, self.config)
        except KeyboardInterrupt as error:
            if at_once and self.interruption.signal:
                raise self.interrupted(self.interruption.signal) from error
            raise
        except Exception as error:  # Ctrl-C in a terminal also ends the compilers that this process has started
            if compiles and self.interruption.signal:
                raise self.interrupted(self.interruption.signal) from error
            raise
        self.state.window.add(values, skipped=self.state.skips.last)

    def interrupted(self, number: int) -> Interrupted:
        """A signal has ended the training, and what there is to save is saved."""
        at = f"at {self.saved:,} of {self.run.length:,} images, saved" if self.saved else "before its first checkpoint"
        return Interrupted(
            number,
            f"{self.run.folder}: stopped {at}; go on with --resume: `{self.run.resume_command}`",
        )

    def gives_up(self) -> bool:
        """Whether too many steps in a row were skipped. Only here and where it logs does the host wait."""
        training = self.training
        intervals = (training.log_every, training.health_every, training.checkpoint_every)
        looks = any(map(self.due, (*intervals, SKIPS_IN_ROW * training.batch)))
        given_up = looks and self.state.read_skips() >= SKIPS_IN_ROW
        self.state.window.end(training.batch)
        self.progress.update(self.images)
        return given_up

    def roll_back(self, loader: Loader) -> None:
        """Go back to the newest checkpoint that was not saved amid skipped steps, with other random numbers; once.

        Raises:
            TrainingAborted: it happened before, or there is no such checkpoint.
        """
        good = [path for path in checkpoints(self.run.folder) if not checkpoint.is_amid_skips(path)]
        counters = self.state.counters
        skipped, in_row = counters.skipped, counters.skipped_in_row
        trouble = f"{self.run.folder}: {in_row} steps in a row had no finite gradient at {self.images:,} images"
        if counters.rollbacks or not good:
            cure = "lower training.learning_rate or use --training.precision float32"
            raise TrainingAborted(f"{trouble}; the newest good checkpoint is kept; {cure}")
        before = counters.phase
        checkpoint.restore(self.state, self.config, good[-1])
        self.state.counters.rollbacks, self.state.skips = 1, Skips(self.device, skipped)
        self.take = (
            recorded(self.training, self.device, self.progress.tell) or training_step
        )  # what was recorded is of other tensors
        if self.state.counters.phase != before:
            self.watch(phases_of(self.config)[self.state.counters.phase])
        loader.restart(self.images)
        if self.group.first:
            self.log.cut(self.images)
            self.progress.say(f"{trouble}; back to {self.images:,} images, with other noise")

    def tell(self) -> str:
        """Write the line of the log that is due; returns why training is to stop, if it is."""
        measures = self.due(self.training.health_every)
        if not (measures or self.due(self.training.log_every)):
            return ""
        means, stops = self.state.window.means(), ""
        self.state.window = Window()
        state = self.state.whole() if measures else self.state
        if self.group.first:
            with alone():
                alarm = self.write_line(state, means, measures=measures).get("alarm")
            if alarm and self.alarmed and self.training.on_collapse == "stop":
                stops = f"{self.alarmed.alarm} at {self.images:,} images, saved: {alarm}; {self.alarmed.cure}"
        return self.told(stops) if measures else stops

    def told(self, stops: str) -> str:
        """What a measurement of the first rank has found and, if it has selected an average, that average."""
        counters = self.state.counters
        found = json.dumps([stops, counters.best, counters.best_images])
        stops, counters.best, counters.best_images = json.loads(self.group.of_first(found))
        if counters.best is not None and counters.best_images == self.images:
            if self.group.shards:  # the first rank has selected a copy
                self.state.published.load_state_dict(self.state.averages[-1].state_dict())
            else:
                self.group.copy([*self.state.published.state_dict().values()])
        return stops

    def write_line(self, state: TrainingState, means: dict[str, float | None], *, measures: bool) -> dict[str, Any]:
        """Write a line of the log, with measurements of a state if they are due."""
        phase = phases_of(self.config)[self.state.counters.phase]
        line: dict[str, Any] = {"images": self.images, **means, "peak_memory": peak_memory(self.device)}
        line["rate_factor"] = phase.schedule.rate_factor(self.images - phase.start, self.training.batch)
        line["skipped"] = self.state.counters.skipped
        if measures:
            for monitor in reversed(self.monitors):  # of two alarms, the first monitor's is kept
                line |= (found := monitor.look(state, line, self.progress.say))
                self.alarmed = monitor if "alarm" in found else self.alarmed
        self.log.write(line)
        self.progress.update(self.images, note=in_words(means))
        for callback in self.callbacks:
            callback(replace(self.run), line)  # one that reads the network as it is now
        return line

    def save_or_stop(self, stops: str, number: int) -> None:
        """The checkpoint that is due; to stop, or after signal `number`, save and end the training.

        Raises:
            TrainingAborted: training is to stop.
            Interrupted: a signal.
        """
        # Not amid skipped steps: a roll-back wants weights from before the trouble began.
        good = self.state.counters.skipped_in_row == 0 or self.finished
        if (self.due(self.training.checkpoint_every) and good) or number or stops:
            checkpoint.save(self.state, self.config, self.run.folder)
            self.group.wait()  # no rank ends, upon which launchers end the others, before it is whole
            self.saved = self.images
        if stops:
            if self.group.first:
                curves.write(self.run.history, self.run.folder / "curves.png")
            raise TrainingAborted(f"{self.run.folder}: {stops}")
        if number and not self.finished:
            raise self.interrupted(number)

    def draw(self) -> None:
        """The pictures that are due, all after the checkpoint: a signal breaks them off, and resuming draws them.

        Raises:
            Interrupted: a signal.
        """
        first = self.shows_first
        grids = first or self.due(self.training.sample_every)
        if not grids and self.images != self.saved:
            return
        shown = self.state.whole([self.state.published_name]).published if grids else None
        try:
            with self.interruption.at_once(not self.finished):
                if shown is not None and self.group.first:
                    with eager():
                        save_grids(shown, self.shown, self.run.folder, self.images)
                if self.images == self.saved and self.group.first:
                    curves.write(self.run.history, self.run.folder / "curves.png")
        except KeyboardInterrupt:
            if not self.interruption.signal or self.finished:
                raise
        number = self.heard()
        if number and not self.finished:
            self.save_or_stop("", number)
        if first:
            self.progress.tell(f"first pictures: {self.run.folder / 'samples' / f'{self.images:09d}.png'}")

    def draw_missing(self) -> None:
        """What a signal broke off, or a kill, where the run goes on."""
        drawn = self.run.folder / "samples" / f"{self.images:09d}-reconstructions.png"
        if self.group.largest(self.group.first and self.images > 0 and not drawn.exists()):
            self.draw()
