"""How a benchmark is called from the command line: what its user can mend is one line."""

from collections.abc import Callable

import tyro

from onefold.errors import Interrupted, TrainingAborted, UserError

__all__ = ["run"]


def run(main: Callable[..., None]) -> None:
    """Call `main` with the options of the command line."""
    try:
        tyro.cli(main)
    except (UserError, TrainingAborted, Interrupted) as error:
        raise SystemExit(str(error)) from None
