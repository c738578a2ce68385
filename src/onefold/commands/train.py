"""`onefold train`."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from onefold import loggers, planner
from onefold.commands import tables
from onefold.commands.arguments import parse
from onefold.commands.terminal import (
    check_resume_options,
    console,
    discard,
    recipe_first,
    resume_run,
    with_architecture,
)
from onefold.errors import UserError, quoted
from onefold.files import sha256_of
from onefold.networks import Network
from onefold.networks.source import locate
from onefold.recipes import recipe
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.engine import Engine, alone
from onefold.training.one_run import with_one_step
from onefold.training.run import Run, check_new, load_run, open_data

__all__ = ["train"]


def train(arguments: list[str]) -> None:
    """Train one network, end to end."""
    name, options = recipe_first("train", arguments, "--resume")
    _check_options(options)
    default = _auto(options) if name == "auto" else recipe(name or "digits")

    def train_recipe(
        data: str | None = None,
        test_data: str | None = None,
        unreadable: Literal["refuse", "skip"] = default.data.unreadable,
        labels_from: str | None = default.data.labels_from,
        architecture: str | None = None,
        one_step: bool = False,
        out: Path | None = None,
        resume: bool = False,
        start: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
        images: int | None = None,
        minutes: float | None = None,
        steps: int | None = None,
        on_collapse: Literal["warn", "stop", "ignore"] | None = None,
        log: tyro.conf.UseAppendAction[tuple[Literal["tensorboard", "trackio", "wandb"], ...]] = (),
        engine: Engine = "ddp",
        quiet: bool = False,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Train one network, end to end. RECIPE comes first: auto, for images of your own, digits, fashion,
        cifar10, imagenet256-s, -m or -b.

        Example: onefold train auto --data photos.zip --minutes 30 --out runs/photos

        Args:
            data: Images to train on: digits, or the path of a folder or file. Default: the recipe's. With --resume, the
                place that they have now.
            test_data: Images for evaluation alone. Default: the data's test part (test/, val/), or a part set apart.
            unreadable: Stop at an image that cannot be read, or leave it out.
            labels_from: Where the labels are: a column or key; folders or dataset.json for image files; or none.
            architecture: one-network, three-networks (a baseline, in two stages) or pixels. Default: the recipe's.
            one_step: In the same run, the network also learns to generate in one step; its settings are --onerun.
            out: The run's folder. Default: runs/RECIPE.
            resume: Continue the run in --out from its newest checkpoint, with its own settings.
            start: Begin with the weights of this run or saved network, to go on with images of one's own.
            images: Length of the training; the same as training.images. With --resume, make the run longer.
            minutes: Of the recipe auto: how long the training may take. Default: 30.
            steps: Stop after so many optimiser steps (sets training.images), for a short trial.
            on_collapse: When the latents have collapsed: say so, stop with exit code 3, or log it only. Default: warn.
            log: Show the log there too, beside log.jsonl. May be given several times, also with --resume.
            engine: Of several processes (torchrun), each holds everything (ddp), or a shard of each weight, gradient,
                average and moment (fsdp); see docs/scale.md. Also with --resume.
            quiet: No progress bar, no summary.
            config: All settings of the run; the defaults shown are the recipe's.
        """
        if minutes is not None and name != "auto":
            raise UserError(
                f"--minutes: belongs to the recipe auto; give {name or 'a resumed run'} --images or --steps"
            )
        folder, say = out or Path("runs") / default.recipe, discard if quiet else console.print
        if resume:
            check_resume_options(options)
            run = _run_of(folder, name)
            with loggers.opened(log, folder, say) as callbacks:
                finished = resume_run(
                    run, images, data=data, test_data=test_data, callbacks=callbacks, quiet=quiet, engine=engine
                )
        else:
            config = with_architecture(
                config.with_changes({"data.unreadable": unreadable, "data.labels_from": labels_from}), architecture
            )
            if on_collapse is not None:
                config = config.with_changes({"training.on_collapse": on_collapse})
            config = _with_length(_with_data(config, data, test_data), images, steps)
            if one_step:
                config = with_one_step(config)
            elif config.onerun != default.onerun and "one_run" not in config.phases:
                raise UserError("--onerun: has no effect without --one-step; add it, or leave this out")
            config = config if start is None else _with_start(config, start, options)
            with loggers.opened(log, folder, say) as callbacks:
                finished = loop.train(config, folder, callbacks=callbacks, quiet=quiet, engine=engine)
        if not quiet:
            tables.show_run(console, finished)

    parse(train_recipe, options, f"onefold train {name or 'RECIPE'}")


