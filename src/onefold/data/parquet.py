"""A table of encoded images in a .parquet file, as the Hugging Face Hub stores data sets.

The column `image` (or `img`) holds the files' bytes, or a struct with a field `bytes`. The optional column
`label` holds integers or words; where the table carries Hugging Face's names of the classes, they are kept.
The table is held in memory in its encoded form.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import number_labels
from onefold.data.listing import FileListing
from onefold.errors import UserError

Table: TypeAlias = Any
"""A pyarrow.Table: pyarrow is optional, and brings no types."""


def list_parquet(source: str, path: Path) -> FileListing:
    """List the rows of a table. Raises UserError when pyarrow is missing or the columns do not fit."""
    table = _load(source, path)
    if len(table) == 0:
        raise UserError(f"{source}: holds no images, for its table has no rows; write at least one")
    column = table.column("image" if "image" in table.column_names else "img")
    labels, class_names = _labels(source, table)

    def read(index: int, limit: int | None) -> bytes:
        value = column[index].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row holds no bytes, perhaps only a path; store the images in the table")
        return data if limit is None else data[:limit]

    return FileListing(source, [f"row {k}" for k in range(len(column))], labels, class_names, read)


def _load(source: str, path: Path) -> Table:
    """Read the columns that matter. Raises UserError when they are not there."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{source}: reading .parquet needs pyarrow; run: pip install 'onefold[parquet]'") from error
    try:
        schema = pq.read_schema(path)
        wanted = [name for name in ("image", "img", "label") if name in schema.names]
        table = pq.read_table(path, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: not a whole parquet file; copy or write it again") from error
    image = next((name for name in ("image", "img") if name in wanted), None)
    if image is None:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{source}: holds no column image (found: {found}); rename the one that is meant")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{source}: column {image} holds {kind}; store each image's file as bytes")
    return table


def _labels(source: str, table: Table) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Give labels, int64 (n,), and class names, by Hugging Face's metadata or else by the values."""
    unlabelled = np.zeros(len(table), dtype=np.int64), ()
    if "label" not in table.column_names:
        return unlabelled
    values = table.column("label").to_pylist()
    if None in values:
        raise UserError(f"{source}: row {values.index(None)} has no label; fill it, or drop the column label")
    names = _hub_names(table)
    if names is None:
        return number_labels(source, values)
    if all(value == -1 for value in values):  # the Hub's mark for a test set without labels
        return unlabelled
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise UserError(
                f"{source}: row {row} has label {value}, but there are {len(names)} classes; mend the table"
            )
    return np.array(values, dtype=np.int64), names


def _hub_names(table: Table) -> tuple[str, ...] | None:
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (TypeError, ValueError, KeyError):
        return None
