"""What the commands share: what they print on, and what they refuse alike."""

from collections.abc import Sequence

from rich.console import Console

from onefold.errors import UserError

__all__ = ["check_resumed", "console", "hush"]

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Prints lines as they are: the name of a file may look like markup."""


def hush(line: str) -> None:
    """Takes a line and does not print it: the `say` of a quiet command."""


def check_resumed(options: Sequence[str], *besides: str) -> None:
    """Refuse options that would change a run which is resumed, but for those that find it.

    Raises:
        UserError: naming the first.
    """
    allowed = ("--resume", "--out", "--quiet", *besides)
    for option in options:
        if option.startswith("--") and option.partition("=")[0] not in allowed:
            raise UserError(f"{option}: a resumed run keeps its own settings; leave it out, or start a new run")
