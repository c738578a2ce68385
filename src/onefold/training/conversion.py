"""From a trained run, or a network from elsewhere, to a one-step generator: how its training is configured."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from onefold.errors import UserError
from onefold.files import sha256_of
from onefold.networks import Network
from onefold.networks.jump import RANK
from onefold.networks.source import is_run
from onefold.objectives.one_step import Method, OneStep
from onefold.objectives.self_distillation import SelfDistillation
from onefold.sampling import Sampler
from onefold.training.config import Config, TrainingConfig
from onefold.training.datasets import unsplit
from onefold.training.loop import Callback, train
from onefold.training.run import Run, load_run

__all__ = ["converted", "is_network", "of_network", "one_step_config", "onestep"]

AVERAGED = 70
"""Half-life of the generator's average, in updates."""


class Pace(NamedTuple):
    """How fast a generator learns."""

    length: float
    """Length of the phase, as a fraction of its teacher's training …"""
    warmup: float
    """… of its critic's warm-up, as a fraction of the phase …"""
    decay: float
    """… and of the fall of all rates to 0, at its end."""
    rate: float
    """Learning rate of the generator."""


WHOLE = Pace(length=0.75, warmup=1 / 8, decay=0.3, rate=2e-4)
"""With all weights."""
LOW_RANK = Pace(length=1.5, warmup=1 / 16, decay=0.5, rate=2e-3)
"""With low-rank changes, whose updates take two thirds of the time."""


def onestep(
    run: Run | Network | str | Path,
    out: str | Path | None = None,
    *,
    data: object = None,
    test_data: object = None,
    method: Method = "score",
    rank: int | None = None,
    images: int | None = None,
    unfinished: bool = False,
    changes: dict[str, Any] | None = None,
    callbacks: Iterable[Callback] = (),
    quiet: bool = False,
) -> Run:
    """Turn a trained run into a one-step generator; returns the new run and leaves the old one unchanged.

    Args:
        run: The trained run, or its folder; or a network, or the folder of a saved one, such as `adopt` makes.
        out: The new run's folder; default: the run's, with "-onestep" (or the method) appended; of a network in memory,
            runs/onestep.
        data: Images to learn from, as for `train`. Needed for a network, which has none of its own; default: the run's.
        test_data: Images of the same kind for evaluation alone.
        method: What it learns from: the difference of two scores (`score`: Diff-Instruct; `dmd`), or a density ratio.
        rank: Rank of what the generator changes in the network's matrices, which stay as they are beside it. Default:
            16. 0: all weights learn, the default by a ratio and for architectures that know no such changes.
        images: Length of the training; default: one and a half times the run's; three quarters if all weights learn.
        unfinished: Also start from a run that has not reached its end.
        changes: Further settings, such as {"onestep.critic_updates": 2, "training.seed": 1}.
        callbacks: Called with (run, line) after each line of the log.
        quiet: No progress bar.

    Raises:
        UserError: a run that cannot become a one-step generator, or invalid settings.
        TrainingAborted, Interrupted: as for `train`.
    """
    network, batch = run if isinstance(run, Network) else None, (changes or {}).get("training.batch")
    if isinstance(run, Network) or (not isinstance(run, Run) and is_network(run)):
        if data is None:
            raise UserError("data: a network has no images of its own; give those to learn from")
        config = of_network(run, images=images, batch=batch, method=method, rank=rank)
        beside = Path("runs", "network") if isinstance(run, Network) else Path(run)
    else:
        run = run if isinstance(run, Run) and data is test_data is None else _reopened(run, data, test_data)
        config = converted(run.folder, images=images, batch=batch, method=method, rank=rank, unfinished=unfinished)
        run.check_data()
        data, test_data = unsplit(*run.datasets) if run.datasets else (None, None)
        beside = run.folder
    config = config.with_changes(changes or {})
    folder = out or beside.with_name(f"{beside.name}-{'onestep' if method == 'score' else method}")
    return train(config, folder, data=data, test_data=test_data, network=network, callbacks=callbacks, quiet=quiet)


def _reopened(run: Run | str | Path, data: object, test_data: object) -> Run:
    return load_run(run.folder if isinstance(run, Run) else run, data=data, test_data=test_data)


