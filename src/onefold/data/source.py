"""From what a person writes to a data set: `open_dataset`; and where a result may be written, never in place of it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
from torch import Tensor

from onefold.data.dataset import Dataset, ListingDataset
from onefold.data.decode import is_image
from onefold.data.digits import DIGITS, list_digits
from onefold.data.folder import list_folder
from onefold.data.idx import is_idx_folder, list_idx, list_idx_folder
from onefold.data.listing import Listing, list_arrays, list_encoded
from onefold.data.npz import list_npy, list_npz
from onefold.data.objects import ObjectListing, source_name
from onefold.data.parts import part_of
from onefold.data.tables import is_table_folder, list_table, list_table_folder
from onefold.data.tar import is_tar_folder, list_shards, list_tar, list_tar_folder
from onefold.data.zip import list_zip
from onefold.errors import UserError, placeholder, writing

Reader: TypeAlias = Callable[[str, Path], object]
"""Called with (name as it was given, path) of a file; returns its images in a form that `as_dataset` takes."""

BuiltIn: TypeAlias = Callable[[str, Path, str | None], Listing]
"""Called with (name, path, labels_from); see `open_dataset`."""

# Suffixes and what reads such files. Messages that list the known kinds are made from it.
_BUILT_IN: dict[str, BuiltIn] = {
    ".zip": list_zip,
    ".npz": list_npz,
    ".npy": list_npy,
    "-ubyte": list_idx,
    "-ubyte.gz": list_idx,
    ".parquet": list_table,
    ".arrow": list_table,
    ".tar": list_tar,
}
_WITH_PARTS = frozenset({".npz", ".zip"})

# Those of others.
_READERS: dict[str, Reader] = {}


def register_reader(suffix: str, reader: Reader) -> None:
    """Let `open_dataset`, training and the other functions read a format of your own, by the end of its name.

    `suffix` is such as ".lmdb" or ".tar.gz"; files and folders that end in it, in capitals or not, are given to
    `reader`, called with (name, path). It returns what `as_dataset` takes: an array, encoded files, either of them
    in a pair with labels, or an object with `image_shape`, `classes`, `len()` and `[i]`. It raises UserError for
    files that are no good. Registered again, a suffix has a new reader.

    Raises UserError when the suffix does not begin with a dot, or is one that onefold reads itself.
    """
    ending = suffix.lower()
    if len(ending) < 2 or not ending.startswith("."):
        raise UserError(f"suffix {suffix!r}: must begin with a dot, as in .lmdb; write the end of the files' names")
    if ending in _BUILT_IN:
        raise UserError(f"suffix {suffix}: is read by onefold itself; choose another one for your format")
    _READERS[ending] = reader


def open_dataset(
    source: str | Path, *, unreadable: Literal["refuse", "skip"] = "refuse", labels_from: str | None = None
) -> Dataset:
    """Open a data set: "digits", "digits:test", or the path of a folder or of a file of a known kind.

    A kind is known by the end of its name; `register_reader` adds one. Size, channels and classes are read from the
    data. A folder named digits is opened as "./digits".

    `unreadable` says what becomes of images that cannot be decoded. "refuse" raises UserError with the name
    of the first one that is met, here or when it is read. "skip" decodes every image once, now, and leaves
    those out; `skipped` names them.

    `labels_from` says where the labels are, if it is not clear: the name of a column or key of a table or .npz file;
    "folders", a class each, or "dataset.json" for image files; "none" for images without classes. `notes` of the
    data set tell what was assumed. A part of a source is named after a colon, as in "photos:test".

    Raises UserError, on one line, when the source is not a data set or its images differ in size or channels.
    """
    return ListingDataset(list_source(source, labels_from), unreadable)


def as_dataset(data: object) -> Dataset:
    """Make a data set of anything that holds images. A `Dataset` stays what it is.

    - A str or Path is opened by `open_dataset`.
    - An array, uint8 (n, H, W, C) or (n, H, W), or a list of encoded files (bytes); or a pair of either and labels, n
      integers or words.
    - Any object with `image_shape` (H, W, C), `classes` (K), `len()` and `[i]`, see `objects.ObjectListing`.

    Raises UserError, on one line, which says what is missing or wrong.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str | Path):
        return open_dataset(data)
    return ListingDataset(_as_listing(data, source_name(data)))


def is_source(source: str | Path) -> bool:
    """Whether this is the name of an embedded set, a folder or a kind of file that holds a data set."""
    path = path_of(source)
    return path is None or path.is_dir() or _suffix_of(path) is not None


