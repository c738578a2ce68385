"""The errors that reach the user.

A `UserError` reports wrong input: the command prints its single line and exits with code 2. Its text names the file or
option and says what is wrong and how to fix it. `TrainingAborted` means that training cannot continue (exit code 3).
"""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["TrainingAborted", "UserError", "reason", "writing"]


class UserError(ValueError):
    """Wrong input; `str(error)` is one line that names the cause and the remedy. Exit code 2."""


class TrainingAborted(RuntimeError):
    """Training met non-finite values or a collapse from which it cannot recover. Exit code 3."""


def reason(error: BaseException) -> str:
    """An error's message, on one line."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is where a folder should be"
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
