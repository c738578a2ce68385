"""Where a result may be written: never in place of the source."""

from pathlib import Path

from onefold.data.decode import is_image
from onefold.data.source import path_of
from onefold.errors import UserError, writing


def check_target(path: Path, suffix: str, source: str | Path) -> None:
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
            if _would_join(path, origin):
                raise UserError(f"{path}: would become one of the images of {source}; choose another place")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{path}: {parent} is a file, not a folder; choose another place")


def _would_join(path: Path, folder: Path) -> bool:
    inside, root = path.resolve(), folder.resolve()
    return folder.is_dir() and inside.is_relative_to(root) and is_image(inside.relative_to(root).as_posix())
