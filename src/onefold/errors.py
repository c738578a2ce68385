"""The errors that reach a person.

A `UserError` is wrong input: the command prints its single line and exits with 2. Its text names the file or
option, says what is wrong and how to mend it. `TrainingAborted` is a training that cannot go on (exit code 3), and
`Interrupted` one that a signal has ended (143 for SIGTERM, 130 for Ctrl-C).
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["Interrupted", "TrainingAborted", "UserError", "reason", "writing"]


class UserError(ValueError):
    """Wrong input; `str(error)` is one line that names the cause and the cure. Exit code 2."""


class TrainingAborted(RuntimeError):
    """Training met non-finite numbers or a collapse that it cannot leave. Exit code 3."""


class Interrupted(Exception):
    """A signal ended the training; what there was to save is saved. `signal` is its number."""

    def __init__(self, signal: int, line: str) -> None:
        super().__init__(line)
        self.signal = signal


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file stands where a folder belongs"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn a failure to write `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); make room or choose another place") from error
