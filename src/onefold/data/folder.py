"""A folder of images: a class per sub-folder, or images without classes."""

import os
from collections.abc import Iterator
from pathlib import Path

from onefold.data.classes import order_by_class
from onefold.data.decode import is_image, is_visible
from onefold.data.listing import FileListing
from onefold.errors import UserError


def list_folder(source: str, path: Path) -> FileListing:
    """List the images in a folder and in its sub-folders. Links are followed; hidden names are not.

    Raises UserError when the folder cannot be listed, holds no image or mixes both layouts.
    """
    try:
        found = list(_files(str(path), "", 3))
    except OSError as error:
        raise UserError(f"{source}: cannot be listed ({error.strerror}); check its permissions") from error
    images = [name for name in found if is_image(name)]
    order, labels, class_names = order_by_class(source, images)
    names = [images[k] for k in order]

    def read(index: int, limit: int | None) -> bytes:
        with (path / names[index]).open("rb") as file:
            return file.read(-1 if limit is None else limit)

    return FileListing(source, names, labels, class_names, read, [name for name in found if not is_image(name)])


def _files(folder: str, prefix: str, depth: int) -> Iterator[str]:
    # One level deeper than a data set goes, so that images lying too deep are named instead of lost; and no
    # further, so that a link to a folder above ends.
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                if depth > 1 and is_visible(entry.name):
                    yield name + "/"
                    yield from _files(entry.path, name + "/", depth - 1)
            elif is_visible(entry.name):
                yield name
