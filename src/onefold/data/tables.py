"""Tables of encoded images, as the Hugging Face Hub stores data sets and `datasets.save_to_disk` writes them.

A file is .parquet or .arrow; a folder of such files is a set in shards, whose names tell the part:
train-00000-of-00002.parquet. The column `image` (or `img`, or the one that the table itself calls an image) holds the
files' bytes, or a struct with a field `bytes`, or a `path` of a file in the table's folder. The column of the labels is
`label`, or another word for it, or the one that the table itself calls a ClassLabel, whose names of the classes are
kept. Parquet files of up to 1 GiB together are held in memory in their encoded form, of more a few groups of rows at a
time; those of Arrow are mapped from the disk.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import choose_column, classes_of, distinct, looks_like_labels, natural_key
from onefold.data.columns import Column, Damaged, Held, OnDisk, guarded, joined, plain
from onefold.data.decode import is_image
from onefold.data.folder import files_of
from onefold.data.listing import FileListing, Names
from onefold.data.messages import count_text, shortened
from onefold.data.parts import Choice, choose_shards, part_in, part_named
from onefold.data.positioned import read_file
from onefold.errors import UserError

Table: TypeAlias = Any
"""A pyarrow.Table: pyarrow is optional, and brings no types."""

SUFFIXES = (".parquet", ".arrow")

_IN_MEMORY = 1 << 30
"""Bytes of parquet files up to which they are held in memory."""

_IMAGES = ("image", "img", "images", "picture", "photo", "png", "jpg", "jpeg", "webp")

# Name of the part, number of the shard and how many there are.
_SHARD = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.(?:parquet|arrow)")

# What `datasets` itself leaves beside the tables.
_STATE, _INFO = "state.json", "dataset_info.json"


def list_table(source: str, path: Path, labels_from: str | None = None) -> FileListing:
    """List the rows of a .parquet or .arrow file. Raises UserError when pyarrow is missing or columns do not fit."""
    return _list(source, [path], path.parent, Choice(""), labels_from)


def is_table_folder(path: Path) -> bool:
    """Whether a folder holds tables. One called metadata.parquet describes image files, and does not count."""
    return path.is_dir() and bool(_tables_in(path))


def list_table_folder(source: str, path: Path, labels_from: str | None = None) -> FileListing:
    """List the rows of a part of a folder of tables, shard by shard.

    Raises UserError when shards are missing, or when it is not clear which of the tables are meant.
    """
    files = _tables_in(path)
    parts: dict[str, list[str]] = {}
    for name in sorted(files, key=natural_key):
        parts.setdefault(_part_of_file(path, name), []).append(name)
    chosen, choice = choose_shards(source, parts)
    chosen = _in_order(source, path, chosen)
    if beside := sum(is_image(name) for name in files_of(path)):
        line = f"{count_text(beside, 'image file')} beside the tables not read, but for those that the tables name"
        choice = choice._replace(notes=(*choice.notes, line))
    return _list(source, [path / name for name in chosen], path, choice, labels_from)


def _tables_in(path: Path) -> list[str]:
    try:
        found = list(files_of(path))
    except OSError:  # which reading it as a folder of images names
        return []
    return [name for name in found if name.lower().endswith(SUFFIXES) and not name.endswith("metadata.parquet")]


def _part_of_file(folder: Path, name: str) -> str:
    """Give the part of a table in a folder: train, test, val, another word, or "" where its name has none."""
    *folders, file = name.split("/")
    if file.lower().endswith(".arrow") and (folder / name).with_name(_STATE).is_file():  # save_to_disk
        return (part_named(folders[-1]) or folders[-1]) if folders else ""
    shard = _SHARD.fullmatch(file)
    if shard and shard[1] and (shard[1] != "data" or not folders):
        word = shard[1].rpartition("-")[2]
        if part := part_named(shard[1]) or part_in(shard[1]):
            return part
        return "" if word == "data" else shard[1]
    stem = file.rpartition(".")[0]
    if part := part_in(stem):
        return part
    for outer in reversed(folders):
        if part := part_named(outer):
            return part
    return ""


def _in_order(source: str, folder: Path, names: list[str]) -> list[str]:
    """The shards of a part, all of them and of one set. Raises UserError when one is missing, or there are several."""
    places = {name.rpartition("/")[0] for name in names}
    if len(places) > 1:
        raise UserError(f"{source}: holds several sets ({shortened(sorted(places), 4)}); give one of these folders")
    place = folder / places.pop()
    if (place / _STATE).is_file():
        state = _json(place / _STATE)
        files = [str(entry["filename"]) for entry in state.get("_data_files", ())]
        if missing := [file for file in files if not (place / file).is_file()]:
            raise UserError(f"{source}: {place / missing[0]} is missing, which {_STATE} names; copy it too")
        listed = [(place / file).relative_to(folder).as_posix() for file in files]
        return listed or names
    endings = {name.rpartition(".")[2].lower() for name in names}
    if len(endings) > 1:
        raise UserError(f"{source}: holds .parquet and .arrow files of the same part; keep one kind")
    shards = {name: _SHARD.fullmatch(name.rpartition("/")[2]) for name in names}
    totals = {int(shard[3]) for shard in shards.values() if shard}
    if totals:
        there = {int(shard[2]) for shard in shards.values() if shard}
        if len(totals) > 1 or len(there) < len(names):
            raise UserError(f"{source}: its shards are of several sets ({shortened(names, 3)}); keep those of one")
        if missing := sorted(set(range(max(totals))) - there):
            raise UserError(
                f"{source}: {count_text(len(missing), 'shard')} of {max(totals)} missing, such as number "
                f"{missing[0]:05d}; download all of them"
            )
    return names


def _list(source: str, files: Sequence[Path], folder: Path, choice: Choice, labels_from: str | None) -> FileListing:
    """List the rows of tables of one kind, one after the other."""
    columns: list[Column] = []
    damaged: list[tuple[str, str]] = []
    names: tuple[str, ...] | None = None
    notes: list[str] = []
    values: list[NDArray[np.integer] | list[object]] = []
    wanted: tuple[str, str | None] | None = None
    first = ""
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    is_large = bool(parquet) and sum(file.stat().st_size for file in parquet if file.is_file()) > _IN_MEMORY
    for file in files:
        where = source if len(files) == 1 else str(file)
        try:
            schema, reader = _open(where, file)
            features = _features(schema, file)
            image = _image_column(where, schema, features)
            if wanted is None:
                column = _label_column(source, schema, features, image, labels_from, reader)
                wanted, notes, first = (image, column[0]), column[1], file.name
                names = _names_of(features.get(column[0] or ""))
            image, label = wanted
            if lacking := [name for name in (image, label) if name and name not in schema.names]:
                raise UserError(f"{where}: holds no column {lacking[0]}, but {first} does; make the shards alike")
            if label and _names_of(features.get(label)) != names:
                raise UserError(f"{where}: names other classes than {first}; make the shards alike")
            images = OnDisk.of(where, file, image) if is_large else Held(reader([image]).column(0))
            own = plain(reader([label]).column(0)) if label else None
        except Damaged as error:
            if len(files) == 1:
                raise
            damaged.append((file.relative_to(folder).as_posix(), error.why))
            continue
        columns.append(images)
        if own is not None:
            values.append(own)
    if not columns:
        raise UserError(f"{source}: {damaged[0][0]} is {damaged[0][1]}, and so are all others; copy them again")
    rows = [len(column) for column in columns]
    count, starts = sum(rows), np.cumsum([0, *rows])
    if count == 0:
        raise UserError(f"{source}: holds no images, for its table has no rows; write at least one")
    label = wanted[1] if wanted else None
    labels, class_names = _labels(source, count, joined(values) if label else None, names, label)

    def read(index: int, limit: int | None) -> bytes:
        table = int(np.searchsorted(starts, index, side="right")) - 1
        return _bytes_of(columns[table].value(index - int(starts[table])), folder, limit)

    listing = FileListing(
        source,
        Names(count, lambda k: f"row {k}"),
        labels,
        class_names,
        read,
        notes=(*notes, *choice.notes),
        test_parts=choice.tests,
    )
    listing.damaged = tuple(damaged)
    if all(column.holds_bytes for column in columns):
        listing.files = lambda: files
    return listing


def _open(source: str, path: Path) -> tuple[Any, Any]:
    """Give the schema of a file, and what reads columns of it. Raises UserError when it is broken."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"{source}: reading {path.suffix} needs pyarrow; run: pip install 'onefold[parquet]'"
        ) from error
    if path.suffix.lower() == ".parquet":

        def columns(names: list[str]) -> Table:
            return guarded(source, path, partial(pq.read_table, columns=names), path)

        schema = guarded(source, path, pq.read_schema, path)
        guarded(source, path, lambda: schema.names)  # which may not be text
        return schema, columns

    def mapped() -> Any:
        file = pa.memory_map(str(path))
        try:
            return pa.ipc.open_stream(file).read_all()
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            return pa.ipc.open_file(file).read_all()

    def checked(names: list[str]) -> Table:
        columns = table.select(names)
        columns.validate(full=True)  # of a damaged file Arrow would read beyond the end
        return columns

    def columns_of(names: list[str]) -> Table:
        return guarded(source, path, checked, names)

    table = guarded(source, path, mapped)
    guarded(source, path, lambda: table.schema.names)
    return table.schema, columns_of


