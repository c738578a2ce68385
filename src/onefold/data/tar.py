"""Tar shards of images in the layout of WebDataset: what belongs to one image stands together and shares its name.

    n01440764/10026.jpg   n01440764/10026.cls   n01440764/10026.json

is one image, its class (a number or a word), and what else is known of it; the name ends at its first dot. A source is
a file, a folder of such files, or a pattern: shards/train-*.tar. Shards are read once from end to end, header by
header, to index their images, in 12 bytes each; after that an image is one read at its place (`PositionedFile`), so
that images are shuffled over all shards. Nothing is ever unpacked: names are read, and no file is written.

A shard that is damaged or cut short is one of `Listing.damaged`; images before the damage are good.

The format is that of POSIX (ustar, with pax extensions) and GNU: blocks of 512 bytes, a header before each member
(https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html).
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import choose_column, classes_of, is_missing, looks_like_labels, natural_key
from onefold.data.decode import SUFFIXES, is_visible
from onefold.data.folder import files_of
from onefold.data.layout import FOLDERS
from onefold.data.listing import FileListing, Names
from onefold.data.messages import count_text, shortened
from onefold.data.parts import Choice, choose_shards, part_in, part_named
from onefold.data.positioned import LARGEST, PositionedFile
from onefold.errors import UserError, reason

SUFFIX = ".tar"

_BLOCK = 512
_FILES = b"0\x007"
_EXTENSIONS = b"xgLK"
_WITHOUT_DATA = b"123456"
_LONGEST = 1 << 20
"""Bytes of a header extension, a class or a JSON file, at most: a hostile file cannot fill the memory."""
_OPEN = 64
"""Shards that are open at a time."""

_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]*)=")
_NUMBERED = re.compile(r"(.*?)(\d+)\.tar", re.IGNORECASE | re.DOTALL)


class Member(NamedTuple):
    """A file in a shard: its name, and where its bytes are."""

    name: str
    start: int
    size: int


def list_tar(source: str, path: Path, labels_from: str | None = None) -> "TarListing":
    """List the images of a shard. Raises UserError when it holds none, or it is not clear what their classes are."""
    return TarListing(source, [path], path.parent, Choice(""), labels_from)


def is_tar_folder(path: Path) -> bool:
    """Whether a folder holds shards."""
    return path.is_dir() and bool(_shards_in(path))


def list_tar_folder(source: str, path: Path, labels_from: str | None = None) -> "TarListing":
    """List the images of a part of a folder of shards, shard by shard. Raises UserError as `list_tar`."""
    return list_shards(source, path, _shards_in(path), labels_from)


def list_shards(source: str, folder: Path, names: Sequence[str], labels_from: str | None = None) -> "TarListing":
    """List the images of those of a folder's shards that are of one part. Raises UserError as `list_tar`."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names, key=natural_key):
        parts.setdefault(_part_of_shard(name), []).append(name)
    chosen, choice = choose_shards(source, parts)
    if missing := _missing(chosen):
        line = f"{count_text(len(missing), 'shard')} missing in the row of their numbers: {shortened(missing, 3)}"
        choice = choice._replace(notes=(*choice.notes, line))
    return TarListing(source, [folder / name for name in chosen], folder, choice, labels_from)


