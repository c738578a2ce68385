"""How a benchmark is called from the command line: what its user can mend is one line, as of `onefold`."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onefold.commands.arguments import parse
from onefold.errors import Interrupted, TrainingAborted, UserError

__all__ = ["check_out", "run", "settings_of"]


def run(main: Callable[..., None]) -> None:
    """Call `main` with the options of the command line."""
    try:
        parse(main, sys.argv[1:], f"python {sys.argv[0]}")
    except (UserError, TrainingAborted, Interrupted) as error:
        raise SystemExit(str(error)) from None


def check_out(out: Path) -> None:
    """Refuse a folder for a benchmark's runs that is something else.

    Raises:
        UserError: it is the folder of a study or of a run.
    """
    for name, what in (("study.json", "study"), ("bias.json", "study"), ("config.json", "run")):
        if (out / name).exists():
            raise UserError(f"{out}: holds a {what}; choose another --out")


def settings_of(change: Sequence[str]) -> dict[str, Any]:
    """Settings by name, of words name=value with a value in JSON.

    Raises:
        UserError: naming the word that is something else.
    """
    found: dict[str, Any] = {}
    for each in change:
        name, _, value = each.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            raise UserError(f"-c: {each!r} is not name=value with a value in JSON, such as network.patch=4") from None
    return found
