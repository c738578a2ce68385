"""A folder of images: a class per sub-folder, or images without classes; see `layout`."""

import os
from collections.abc import Iterator
from pathlib import Path

from onefold.data.decode import is_image, is_visible
from onefold.data.layout import lay_out
from onefold.data.listing import FileListing
from onefold.data.positioned import read_file
from onefold.errors import UserError

_DEPTH = 6


def list_folder(source: str, path: Path, labels_from: str | None = None) -> FileListing:
    """List the images in a folder and in its sub-folders. Links are followed; hidden names are not.

    Raises UserError when the folder cannot be listed, holds no image, or it is not clear what its folders mean.
    """
    try:
        found = list(files_of(path))
    except OSError as error:
        raise UserError(f"{source}: cannot be listed ({error.strerror}); check its permissions") from error
    images, rest = [name for name in found if is_image(name)], [name for name in found if not is_image(name)]
    layout = lay_out(source, images, rest, lambda name: read_file(path / name), labels_from=labels_from)
    names = layout.names

    def read(index: int, limit: int | None) -> bytes:
        return read_file(f"{path}/{names[index]}", limit)

    listing = FileListing(
        source, names, layout.labels, layout.class_names, read, layout.rest, layout.notes, layout.test_parts
    )
    listing.files = lambda: (f"{path}/{name}" for name in names)
    return listing


def files_of(path: Path) -> Iterator[str]:
    """Give the visible files in a folder, and its folders, which end in a slash, as relative paths.

    To a fixed depth, beyond what a data set needs: images that lie too deep are named, and a link to a folder above
    ends.
    """
    return _files(str(path), "", _DEPTH)


def _files(folder: str, prefix: str, depth: int) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if _is_folder(entry):
                if depth > 1 and is_visible(entry.name):
                    yield name + "/"
                    yield from _files(entry.path, name + "/", depth - 1)
            elif is_visible(entry.name):
                yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link that leads in a circle is none, and is named when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False