def converted(
    folder: str | Path,
    *,
    images: int | None = None,
    batch: int | None = None,
    method: Method = "score",
    rank: int | None = None,
    unfinished: bool = False,
) -> Config:
    """The configuration that turns a trained run into a one-step generator; precision and compilation decided anew.

    Args:
        folder: The trained run, the teacher; or that of a saved network (see `of_network`).
        images: Length of the training.
        batch: Images per step; default: the teacher's.
        method: What it learns from …
        rank: … and the rank of the generator's changes (see `onestep`).
        unfinished: Also start from a run that has not reached its end.

    Raises:
        UserError: not a run, or one whose diffusion model is not finished, or that is already a one-step generator.
    """
    if is_network(folder):
        return of_network(folder, images=images, batch=batch, method=method, rank=rank)
    run = load_run(folder)
    check_teacher(run, unfinished=unfinished)
    if not run.images:
        raise UserError(f"{run.folder}: has no line in its log yet; train it on with `{run.resume_command}`")
    seen = min(run.images, run.config.training.images)  # all lengths follow from what the teacher has seen
    teacher = run.config.with_changes({"training.images": seen})
    config = one_step_config(teacher, images=images, batch=batch, method=method, rank=rank)
    anew = {"training.precision": "auto", "training.compile": "auto"}  # the teacher's were decided on its device
    return config.with_changes({"start": str(Path(folder).absolute()), "start_sha256": run.model_sha256, **anew})


def is_network(folder: str | Path) -> bool:
    """Whether a folder is that of a saved network, and not of a run."""
    folder = Path(folder)
    return (folder / "model.safetensors").is_file() and not is_run(folder / "config.json")


def of_network(
    source: Network | str | Path,
    *,
    images: int | None = None,
    batch: int | None = None,
    method: Method = "score",
    rank: int | None = None,
) -> Config:
    """The configuration that turns a network without a run into a one-step generator; its data are to be named.

    Lengths are those of a run of the default length, 64,000 images. Labels are not dropped: what a network from
    elsewhere knows of "no class" is unknown.

    Raises:
        UserError: no network, or already a one-step generator.
    """
    network = source if isinstance(source, Network) else Network.from_pretrained(source)
    if network.sampler.jumps:
        raise UserError(f"{source}: is already a one-step generator; give the network that it came from")
    objective = SelfDistillation(label_dropout=0.0)
    config = Config(recipe="none", network=network.config, objective=objective, training=TrainingConfig())
    config = one_step_config(config, images=images, batch=batch, method=method, rank=rank)
    if isinstance(source, Network):
        return config
    sha256 = sha256_of(Path(source) / "model.safetensors")
    return replace(config, start=str(Path(source).absolute()), start_sha256=sha256)


def one_step_config(
    config: Config,
    *,
    images: int | None = None,
    batch: int | None = None,
    method: Method = "score",
    rank: int | None = None,
) -> Config:
    """The one-step configuration that follows from a teacher's.

    Adam without momentum or weight decay, at a constant rate that decays at the end, from weights that are already
    good; the average has a half-life of `AVERAGED` updates of the generator. All lengths follow from the
    teacher's, or from `images`, and are whole batches.
    """
    if rank is None:
        rank = RANK if method != "ratio" and config.network.kind.has_jump() else 0
    if not 0 <= rank <= config.network.width:
        raise UserError(f"--rank: {rank} is not within 0 (all weights learn) and the width, {config.network.width}")
    batch = config.training.batch if batch is None else batch
    pace = LOW_RANK if rank else WHOLE
    images = batch * max(2, round(pace.length * config.training.images / batch)) if images is None else images
    options = OneStep(method=method, critic_warmup=batch * max(1, round(pace.warmup * images / batch)))
    training = replace(
        config.training,
        optimizer="adamw",
        images=images,
        batch=batch,
        learning_rate=pace.rate,
        betas=(0.0, 0.99),
        weight_decay=0.0,
        warmup=0,
        decay=pace.decay,
        ema_half_lives=(AVERAGED * batch,),
        ema_ramp=1.0,
        health_every=50 * batch,
    )
    sampler = Sampler(steps=1, solver="refine", start=options.start)
    network = replace(config.network, jump_rank=rank, jump_exit=False)
    return replace(config, network=network, phases=("one_step",), training=training, onestep=options, sampler=sampler)


def check_teacher(run: Run, *, unfinished: bool = False) -> None:
    """Reject a run that cannot become a one-step generator.

    Raises:
        UserError: the run is unfinished, or already a one-step generator.
    """
    if {"one_step", "one_run"} & set(run.config.phases):
        cure = "give the run that it came from" if "one_step" in run.config.phases else "it needs no conversion"
        raise UserError(f"{run.folder}: is already a one-step generator; {cure}")
    if run.images < run.length and not unfinished:
        raise UserError(
            f"{run.folder}: its diffusion model is not finished ({run.images:,} of {run.length:,} images); continue "
            f"with `{run.resume_command}`, or start from its current state with --unfinished"
        )