def _image_column(source: str, schema: Any, features: dict[str, Any]) -> str:
    """Give the name of the column of images. Raises UserError when there is none, or none that can be read."""
    import pyarrow as pa

    typed = [name for name in schema.names if _type_of(features.get(name)) == "Image"]
    image = next((name for name in _IMAGES if name in schema.names), typed[0] if len(typed) == 1 else None)
    if image is None:
        found = ", ".join(schema.names) or "none"
        raise UserError(f"{source}: holds no column image (found: {found}); rename the one that is meant")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        return image
    types = pa.types
    if not any(
        check(kind) for check in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    ):
        raise UserError(f"{source}: column {image} holds {kind}; store each image's file as bytes")
    return image


def _label_column(
    source: str, schema: Any, features: dict[str, Any], image: str, labels_from: str | None, reader: Any
) -> tuple[str | None, list[str]]:
    """Give the name of the column of labels, None without, and what is to be said."""
    import pyarrow as pa

    columns = [name for name in schema.names if name != image]

    def is_plain(name: str) -> bool:
        kind = schema.field(name).type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        return not (pa.types.is_nested(kind) or pa.types.is_null(kind) or pa.types.is_temporal(kind))

    plain = [name for name in columns if is_plain(name)]
    typed = [name for name in plain if _type_of(features.get(name)) == "ClassLabel"]
    named = [name for name in plain if looks_like_labels(name)]
    others: list[str] = []
    if not named and not typed and labels_from is None:
        others = [name for name in plain if _could_be_labels(schema.field(name), reader)]
    column = choose_column(source, {name: name for name in [*named, *typed]}, columns, labels_from, others)
    nested = [name for name in columns if name not in plain and looks_like_labels(name)]
    kinds = [f"{name} holds {schema.field(name).type}, which is not read as labels" for name in nested]
    return column.name, [*column.notes, *(kinds if labels_from is None else [])]


