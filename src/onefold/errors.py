"""The errors that reach the user, and how the names in them are written.

A `UserError` reports wrong input: the command prints its single line and exits with code 2. Its text names the file or
option and says what is wrong and how to fix it. `TrainingAborted` means that training cannot continue (exit code 3),
`Interrupted` that a signal ended it (143 for SIGTERM, 130 for Ctrl-C).

File names may contain line breaks, or bytes that are not UTF-8, which Python holds as lone surrogates and no terminal
accepts. `printable` escapes them as Python does, `quoted` as a shell reads them.
"""

import errno
import re
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["Elsewhere", "Interrupted", "TrainingAborted", "UserError", "placeholder", "printable", "quoted", "reason"]
__all__ += ["writing"]

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, what changes the direction of writing, and lone surrogates."""


class UserError(ValueError):
    """Wrong input; `str(error)` is one line that names the cause and the remedy. Exit code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class TrainingAborted(RuntimeError):
    """Training met non-finite values or a collapse from which it cannot recover. Exit code 3."""


class Interrupted(Exception):
    """A signal ended the training; what there was to save is saved. `signal` is its number."""

    def __init__(self, signal: int, line: str) -> None:
        super().__init__(line)
        self.signal = signal


class Elsewhere(Exception):
    """Another of the processes that work together has ended, and said why. `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("another rank has ended and said why")
        self.code = code


def printable(text: object) -> str:
    """A text, or the name of a file, on one line that any UTF-8 terminal and file takes: the rest is escaped."""

    def escaped(found: re.Match[str]) -> str:
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return found[0].encode("unicode_escape").decode("ascii")

    return _UNPRINTABLE.sub(escaped, str(text))


def quoted(path: object) -> str:
    """A path as an argument of a printed command: one word for a shell (bash, zsh), and no option."""
    text = str(path)
    text = f"./{text}" if text.startswith("-") else text
    if printable(text) == text:
        return shlex.quote(text)

    def escaped(found: re.Match[str]) -> str:
        how = "surrogateescape" if "\udc80" <= found[0] <= "\udcff" else "surrogatepass"
        return "".join(f"\\x{byte:02x}" for byte in found[0].encode("utf-8", how))

    return "$'" + _UNPRINTABLE.sub(escaped, re.sub(r"([\\'])", r"\\\1", text)) + "'"


def placeholder(head: bytes) -> str | None:
    """What a file is instead of what its name promises, by its first bytes, and the cure; None if it may be that.

    Git leaves a pointer of a hundred bytes where its extension for large files (LFS) is not installed, and a download
    may leave a web page.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
    if head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, not the file itself; download it again"
    return None


def reason(error: BaseException) -> str:
    """An error's message, on one line."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "no space left on the disk"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is where a folder should be"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn a failure to write `path` into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({reason(error)}); make room or choose another place") from error
