"""Files that are written completely or not at all, and folders locked to one process at a time."""

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from onefold.errors import UserError, placeholder, printable, writing

__all__ = [
    "cache_folder",
    "is_unused",
    "locked",
    "read_tensors",
    "refuse_placeholder",
    "sha256_of",
    "unfinished",
    "write_tensors",
]
__all__ += ["write_whole"]

UNFINISHED = ".writing-"


def cache_folder() -> Path:
    """Where what is expensive to make is kept for the next time: `$ONEFOLD_CACHE`, or else `~/.cache/onefold`."""
    return Path(os.environ.get("ONEFOLD_CACHE") or Path.home() / ".cache" / "onefold")


def unfinished(path: Path) -> Path:
    """The temporary path of a file or folder that will be moved to `path`; a killed process leaves it behind."""
    return path.with_name(f"{UNFINISHED}{path.name}")


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary file, flush it to disk and move it to `path`; creates the folder.

    Raises:
        OSError: it could not be written; an existing file is left unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        # What is no UTF-8 in a name is escaped: as "\udce9", which JSON reads back to the same name.
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Generator[int]:
    """Keep other processes from working in a folder, which is created if missing.

    Yields the lock's descriptor, which a child process may hold too. On file systems without such locks (NFS, for
    example), other processes are not kept out.

    Raises:
        UserError: another process is working in it, or it cannot be created.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cure = "wait for it to finish, stop it, or choose another --out"
            raise UserError(f"{folder}: another process is working in this folder; {cure}") from None
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; empty if there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_placeholder(path: Path) -> None:
    """Refuse a file that is empty, or not the one that it stands for (see `errors.placeholder`).

    Raises:
        UserError: naming what it is; OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    what = placeholder(head) if head else "is empty; copy or download it again"
    if what is not None:
        raise UserError(f"{path}: {what}")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Tensors that share memory, such as tied weights, are each written by their own name."""
    separate: dict[str, Tensor] = {}
    seen = set[int]()
    for name, value in tensors.items():
        memory = value.untyped_storage().data_ptr()
        separate[name] = value.clone(memory_format=torch.contiguous_format) if memory in seen else value.contiguous()
        seen.add(memory)
    save_file(separate, path)
    usual = os.umask(0)  # it can only be read by setting it
    os.umask(usual)
    path.chmod(0o666 & ~usual)  # as every other file of a run; safetensors lets the owner alone read it


def read_tensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        UserError: an empty file, or one that only stands for another.
        OSError, SafetensorError: there is none, or it is something else or not whole.
    """
    refuse_placeholder(path)
    if printable(path) == str(path):
        tensors = load_file(path, device=str(device))
    else:  # safetensors opens no names that are not UTF-8
        tensors = {name: value.to(device) for name, value in load(path.read_bytes()).items()}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return tensors, header.get("__metadata__") or {}


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, or holds only unfinished files of a killed process."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(UNFINISHED) for path in folder.iterdir())
