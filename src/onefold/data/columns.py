"""Columns of tables: in memory, mapped, or on the disk in groups of rows; and files that are not whole."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onefold.errors import UserError

_GROUPS = 2
"""Groups of rows of a file on the disk that are in memory at a time."""


class Damaged(UserError):
    """A file that cannot be read as what it should be: `why`."""

    def __init__(self, source: str, kind: str) -> None:
        super().__init__(f"{source}: not a whole {kind} file; copy or write it again")
        self.why = f"not a whole {kind} file"


class Column(Protocol):
    """The column of the images of one table."""

    @property
    def holds_bytes(self) -> bool:
        """Whether all images are certainly in the table itself, none in a file that it names."""
        ...

    def __len__(self) -> int: ...

    def value(self, row: int) -> object:
        """What a row holds; from any thread."""
        ...


class Held:
    """A column in memory, or mapped from the disk."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @property
    def holds_bytes(self) -> bool:
        import pyarrow as pa

        kind = self._column.type
        if pa.types.is_struct(kind):
            fields = [kind.field(k).name for k in range(kind.num_fields)]
            return "bytes" in fields and all(chunk.field("bytes").null_count == 0 for chunk in self._column.chunks)
        return not (pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def value(self, row: int) -> object:
        return self._column[row].as_py()


class OnDisk:
    """A column of a large parquet file, of which `_GROUPS` groups of rows are in memory at a time."""

    def __init__(self, path: Path, name: str, metadata: Any) -> None:
        self._path, self._name, self._metadata = path, name, metadata
        rows = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *rows])
        self._group = lru_cache(_GROUPS)(self._read)

    @classmethod
    def of(cls, source: str, path: Path, name: str) -> "OnDisk":
        """A column of a file. Raises a UserError where it is not whole."""
        import pyarrow.parquet as pq

        return cls(path, name, guarded(source, path, pq.read_metadata, path))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def holds_bytes(self) -> bool:
        names = {self._name, f"{self._name}.bytes"}
        chunks = [chunk for chunk in _chunks(self._metadata) if chunk.path_in_schema in names]
        whole = [chunk.is_stats_set and chunk.statistics.null_count == 0 for chunk in chunks]
        return bool(whole) and all(whole)

    def value(self, row: int) -> object:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._group(group)[row - int(self._starts[group])].as_py()

    def _read(self, group: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._path, metadata=self._metadata) as file:  # its own: it is not for several threads
            return file.read_row_group(group, columns=[self._name], use_threads=False).column(0)


def _chunks(metadata: Any) -> Iterator[Any]:
    """The pieces that the columns of a parquet file are stored in."""
    for k in range(metadata.num_row_groups):
        group = metadata.row_group(k)
        yield from (group.column(j) for j in range(group.num_columns))


def plain(column: Any) -> NDArray[np.integer] | list[object]:
    """Labels: as an array where they are integers, for a list of them takes many times the memory."""
    import pyarrow as pa

    if pa.types.is_integer(column.type) and column.null_count == 0:
        return column.to_numpy()
    return column.to_pylist()


def joined(parts: Sequence[NDArray[np.integer] | list[object]]) -> NDArray[np.integer] | list[object]:
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    return [value for part in parts for value in (part.tolist() if isinstance(part, np.ndarray) else part)]


def guarded(source: str, path: Path, action: Callable[..., Any], *arguments: Any) -> Any:
    """What `action` gives. Raises a UserError where the file is broken."""
    import pyarrow as pa

    try:
        return action(*arguments)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(source, path.suffix[1:]) from error
