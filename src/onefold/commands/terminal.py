"""What the commands print on."""

from rich.console import Console

__all__ = ["console", "hush"]

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Prints lines as they are: the name of a file may look like markup."""


def hush(line: str) -> None:
    """Takes a line and does not print it: the `say` of a quiet command."""