def list_source(source: str | Path, labels_from: str | None = None) -> Listing:
    """List the images of a source, whatever their sizes. Raises UserError when it is not a source."""
    # A Path means a file; as text it must not turn into the name of an embedded set.
    name = f"./{source}" if isinstance(source, Path) and str(source) in DIGITS else str(source)
    path = path_of(source)
    if path is None:
        return list_digits(name, labels_from)
    if not name or not exists(path):
        raise UserError(f"{name or 'an empty name'}: no such file or folder; give {_known_kinds()}")
    if not path.exists() and (shards := _matching(path)):
        return list_shards(name, path.parent, shards, labels_from)
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{name}: is neither a file nor a folder, but a pipe or a device; copy it into a file")
    suffix = _suffix_of(path)
    if path.is_file() and suffix in _BUILT_IN and (what := _stand_in(path)):
        raise UserError(f"{name}: {what}")
    if path.is_dir() and suffix not in _READERS:  # some formats are folders
        return _folder_reader(path)(name, path, labels_from)
    if path != _expanded(name) and suffix not in _WITH_PARTS:
        raise UserError(f"{name}: {path} has no part named {part_of(name)}; give it without :{part_of(name)}")
    if suffix is None:
        raise UserError(f"{name}: not a kind of file that holds a data set; give {_known_kinds()}")
    if suffix in _BUILT_IN:
        return _BUILT_IN[suffix](name, path, labels_from)
    if labels_from not in (None, "none"):
        raise UserError(f"--labels-from {labels_from}: {name} is read by a reader of your own; leave it out")
    listing = _as_listing(_READERS[suffix](name, path), name)
    return listing if labels_from is None else listing.without_labels()


def _folder_reader(path: Path) -> BuiltIn:
    if is_idx_folder(path):
        return list_idx_folder
    if is_tar_folder(path):
        return list_tar_folder
    return list_table_folder if is_table_folder(path) else list_folder


def _stand_in(path: Path) -> str | None:
    """What a file only stands for another as; what cannot be opened or is empty its reader names."""
    with suppress(OSError), path.open("rb") as file:
        return placeholder(file.read(512))
    return None


def exists(path: Path) -> bool:
    """Whether something is there; nothing is at a name that the system does not take, being too long, for one."""
    try:
        return path.exists() or bool(_matching(path))
    except OSError:
        return False


def _matching(path: Path) -> list[str]:
    """The shards that a pattern stands for, such as shards/train-*.tar, by their names in its folder."""
    if path.suffix.lower() != ".tar" or not any(sign in path.name for sign in "*?["):
        return []
    return [found.name for found in path.parent.glob(path.name) if found.is_file()]


def path_of(source: str | Path) -> Path | None:
    """Give the path that a source stands for, whether there is one or not; None for an embedded set."""
    if isinstance(source, str) and source in DIGITS:
        return None
    path = _expanded(source)
    if part_of(str(source)) is None or exists(path):
        return path
    return _expanded(str(source).rpartition(":")[0])


def absolute(source: str) -> str:
    """A source as a run keeps it: by its whole path, from whatever folder it is read later; embedded sets by name."""
    path = path_of(source)
    if path is None:
        return source
    part = "" if path == _expanded(source) else f":{part_of(source)}"
    return f"{path.absolute()}{part}"


def _expanded(source: str | Path) -> Path:
    """The path with a home folder in place of ~; as it is where there is no such user."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def check_output(path: Path, suffix: str, source: str | Path) -> None:
    """Refuse a file for a result that is made of `source`; nothing is written yet.

    Raises UserError when its name does not end in `suffix`, when it is the source (by whatever name) or would be
    one of its images, and when its folder is a file.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{path}: the result is a {suffix[1:]} file; give it a name that ends in {suffix}")
    origin = path_of(source)
    with writing(path):
        if origin is not None and origin.exists():
            if path.exists() and path.samefile(origin):
                raise UserError(f"{path}: is the source itself, which is never changed; choose another name")
            if _would_be_an_image_of(path, origin):
                raise UserError(f"{path}: would become one of the images of {source}; choose another place")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{path}: {parent} is a file, not a folder; choose another place")


def _as_listing(data: object, source: str) -> Listing:
    """List the images of what a reader returned, or of what was given to `as_dataset`."""
    if isinstance(data, Listing):
        return data
    images, labels = cast(tuple[object, object], data) if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if isinstance(images, Tensor):
        images = images.numpy(force=True)
    if isinstance(images, np.ndarray):
        return list_arrays(source, images, labels)
    if isinstance(images, list) and all(isinstance(file, bytes) for file in images):
        return list_encoded(source, cast(list[bytes], images), labels)
    return ObjectListing(source, data)


def _suffix_of(path: Path) -> str | None:
    """Give the longest registered suffix that a name ends in."""
    return max(
        (suffix for suffix in [*_BUILT_IN, *_READERS] if path.name.lower().endswith(suffix)), key=len, default=None
    )


def _known_kinds() -> str:
    *others, last = [*_BUILT_IN, *_READERS]
    words = " and ".join(DIGITS)
    folders = "an image folder, a folder of tables or tar shards"
    return f"{folders}, a {', '.join(others)} or {last} file, or one of the words {words}"


def _would_be_an_image_of(path: Path, folder: Path) -> bool:
    inside, root = path.resolve(), folder.resolve()
    return folder.is_dir() and inside.is_relative_to(root) and is_image(inside.relative_to(root).as_posix())