def _could_be_labels(field: Any, reader: Callable[[list[str]], Table]) -> bool:
    """Whether a column has integers or words, and fewer different ones than rows."""
    import pyarrow as pa

    types, kind = pa.types, field.type
    if types.is_dictionary(kind):
        return True
    if not (types.is_integer(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)):
        return False
    values = reader([field.name]).column(0)
    return 1 < len(values.unique()) <= max(len(values) // 2, 2)


def _labels(
    source: str,
    count: int,
    values: NDArray[np.integer] | list[object] | None,
    names: tuple[str, ...] | None,
    column: str | None,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Give labels, int64 (n,), and class names, by Hugging Face's metadata or else by the values."""
    labels, found = classes_of(source, count, values)
    if names is None or not found:
        return labels, found
    if found == ("-1",):  # the Hub's mark for a test set without labels
        return np.zeros(count, dtype=np.int64), ()
    listed = values if isinstance(values, list) else []
    words = any(isinstance(value[0] if isinstance(value, list) and value else value, str) for value in listed)
    number = {name if words else str(k): k for k, name in enumerate(names)}
    for row, label in enumerate(labels.tolist()):
        if found[label] not in number:
            raise UserError(
                f"{source}: row {row} has {column} {found[label]}, but there are {len(names)} classes; mend the table, "
                "or say --labels-from none"
            )
    return np.array([number[name] for name in found])[labels], names


def _bytes_of(value: object, folder: Path, limit: int | None) -> bytes:
    """The bytes of a row's image: its own, or those of the file that it names, if that lies in the table's folder."""
    path: object = value if isinstance(value, str) else None
    data: object = value if isinstance(value, bytes) else None
    if isinstance(value, dict):
        row = cast(dict[str, object], value)
        path, data = row.get("path"), row.get("bytes")
    if isinstance(data, bytes):
        return data if limit is None else data[:limit]
    if not isinstance(path, str):
        raise ValueError("the row holds no bytes, nor a path; store the images in the table")
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(
            f"the row holds no bytes, but a path outside the folder, {path}; store the images in the table"
        )
    if not file.is_file():
        raise ValueError(
            f"the row holds no bytes, perhaps only a path: {path} is not there; store the images in the table"
        )
    return read_file(file, limit)


def _features(schema: Any, file: Path) -> dict[str, Any]:
    """What Hugging Face's metadata say of the columns: in the file, or in a dataset_info.json beside it."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (TypeError, ValueError, KeyError):
        found = _json(file.with_name(_INFO)).get("features") if file.with_name(_INFO).is_file() else None
    return found if isinstance(found, dict) else {}


def _inner(feature: object) -> Iterator[dict[str, Any]]:
    """A feature, and those within it where it is a list."""
    while isinstance(feature, dict | list):
        if isinstance(feature, list):
            feature = feature[0] if feature else None
            continue
        yield feature
        feature = feature.get("feature")


def _type_of(feature: object) -> str | None:
    """The innermost type of a feature, such as Image or ClassLabel."""
    types = [inner.get("_type") for inner in _inner(feature)]
    return types[-1] if types else None


def _names_of(feature: object) -> tuple[str, ...] | None:
    """The names of the classes that a feature tells."""
    for inner in _inner(feature):
        names = inner.get("names")
        if isinstance(names, dict):  # as older files have it: by number
            names = [names[key] for key in sorted(names, key=natural_key)]
        if isinstance(names, list) and names:
            return distinct(list(map(str, names)))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON; copy the data set again") from error
    return content if isinstance(content, dict) else {}
