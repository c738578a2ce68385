"""`onefold onestep`."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from onefold import loggers, settings
from onefold.commands import tables
from onefold.commands.arguments import parse
from onefold.commands.terminal import check_resume_options, console, discard, resume_run
from onefold.errors import UserError
from onefold.files import sha256_of
from onefold.objectives.one_step import Method, OneStep
from onefold.recipes import recipe
from onefold.training import loop
from onefold.training.config import TrainingConfig
from onefold.training.conversion import converted, is_network, one_step_config
from onefold.training.engine import Engine
from onefold.training.run import Run, load_run

__all__ = ["onestep"]


def onestep(arguments: list[str]) -> None:
    """Make a one-step generator of a trained run."""
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and not {"--help", "-h"} & set(arguments):
        raise UserError("onestep: give the folder of a trained run first; see `onefold onestep --help`")
    teacher, given = (Path(arguments[0]), arguments[1:]) if named else (Path("RUN"), arguments)
    resumes = "--resume" in given or not named
    begun = "--unfinished" in given
    method, rank = _word(given, "--method"), _word(given, "--rank")  # on which the other defaults depend
    way: dict[str, Any] = {"method": method} if method in get_args(Method) else {}
    way |= {"rank": int(rank)} if rank is not None and rank.isdecimal() else {}
    default = one_step_config(recipe("digits"), **way) if resumes else converted(teacher, unfinished=begun, **way)

    def onestep_run(
        method: Method = "score",
        rank: int | None = None,
        data: str | None = None,
        test_data: str | None = None,
        out: Path | None = None,
        images: int | None = None,
        resume: bool = False,
        unfinished: bool = False,
        on_collapse: Literal["warn", "stop", "ignore"] = "warn",
        log: tyro.conf.UseAppendAction[tuple[Literal["tensorboard", "trackio", "wandb"], ...]] = (),
        engine: Engine = "ddp",
        quiet: bool = False,
        options: Annotated[OneStep, tyro.conf.arg(name="onestep")] = default.onestep,
        training: TrainingConfig = default.training,
    ) -> None:
        """Make a one-step generator of a trained run, RUN, which comes first and stays as it is; or of a saved network,
        with --data.

        The same network is taught by its own score, or by the data through a learned density ratio.

        Example: onefold onestep runs/digits --out runs/digits-onestep

        Args:
            method: What teaches it: the difference of two scores (score: Diff-Instruct; dmd), or a density ratio, which
                needs no score, takes longer, and can then choose among samples (`onefold sample --best-of`).
            rank: Rank of what the generator changes in the network's matrices, which stay as they are beside it. 0: all
                weights learn. Default: 16; by a ratio, and of networks from elsewhere, 0.
            data: Where the images that RUN was trained on are now; or, for a saved network, the images to learn from.
                Default: where they were.
            test_data: Likewise its test images.
            out: Folder of the new run. Default: RUN-onestep (RUN-ratio, RUN-dmd).
            images: Length of the training; the same as training.images. With --resume, make the run longer.
            resume: Continue the run in --out from its newest checkpoint, with its own settings.
            unfinished: Also begin from a run that has not reached its end.
            on_collapse: When the samples leave the data: say so, stop with exit code 3, or log it only.
            log: Show the log there too, beside log.jsonl. May be given several times, also with --resume.
            engine: As of `onefold train`.
            quiet: No progress bar, no summary.
            options: How generator and critic are trained.
            training: Settings of the new run; the defaults shown follow from RUN.
        """
        beside = teacher if teacher.name not in ("", "..") else teacher.resolve()
        name = f"{teacher.resolve().name}-{'onestep' if method == 'score' else method}"
        folder, say = out or beside.with_name(name), discard if quiet else console.print
        if resume:
            check_resume_options(given, "--method")  # which names the folder
            run = _run_of(folder, teacher)
            with loggers.opened(log, folder, say) as callbacks:
                finished = resume_run(
                    run, images, data=data, test_data=test_data, callbacks=callbacks, quiet=quiet, engine=engine
                )
        else:
            own = replace(training, images=training.images if images is None else images, on_collapse=on_collapse)
            begins = partial(converted, teacher, unfinished=unfinished)
            derived = begins(images=own.images, batch=own.batch, method=method, rank=rank)
            run = None if is_network(teacher) else load_run(teacher)
            if run is None and data is None:
                raise UserError(f"--data: {teacher} is a network, not a run; give the images to learn from")
            if run is not None and run.images < run.length and not quiet:
                console.print(
                    f"{teacher}: stopped at {run.images:,} of {run.length:,} images; begins from what there is"
                )
            own = settings.with_new_defaults(own, default.training, derived.training)
            how = settings.with_new_defaults(options, default.onestep, derived.onestep)
            config = replace(derived, training=own, onestep=replace(how, method=method))
            places = {"data.source": data, "data.test": test_data}
            config = config.with_changes({name: place for name, place in places.items() if place is not None})
            if run is not None:
                Run(teacher, config).check_data()
            with loggers.opened(log, folder, say) as callbacks:
                finished = loop.train(config, folder, callbacks=callbacks, quiet=quiet, engine=engine)
        if not quiet:
            tables.show_run(console, finished)

    parse(onestep_run, given, f"onefold onestep {teacher}")


def _word(arguments: list[str], option: str) -> str | None:
    """What is given with an option, before anything is parsed."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument == option or argument.startswith(f"{option}="):
            return argument.partition("=")[2] or following
    return None


def _run_of(folder: Path, teacher: Path) -> Run:
    """The one-step run in a folder, which must have been made of the teacher, as far as that is still there."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no one-step run there yet; leave --resume out, or name the run with --out")
    run = load_run(folder)
    if "one_step" not in run.config.phases:
        raise UserError(f"{folder}: is not a one-step run; resume it with `{run.resume_command}`")
    there = sha256_of(teacher / "model" / "model.safetensors")
    if Path(run.config.start).resolve() != teacher.resolve() and there not in ("", run.config.start_sha256):
        raise UserError(f"{folder}: was made of {run.config.start}, not of {teacher}; see its --out")
    return run
