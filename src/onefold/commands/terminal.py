"""What the commands share: what they print on, and what they refuse alike."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from onefold.errors import UserError
from onefold.recipes import RECIPES
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.run import Run
from onefold.training.state import checkpoints

__all__ = [
    "Architecture",
    "check_resume_options",
    "console",
    "discard",
    "recipe_first",
    "resume_run",
    "with_architecture",
]

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Prints lines as they are: the name of a file may look like markup."""

Architecture = Literal["one-network", "three-networks"] | None
"""Of `--architecture`; None is the recipe's."""


def recipe_first(command: str, arguments: Sequence[str], *instead: str) -> tuple[str | None, list[str]]:
    """The recipe's name, which comes first, and the options behind it. Options that do without one: `instead`.

    Raises:
        UserError: neither is there.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    if not {*instead, "--help", "-h"} & set(arguments):
        known = ", ".join(RECIPES)
        raise UserError(f"{command}: give a recipe first, one of {known}; see `onefold {command} --help`")
    return None, list(arguments)


def with_architecture(config: Config, architecture: Architecture) -> Config:
    """The configuration of the architecture that is wanted, if one is."""
    if architecture is None:
        return config
    return config.with_changes({"network.architecture": architecture.replace("-", "_")})


def resume_run(run: Run, *, quiet: bool) -> Run:
    """A run, trained to its end; says so if it had reached it before."""
    images, saved = run.config.training.images, checkpoints(run.folder)
    if saved and int(saved[-1].name) >= images and not quiet:
        cure = "for a longer training, start a new run with more images"
        console.print(f"{run.folder}: already finished, at {images:,} images; {cure}")
    return loop.train(None, run.folder, resume=True, quiet=quiet)


def discard(line: str) -> None:
    """Takes a line and does not print it: the `say` of a quiet command."""


def check_resume_options(options: Sequence[str], *besides: str) -> None:
    """Refuse options that would change a run which is resumed, but for those that find it.

    Raises:
        UserError: naming the first.
    """
    allowed = ("--resume", "--out", "--quiet", *besides)
    for option in options:
        if option.startswith("--") and option.partition("=")[0] not in allowed:
            raise UserError(f"{option}: a resumed run keeps its own settings; leave it out, or start a new run")