class TarListing(FileListing):
    """The images of shards, in the order of the shards and of the images within."""

    def __init__(
        self, source: str, shards: Sequence[Path], folder: Path, choice: Choice, labels_from: str | None
    ) -> None:
        index = _Index(source, labels_from)
        counts: list[int] = []
        damaged: list[tuple[str, str]] = []
        for shard in shards:
            before = len(index.starts)
            try:
                index.add(shard)
            except (OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                damaged.append((shard.relative_to(folder).as_posix(), reason(error)))
            counts.append(len(index.starts) - before)
        first = np.cumsum([0, *counts])
        starts, sizes = np.frombuffer(index.starts, np.int64), np.frombuffer(index.sizes, np.uint32)
        if len(starts) == 0 and damaged:
            raise UserError(f"{source}: {damaged[0][0]} is not a whole tar file ({damaged[0][1]}); copy it again")
        opened = lru_cache(_OPEN)(PositionedFile)

        def place(k: int) -> tuple[Path, int]:
            return shards[int(np.searchsorted(first, k, side="right")) - 1], int(starts[k])

        def read(k: int, limit: int | None) -> bytes:
            path, start = place(k)
            size = int(sizes[k])
            return opened(path).read(start, size if limit is None else min(size, limit))

        def name(k: int) -> str:
            path, start = place(k)
            try:
                inner = _text(opened(path).read(start - _BLOCK, _BLOCK)[:100])
            except (OSError, ValueError):
                inner = f"byte {start}"
            return f"{path.relative_to(folder).as_posix()}:{inner}"

        labels, class_names = index.labels()
        notes = (*index.notes(), *choice.notes)
        super().__init__(
            source, Names(len(starts), name), labels, class_names, read, notes=notes, test_parts=choice.tests
        )
        self.damaged = tuple(damaged)
        self.files = lambda: shards


class _Index:
    """Where the images are, and the number of the value that each is labelled by, −1 without."""

    def __init__(self, source: str, labels_from: str | None) -> None:
        self.starts, self.sizes, self._numbers = array("q"), array("I"), array("i")
        self._source, self._wanted = source, labels_from
        self._from: str | None = None  # "cls", "folders", or a key of the JSON files; None: without classes
        self._is_known = labels_from in ("none", "cls", FOLDERS)
        if labels_from in ("cls", FOLDERS):
            self._from = labels_from
        self._values: dict[object, int] = {}
        self._missing: list[str] = []
        self._notes: list[str] = []
        self._others: Counter[str] = Counter()
        self._several = 0
        self._folders: set[str] = set()

    def add(self, shard: Path) -> None:
        """Read a shard to its end. Raises OSError and ValueError where it is damaged; what came before is kept."""
        file = PositionedFile(shard)
        key, members = "", dict[str, Member]()
        for member in members_of(file):
            if not is_visible(member.name):
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (its := folder + slash + stem) != key:
                self._finish(file, key, members)
                key, members = its, {}
            members.setdefault(extension.lower(), member)
        self._finish(file, key, members)

    def _finish(self, file: PositionedFile, key: str, members: dict[str, Member]) -> None:
        """Take up the image of a sample, if it has one."""
        images = [extension for extension in members if f".{extension}" in SUFFIXES]
        for extension in members.keys() - set(images[:1]) - {"cls", "json"}:
            self._others[f".{extension}" if extension else "no suffix"] += 1
        if not images:
            return
        image = members[images[0]]
        if image.size > LARGEST:
            raise ValueError(f"{image.name} has {image.size:,} bytes, too many for an image")
        if not self._is_known:
            self._choose(file, members)
        value = self._value(file, key, members)
        if self._from is not None and is_missing(value):
            self._missing.append(image.name)
        number = -1 if value is None else self._values.setdefault(value, len(self._values))
        self.starts.append(image.start)
        self.sizes.append(image.size)
        self._numbers.append(number)

    def _choose(self, file: PositionedFile, members: dict[str, Member]) -> None:
        """Where the labels are, from the first image."""
        self._is_known = True
        known = _json(file, members.get("json"))
        if self._wanted is None and "cls" in members:
            self._from = "cls"
            return
        candidates = {name: name for name in known if looks_like_labels(name)}
        column = choose_column(self._source, candidates, list(known), self._wanted)
        self._from = column.name
        self._notes += [f"{line}, of the .json files" for line in column.notes]

    def _value(self, file: PositionedFile, key: str, members: dict[str, Member]) -> object:
        """The label of a sample; None where there is none."""
        if self._from is None or self._from == FOLDERS:
            folder = key.rpartition("/")[0].rpartition("/")[2]
            if self._from is None and len(self._folders) < 3:
                self._folders.add(folder)
            return folder if self._from == FOLDERS else None
        if self._from == "cls":
            member = members.get("cls")
            text = _content(file, member).decode("utf-8", "replace").strip() if member else ""
            return int(text) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text or None
        value = _json(file, members.get("json")).get(self._from)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or isinstance(value, str | int):
            return value
        raise UserError(
            f"{self._source}: {key}.json holds {type(value).__name__} as {self._from}, not a number or word; choose "
            "another --labels-from, or none"
        )

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Labels int64 (n,) and class names. Raises UserError where some images have none."""
        count = len(self.starts)
        if self._missing and len(self._missing) < count:
            some = shortened(self._missing, 3)
            raise UserError(
                f"{self._source}: {count_text(len(self._missing))} without a label ({some}); add them, or say "
                "--labels-from none"
            )
        if self._from is None or self._missing:
            return np.zeros(count, dtype=np.int64), ()
        numbers, names = classes_of(self._source, len(self._values), list(self._values))
        return numbers[np.frombuffer(self._numbers, np.int32)], names

    def notes(self) -> list[str]:
        """What should be said, a line each."""
        lines = list(self._notes)
        if self._others:
            kinds = shortened([f"{suffix} ({number:,})" for suffix, number in self._others.most_common()])
            lines.append(f"{count_text(self._others.total(), 'file')} left out, beside the images: {kinds}")
        if self._from is None and self._wanted is None and len(self._folders) > 1:
            lines.append("there are no labels; if the folders are classes, say --labels-from folders")
        return lines


def members_of(file: PositionedFile) -> Iterator[Member]:
    """The regular files of a tar file, in order. Raises ValueError where it is damaged or cut short."""
    offset, end, name, size = 0, file.size, None, None
    while True:
        header = file.read(offset, _BLOCK)
        if header == bytes(_BLOCK):
            return
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError(f"damaged at byte {offset:,}")
        kind, length, start = header[156:157], _number(header[124:136]), offset + _BLOCK
        if kind in _EXTENSIONS:
            if length > _LONGEST:
                raise ValueError(f"a header of {length:,} bytes at byte {offset:,}")
            name, size = _extended(kind, file.read(start, length), name, size)
        else:
            length = 0 if kind in _WITHOUT_DATA else length if size is None else size
            if start + length > end:
                raise ValueError("the file is cut short")
            if kind in _FILES:
                yield Member(_name(header) if name is None else name, start, length)
            name = size = None
        offset = start + -(-length // _BLOCK) * _BLOCK


def _extended(kind: bytes, content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the member that follows, by GNU's long name or by a pax header, as far as they tell them."""
    if kind == b"L":
        return _text(content), size
    if kind == b"x":
        place = 0
        while place < len(content) and (found := _RECORD.match(content, place)):
            value = content[found.end() : place + int(found[1]) - 1]
            if found[2] == b"path":
                name = value.decode("utf-8", "surrogateescape")
            if found[2] == b"size":
                size = int(value) if re.fullmatch(rb"\d{1,18}", value) else size
            place += max(int(found[1]), 1)
    return name, size


def _number(field: bytes) -> int:
    """An octal number, or one of base 256 where the first bit is set. Raises ValueError."""
    if field[:1] >= b"\x80":
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \x00") or b"0"
    if not re.fullmatch(b"[0-7]+", digits):
        raise ValueError("not a tar file, or damaged")
    return int(digits, 8)


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\x00" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\x00")[0].decode("utf-8", "surrogateescape").removeprefix("./")


