"""Pieces: tensors that lie in several safetensors files, of which each has some of their rows.

What n ranks save under a name is `<name>-1-of-n.safetensors` to `<name>-n-of-n.safetensors`; what one saves,
`<name>.safetensors`. Rows are in the order of files, and what is not divided lies in the first. So the bytes of a
tensor are those of its pieces one after another: any number of ranks can read its rows, and they are joined without
being loaded.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from onefold.files import write_tensors

__all__ = ["Pieces", "write_piece"]

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a file."""
AT_ONCE = 1 << 24
"""Bytes that are copied at once."""


class Piece(NamedTuple):
    """Where some rows of a tensor are."""

    path: Path
    start: int
    """In bytes from the beginning of the file."""
    stop: int
    rows: int


class Pieces:
    """The tensors that `count` ranks have saved under a name."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        """Raises an OSError or ValueError if they are not there, or are something else."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors."""
        self._types: dict[str, str] = {}
        self._places: dict[str, list[Piece]] = {}
        for path in (folder / _file(name, k, count) for k in range(count)):
            for key, (dtype, shape, start, stop) in _header(path):
                rows = shape[0] if shape else 1
                self._places.setdefault(key, []).append(Piece(path, start, stop, rows))
                before = self.shapes.get(key)
                self.shapes[key] = shape if before is None else (before[0] + rows, *before[1:])
                self._types[key] = dtype

    def whole(self, key: str) -> Tensor:
        """A tensor."""
        return self._joined(key, self._places[key], self.shapes[key])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor; nothing else is read."""
        found, first = list[Piece](), 0
        for piece in self._places[key]:
            low, high = max(start - first, 0), min(stop - first, piece.rows)
            if low < high:
                each = (piece.stop - piece.start) // piece.rows
                found.append(Piece(piece.path, piece.start + low * each, piece.start + high * each, high - low))
            first += piece.rows
        return self._joined(key, found, (stop - start, *self.shapes[key][1:]))

    def join(self, path: Path, prefix: str = "") -> None:
        """Write the tensors whose names begin with a prefix, without it, into one file; in parts, each flushed."""
        header, at = dict[str, object](), 0
        for key in (names := [key for key in self.shapes if key.startswith(prefix)]):
            size = sum(piece.stop - piece.start for piece in self._places[key])
            described = {"dtype": self._types[key], "shape": self.shapes[key], "data_offsets": (at, at + size)}
            header[key.removeprefix(prefix)] = described
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in names:
                for piece in self._places[key]:
                    for start in range(piece.start, piece.stop, AT_ONCE):
                        file.write(_bytes(piece.path, start, min(start + AT_ONCE, piece.stop)))

    def _joined(self, key: str, pieces: list[Piece], shape: tuple[int, ...]) -> Tensor:
        found = bytearray().join(_bytes(piece.path, piece.start, piece.stop) for piece in pieces)
        dtype = TYPES[self._types[key]]
        return torch.frombuffer(found, dtype=dtype).view(shape) if found else torch.empty(shape, dtype=dtype)


def write_piece(tensors: Mapping[str, Tensor], folder: Path, name: str, k: int, count: int) -> Path:
    """Write the rows that rank k of `count` has; returns the file."""
    path = folder / _file(name, k, count)
    write_tensors(tensors, path)
    return path


def _file(name: str, k: int, count: int) -> str:
    return f"{name}.safetensors" if count == 1 else f"{name}-{k + 1}-of-{count}.safetensors"


def _header(path: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Of each tensor of a file: name, type, shape, and where its bytes start and stop."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(size))
    for name, found in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in found["data_offsets"])
            yield name, (found["dtype"], tuple(found["shape"]), start, stop)


def _bytes(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)
