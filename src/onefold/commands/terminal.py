"""What the commands share: what they print on, and what they refuse alike.

What needs torch is imported where it is used, so that `--help` does without it.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from onefold.errors import UserError

if TYPE_CHECKING:
    from onefold.training.config import Config
    from onefold.training.engine import Engine
    from onefold.training.loop import Callback
    from onefold.training.run import Run

__all__ = [
    "check_resume_options",
    "console",
    "discard",
    "recipe_first",
    "resume_run",
    "with_architecture",
]

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Prints lines as they are: the name of a file may look like markup."""


def recipe_first(command: str, arguments: Sequence[str], *instead: str) -> tuple[str | None, list[str]]:
    """The recipe's name, which comes first, and the options behind it. Options that do without one: `instead`.

    Raises:
        UserError: neither is there, or no recipe has that name.
    """
    from onefold.recipes import RECIPES

    known = [*RECIPES, "auto"] if command == "train" else [*RECIPES]
    if arguments and not arguments[0].startswith("-"):
        name, cure = arguments[0], f"choose one of {', '.join(known)}"
        if name == "auto" and name not in known:
            cure = f"`onefold train auto --data …` measures by itself; here, {cure}"
        if name not in known:
            raise UserError(f"{command}: no recipe is named {name}; {cure}")
        return name, list(arguments[1:])
    if not {*instead, "--help", "-h"} & set(arguments):
        choice = ", ".join(known)
        raise UserError(f"{command}: give a recipe first, one of {choice}; see `onefold {command} --help`")
    return None, list(arguments)


def with_architecture(config: "Config", architecture: str | None) -> "Config":
    """The configuration of the architecture that is wanted, if one is; its name may have hyphens.

    Raises:
        UserError: no such network is registered.
    """
    from onefold.networks.base import NETWORKS, architectures

    if architecture is None:
        return config
    name = architecture.replace("-", "_")
    if name not in NETWORKS:
        known = ", ".join(architectures()).replace("_", "-")
        raise UserError(f"--architecture: {architecture!r} is not known; choose one of {known}")
    return config.with_changes({"network.architecture": name})


def resume_run(
    run: "Run",
    images: int | None = None,
    *,
    data: str | None = None,
    test_data: str | None = None,
    callbacks: "Iterable[Callback]" = (),
    quiet: bool,
    engine: "Engine" = "ddp",
) -> "Run":
    """A run, trained to its end, or on to `images`; says so if it had reached it before. Its data may have moved."""
    from onefold.training import loop
    from onefold.training.checkpoint import checkpoints

    saved = checkpoints(run.folder)
    if images is None and saved and int(saved[-1].name) >= run.length and not quiet:
        cure = "--images with a larger number makes it longer"
        console.print(f"{run.folder}: already finished, at {run.length:,} images; {cure}")
    return loop.train(
        None,
        run.folder,
        resume=True,
        images=images,
        data=data,
        test_data=test_data,
        callbacks=callbacks,
        quiet=quiet,
        engine=engine,
    )


def discard(line: str) -> None:
    """Takes a line and does not print it: the `say` of a quiet command."""


def check_resume_options(options: Sequence[str], *besides: str) -> None:
    """Refuse options that would change a run which is resumed, but for those that find it or say how it is executed.

    Raises:
        UserError: naming the first.
    """
    allowed = ("--resume", "--out", "--quiet", "--log", "--images", "--data", "--test-data", "--engine", *besides)
    for option in options:
        if option.startswith("--") and option.partition("=")[0] not in allowed:
            raise UserError(f"{option}: a resumed run keeps its own settings; leave it out, or start a new run")
