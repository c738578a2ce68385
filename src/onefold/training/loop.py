"""The training loop, to be read from top to bottom.

    data → x, y → loss and gradient → clip → finite? → optimizers → averages → log, pictures, checkpoint

`training_step` is all that changes the weights; `train` prepares a run and owns its files. A step does not make the
host wait for the device: it may prepare the next ones meanwhile, and learns of skipped steps when it looks.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onefold import metrics
from onefold.alarm import CURE, ONESTEP_CURE
from onefold.compute import eager, resolve_device
from onefold.data import Dataset, Loader, read_all
from onefold.errors import TrainingAborted, UserError, writing
from onefold.files import locked
from onefold.objectives.self_distillation import Draws, Losses, draw, self_distillation
from onefold.objectives.two_stages import autoencoder, diffusion
from onefold.pictures import curves
from onefold.pictures.grids import save_grids
from onefold.pixels import to_float
from onefold.training import ema
from onefold.training import state as states
from onefold.training.config import Config
from onefold.training.engine import Interruption, autocast, resolved
from onefold.training.health import Watch
from onefold.training.log import ImageProgress, RunLog, Window, in_words, peak_memory, watched
from onefold.training.onestep import keep_teacher, onestep_step, teacher_of
from onefold.training.onestep_watch import OneStepWatch
from onefold.training.optimizer import guarded_step, rate_factor, set_rates
from onefold.training.run import Run, check_new, create_folder, fitted, load_run, note_skipped, open_data
from onefold.training.stages import enter, stage_at
from onefold.training.state import Skips, TrainingState

__all__ = ["Interrupted", "train", "training_step"]

SKIPS_IN_ROW = 10
"""Where the host sees so many steps in a row without a finite gradient, or more, it gives the present weights up. It
looks at least once in so many steps, so that fewer than twice as many pass before.
"""


class Interrupted(Exception):
    """A signal ended the training; everything is saved. `signal` is its number."""

    def __init__(self, signal: int, line: str) -> None:
        super().__init__(line)
        self.signal = signal


def training_step(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
    """One optimiser step on images x (B, C, H, W) in [−1, 1] with labels y (B,).

    A step whose gradient is not finite is skipped: it changes neither the weights nor the optimisers' state, and the
    averages go on towards weights that stood still. The device alone decides that; the host does not wait for it.
    Returns the parts of the loss and the norm of the gradient before clipping, still on the device.
    """
    training, counters = config.training, state.counters
    stage = stage_at(counters.images, config)
    set_rates(state.optimizers, counters.images - stage.start, stage.training)
    parts = backward(state, x, y, config)
    norm, skipped = guarded_step(state.network, state.optimizers, training.clip)
    state.skips.count(skipped)
    counters.images += len(x)
    for average, half_life in zip(state.averages, training.ema_half_lives, strict=True):
        survival = ema.decay(half_life, training.ema_ramp, counters.images - stage.start, len(x))
        ema.update(average, state.network, survival)
    return {**parts, "gradient_norm": norm}


def backward(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
    """Add the gradient of the mean loss of a batch, micro-batch by micro-batch; returns the parts of the loss."""
    shape = (config.network.tokens, config.network.latent_channels)
    draws = draw(config.objective, len(x), shape, state.generator(config.training.seed, x.device))
    micro = config.training.micro_batch or len(x)
    parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=x.device))
    for start in range(0, len(x), micro):
        stop = min(start + micro, len(x))
        share = (stop - start) / len(x)
        with autocast(config.training, x.device):
            losses = loss(state, x[start:stop], y[start:stop], draws.part(start, stop), config)
        (share * losses.total).backward()
        for name, value in losses.parts.items():
            parts[name] = parts[name] + share * value
    return dict(parts)


def loss(state: TrainingState, x: Tensor, y: Tensor, draws: Draws, config: Config) -> Losses:
    """The objective of the run's present stage; one network has a single one."""
    network, target, objective = state.network, state.averages[0], config.objective
    stage = stage_at(state.counters.images, config)
    if stage.name == "autoencoder":
        return autoencoder(network, target, x, draws, objective, config.stages)
    if stage.name == "diffusion":
        return diffusion(network, x, y, draws, objective)
    return self_distillation(network, target, x, y, draws, objective)


