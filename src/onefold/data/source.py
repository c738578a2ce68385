"""From what a person writes to a data set: `open_dataset`; and where a result may be written, never in place of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from onefold.data.dataset import Dataset, ListingDataset
from onefold.data.decode import is_image
from onefold.data.digits import DIGITS, list_digits
from onefold.data.folder import list_folder
from onefold.data.listing import Listing
from onefold.data.npz import list_npz
from onefold.data.parquet import list_parquet
from onefold.data.zip import list_zip
from onefold.errors import UserError, writing

_READERS: dict[str, Callable[[str, Path], Listing]] = {
    ".zip": list_zip,
    ".npz": list_npz,
    ".parquet": list_parquet,
}
_KNOWN = "an image folder, a .zip, .npz or .parquet file, or one of the words digits and digits:test"


def open_dataset(source: str | Path, *, unreadable: Literal["refuse", "skip"] = "refuse") -> Dataset:
    """Open a data set: "digits", "digits:test", or the path of an image folder, .zip, .npz or .parquet file.

    Size, channels and classes are read from the data. A folder named digits is opened as "./digits".

    `unreadable` says what becomes of images that cannot be decoded. "refuse" raises UserError with the name
    of the first one that is met, here or when it is read. "skip" decodes every image once, now, and leaves
    those out; `skipped` names them.

    Raises UserError, on one line, when the source is not a data set or its images differ in size or channels.
    """
    return ListingDataset(list_source(source), unreadable)


def list_source(source: str | Path) -> Listing:
    """List the images of a source, whatever their sizes. Raises UserError when it is not a source."""
    # A Path means a file; as text it must not turn into the name of an embedded set.
    name = f"./{source}" if isinstance(source, Path) and str(source) in DIGITS else str(source)
    path = path_of(source)
    if path is None:
        return list_digits(name)
    if not name or not path.exists():
        raise UserError(f"{name or 'an empty name'}: no such file or folder; give {_KNOWN}")
    if path.is_dir():
        return list_folder(name, path)
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{name}: not a kind of file that holds a data set; give {_KNOWN}")
    return _READERS[path.suffix.lower()](name, path)


def path_of(source: str | Path) -> Path | None:
    """Give the path that a source stands for, whether there is one or not; None for an embedded set."""
    return None if isinstance(source, str) and source in DIGITS else Path(source).expanduser()


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


def _would_be_an_image_of(path: Path, folder: Path) -> bool:
    inside, root = path.resolve(), folder.resolve()
    return folder.is_dir() and inside.is_relative_to(root) and is_image(inside.relative_to(root).as_posix())
