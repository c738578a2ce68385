"""`onefold train`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from onefold.commands import tables
from onefold.commands.arguments import parse
from onefold.commands.terminal import (
    Architecture,
    check_resume_options,
    console,
    recipe_first,
    resume_run,
    with_architecture,
)
from onefold.errors import UserError
from onefold.recipes import recipe
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.run import Run, load_run

__all__ = ["train"]


def train(arguments: list[str]) -> None:
    """Train one network, end to end."""
    name, options = recipe_first("train", arguments, "--resume")
    default = recipe(name or "digits")
    for option in options:
        if option.partition("=")[0] in ("--network.image-size", "--network.channels"):
            cure = "other sizes are made by `onefold data convert`"
            raise UserError(f"{option}: size and channels are read from the data; {cure}")

    def train_recipe(
        data: str | None = None,
        test_data: str | None = None,
        unreadable: Literal["refuse", "skip"] = default.data.unreadable,
        architecture: Architecture = None,
        out: Path | None = None,
        resume: bool = False,
        steps: int | None = None,
        on_collapse: Literal["warn", "stop", "ignore"] | None = None,
        quiet: bool = False,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Train one network, end to end. RECIPE comes first: digits, cifar10, imagenet256-s, -m or -b.

        Example: onefold train cifar10 --data cifar10-train.zip --out runs/cifar10 --training.batch 128

        Args:
            data: Images to train on: digits, a folder, .zip, .npz or .parquet. Default: the recipe's.
            test_data: Images for evaluation alone. Default: a part set apart from the data.
            unreadable: Stop at an image that cannot be read, or leave it out.
            architecture: One network, or the baseline of three, trained in two stages. Default: the recipe's.
            out: The run's folder. Default: runs/RECIPE.
            resume: Continue the run in --out from its newest checkpoint, with its own settings.
            steps: Stop after so many optimiser steps (sets training.images), for a short trial.
            on_collapse: When the latents have collapsed: say so, stop with exit code 3, or log it only. Default: warn.
            quiet: No progress bar, no summary.
            config: All settings of the run; the defaults shown are the recipe's.
        """
        if resume:
            check_resume_options(options)
            finished = _resume(out or Path("runs") / default.recipe, name, quiet=quiet)
        else:
            config = with_architecture(config.with_changes({"data.unreadable": unreadable}), architecture)
            if on_collapse is not None:
                config = config.with_changes({"training.on_collapse": on_collapse})
            finished = loop.train(_with_options(config, data, test_data, steps), out, quiet=quiet)
        if not quiet:
            tables.show_run(console, finished)

    parse(train_recipe, options, f"onefold train {name or 'RECIPE'}")


def _resume(folder: Path, name: str | None, *, quiet: bool) -> Run:
    """The run, which is of the recipe if one is named, trained to its end."""
    run = load_run(folder)
    if name not in (None, run.config.recipe):
        raise UserError(f"{folder}: is a run of {run.config.recipe}, not of {name}; leave the recipe out to resume it")
    return resume_run(run, quiet=quiet)


def _with_options(config: Config, data: str | None, test_data: str | None, steps: int | None) -> Config:
    """The configuration with --data, --test-data and --steps in it."""
    if data is not None:
        config = config.with_changes({"data.source": data, "data.test": test_data})
    elif test_data is not None:
        config = config.with_changes({"data.test": test_data})
    if steps is not None:
        if steps < 1:
            raise UserError(f"--steps: {steps} is not positive; give at least 1")
        config = config.with_changes({"training.images": steps * config.training.batch})
    return config
