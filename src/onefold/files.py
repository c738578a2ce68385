"""Files that are written whole or not at all, whenever the process is killed and however full the disk is."""

import os
from pathlib import Path

__all__ = ["UNFINISHED", "write_whole"]

UNFINISHED = ".writing-"
"""What the names of files and folders begin with that are not written to their end; a kill leaves them behind."""


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text beside its place, flush it to the disk and move it there; makes the folder.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