def _check_options(options: Sequence[str]) -> None:
    """Refuse what the parser would refuse without its cure."""
    for option, following in itertools.zip_longest(options, options[1:], fillvalue="-"):
        if option.partition("=")[0] in ("--network.image-size", "--network.channels"):
            cure = "other sizes are made by `onefold data convert`"
            raise UserError(f"{option}: size and channels are read from the data; {cure}")
        if option == "--resume" and not following.startswith("-"):
            raise UserError(f"train --resume: the run's folder comes after --out: --resume --out {quoted(following)}")


def _auto(options: Sequence[str]) -> Config:
    """The configuration of the recipe auto, from the options that it follows from; says why it is what it is.

    Raises:
        UserError: no --data, data that cannot be read, or options that make no sense.
    """
    given = _values(
        options, "--data", "--test-data", "--minutes", "--unreadable", "--labels-from", "--training.device", "--out"
    )
    if {"--help", "-h", "--resume"} & set(options):
        return replace(recipe("digits"), recipe="auto")
    if "--out" in given:
        check_new(Path(given["--out"]))
    if "--data" not in given:
        raise UserError("train auto: give your images with --data; see `onefold train --help`")
    try:
        minutes = float(given.get("--minutes", 30))
    except ValueError:
        raise UserError(f"--minutes: {given['--minutes']!r} is not a number") from None
    source = recipe("digits").with_changes({"data.source": given["--data"], "data.test": given.get("--test-data")}).data
    unreadable = "skip" if given.get("--unreadable") == "skip" else "refuse"
    source = replace(source, unreadable=unreadable, labels_from=given.get("--labels-from"))
    data, _ = open_data(source)
    say = discard if "--quiet" in options else console.print
    device = given.get("--training.device", "auto")
    with alone():
        one_step = "--one-step" in options
        plan = planner.make_plan(data, source, minutes=minutes, one_step=one_step, device=device, say=say)
    for reason in plan.reasons:
        say(reason)
    picture = ", the first picture within two minutes" if plan.minutes > 2 else ""
    say(f"expected: {tables.duration(60 * plan.minutes)}{picture}")
    return plan.config


def _values(options: Sequence[str], *names: str) -> dict[str, str]:
    """What options of these names are given, as `--name value` or `--name=value`."""
    found: dict[str, str] = {}
    for option, value in itertools.zip_longest(options, options[1:], fillvalue=""):
        name, equals, after = option.partition("=")
        name = name.replace("_", "-")
        if name in names:
            found[name] = after if equals else value
    return found


def _run_of(folder: Path, name: str | None) -> Run:
    """The run in a folder, which is of the recipe if one is named."""
    run = load_run(folder)
    if name not in (None, run.config.recipe):
        raise UserError(f"{folder}: is a run of {run.config.recipe}, not of {name}; leave the recipe out to resume it")
    return run


def _with_data(config: Config, data: str | None, test_data: str | None) -> Config:
    """The configuration with --data and --test-data in it."""
    if data is not None:
        return config.with_changes({"data.source": data, "data.test": test_data})
    return config if test_data is None else config.with_changes({"data.test": test_data})


def _with_length(config: Config, images: int | None, steps: int | None) -> Config:
    """The configuration with --images or --steps in it."""
    if images is not None and steps is not None:
        raise UserError("--steps: cannot go with --images; choose one")
    if steps is not None:
        if steps < 1:
            raise UserError(f"--steps: {steps} is not positive; give at least 1")
        images = steps * config.training.batch
    return config if images is None else config.with_changes({"training.images": images})


def _with_start(config: Config, start: Path, options: Sequence[str]) -> Config:
    """The configuration of a run that begins with the weights of another, whose network it has."""
    for option in options:
        if option.startswith(("--network.", "--architecture")):
            raise UserError(f"{option}: the network is that of --from {start}; leave it out")
    network, sha256 = Network.from_pretrained(start), sha256_of(locate(start) / "model.safetensors")
    place = str(start.absolute()) if start.exists() else str(start)  # on the hub
    wanted, found = config.network, network.config
    paints = (wanted.jump_exit and found.kind.paints) or found.jump_exit
    own = replace(found, jump_rank=wanted.jump_rank or found.jump_rank, jump_exit=paints)
    return replace(config, network=own, start=place, start_sha256=sha256)