def train(config: Config | None, out: str | Path | None = None, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train one network; returns the finished run.

    Args:
        config: A recipe's configuration; image size, channels and classes are taken from the data (see
            `training.run.fitted`). Not needed to resume.
        out: The run's folder; default `runs/<recipe>`.
        resume: Continue the run in `out` from its newest complete checkpoint, with its own configuration.
        quiet: No progress bar.

    Raises:
        UserError: settings, data or a folder that cannot be used.
        TrainingAborted: gradients that stay non-finite, or latents that collapse with `on_collapse="stop"`.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint has been written.
    """
    folder = Path(out) if out else Path("runs") / (config.recipe if config else "")
    if resume:
        config = load_run(folder).config
    elif config is None:
        raise UserError("config: nothing to train; give a configuration, or a run to resume")
    device = resolve_device(config.training.device)
    data, test = open_data(config.data)
    if resume:
        _check_fit(config, data)
    else:
        config = resolved(fitted(config, data), device, print if watched(quiet) else lambda line: None)
        if config.onestep is not None:
            teacher_of(config)  # what is wrong is said before anything is written
            if config.onestep.features:
                metrics.from_file(config.onestep.features)
        check_new(folder)
    with locked(folder):
        run = Run(folder, config) if resume else create_folder(folder, config)
        left_out = note_skipped(run, data, test)
        if left_out and not quiet:
            print(left_out)
        state = _state_from(run, states.checkpoints(run.folder), device)
        if state.counters.images:
            states.publish(state, folder)  # in case that a kill came between the checkpoint and this
        with (
            writing(folder),
            Interruption() as interruption,
            ImageProgress("training", config.training.images, done=state.counters.images, quiet=quiet) as progress,
        ):
            _train_on(run, state, data, test, device, interruption, progress)
    return run


def _train_on(
    run: Run,
    state: TrainingState,
    data: Dataset,
    test: Dataset,
    device: torch.device,
    interruption: Interruption,
    progress: ImageProgress,
) -> None:
    """Steps, and after each what is due: a look at the skipped ones, log and health, pictures, checkpoint, stop."""
    config, training = run.config, run.config.training
    log = RunLog(run.folder / "log.jsonl", images=state.counters.images)
    shown, _ = read_all(test, np.arange(min(len(test), 30)))
    shown = shown.to(device)
    say = progress.say
    watch = OneStepWatch(run, data, test, device, say) if config.onestep else Watch(run, test, device)
    step = onestep_step if config.onestep else training_step
    loader = _loader(data, config, state, device)
    while state.counters.images < training.images:
        enter(state, config, data)
        state.window.begin()
        x, y = next(loader)
        values = step(state, to_float(x), y, config)
        state.window.add(values, skipped=state.skips.last)
        images, finished = state.counters.images, state.counters.images >= training.images

        def due(every: int, images: int = images, finished: bool = finished) -> bool:
            return finished or images // every > (images - training.batch) // every

        logs = due(training.log_every) or due(training.health_every)
        looks = logs or due(training.checkpoint_every) or due(SKIPS_IN_ROW * training.batch)
        given_up = looks and state.read_skips() >= SKIPS_IN_ROW  # here the host waits for the device
        state.window.end(len(x))
        progress.update(images)
        if given_up:
            loader.close()
            state = _rolled_back(run, state, device, progress)
            log = RunLog(run.folder / "log.jsonl", images=state.counters.images)
            loader = _loader(data, config, state, device)
            continue
        line: dict[str, Any] = {}
        if logs:
            means = state.window.means()
            line = {"images": images, **means, "peak_memory": peak_memory(device)}
            stage = stage_at(images, config)
            factor = rate_factor(images - stage.start, stage.training)
            line |= {"rate_factor": factor, "skipped": state.counters.skipped}
            if due(training.health_every):
                line |= watch.look(state, line, say)
            log.write(line)
            progress.update(images, note=in_words(means))
            state.window = Window()
        if due(training.sample_every):
            with eager():
                save_grids(state.published, shown, run.folder, images)
        collapsed = line.get("alarm") if training.on_collapse == "stop" else None
        # Not amid skipped steps: a roll-back wants weights from before the trouble began.
        good = state.counters.skipped_in_row == 0 or finished
        if (due(training.checkpoint_every) and good) or interruption.signal or collapsed:
            states.save(state, config, run.folder)
            curves.write(run.history, run.folder / "curves.png")
        if collapsed:
            loader.close()
            has, cure = ("latents have collapsed", CURE)
            if config.onestep is not None:
                has, cure = ("generator has departed from the data", ONESTEP_CURE)
            raise TrainingAborted(f"{run.folder}: the {has} at {images:,} images, saved: {collapsed}; {cure}")
        if interruption.signal and not finished:
            loader.close()
            where = f"stopped at {images:,} of {training.images:,} images, saved; go on with --resume"
            raise Interrupted(interruption.signal, f"{run.folder}: {where}")
    loader.close()


def _loader(data: Dataset, config: Config, state: TrainingState, device: torch.device) -> Loader:
    training, workers = config.training, config.data.workers
    start = state.counters.images
    return Loader(data, batch=training.batch, seed=training.seed, start=start, workers=workers, device=device)


def _check_fit(config: Config, data: Dataset) -> None:
    """A run goes on with the kind of data that it began with."""
    if fitted(config, data) != config:
        network, shape = config.network, data.image_shape
        raise UserError(
            f"{config.data.source}: now holds {shape} with {data.classes} classes, but the run began with "
            f"{(*network.image_size, network.channels)} and {network.classes}; restore the data or start a new run"
        )


def _state_from(run: Run, found: list[Path], device: torch.device) -> TrainingState:
    """The state of the last of these checkpoints, or a fresh one."""
    teacher = keep_teacher(run).to(device) if run.config.onestep else None
    if found:
        state = states.load(run.config, found[-1], device, teacher)
    else:
        state = TrainingState.fresh(run.config, device, teacher)
    if run.config.training.compile == "yes":
        state.compile()
    return state


def _rolled_back(run: Run, state: TrainingState, device: torch.device, progress: ImageProgress) -> TrainingState:
    """The state of the newest checkpoint that was not saved amid skipped steps, with other random numbers ahead; once.

    Raises:
        TrainingAborted: it happened before, or there is no such checkpoint.
    """
    good = [path for path in states.checkpoints(run.folder) if not states.is_amid_skips(path)]
    skipped, in_row = state.counters.skipped, state.counters.skipped_in_row
    trouble = f"{run.folder}: {in_row} steps in a row had no finite gradient at {state.counters.images:,} images"
    cure = "lower training.learning_rate or use --training.precision float32"
    if state.counters.rollbacks or not good:
        raise TrainingAborted(f"{trouble}; the newest good checkpoint is kept; {cure}")
    state = _state_from(run, good, device)
    state.counters.rollbacks, state.skips = 1, Skips(device, skipped)
    progress.say(f"{trouble}; back to {state.counters.images:,} images, with other noise")
    return state