def _content(file: PositionedFile, member: Member) -> bytes:
    if member.size > _LONGEST:
        raise ValueError(f"{member.name} has {member.size:,} bytes, too many for a label")
    return file.read(member.start, member.size)


def _json(file: PositionedFile, member: Member | None) -> dict[str, object]:
    """What a JSON file holds, nothing if it is no object."""
    if member is None:
        return {}
    try:
        found = json.loads(_content(file, member))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member.name} cannot be read as JSON") from error
    return cast(dict[str, object], found) if isinstance(found, dict) else {}


def _shards_in(path: Path) -> list[str]:
    try:
        return [name for name in files_of(path) if name.lower().endswith(SUFFIX)]
    except OSError:  # which reading it as a folder of images names
        return []


def _part_of_shard(name: str) -> str:
    """Give the part of a shard in a folder, or "" where neither its name nor its folder has one."""
    *folders, file = name.split("/")
    outer = next((part for folder in reversed(folders) if (part := part_named(folder))), "")
    return part_in(file[: -len(SUFFIX)]) or outer


def _missing(names: Sequence[str]) -> list[str]:
    """Numbers that are lacking between the first and the last shard of one row."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    there = {int(match[2]) for match in matches if match}
    rows = {match[1] for match in matches if match}
    if len(rows) != 1 or len(there) != len(names) or max(there) > 10_000_000:
        return []
    return [str(number) for number in range(min(there), max(there)) if number not in there]
