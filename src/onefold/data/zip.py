"""A zip of images, laid out like a folder of images.

The table of contents is read once; after that an image is two reads at their places in one open file, by any number of
threads at once (`PositionedFile`). That is also several times faster than `zipfile`.
"""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from onefold.data.decode import is_image, is_visible
from onefold.data.layout import lay_out
from onefold.data.listing import FileListing
from onefold.data.messages import shortened
from onefold.data.positioned import LARGEST, PositionedFile
from onefold.errors import UserError, reason

# The fixed part of an entry's own header: its name and an extra field follow, then the data.
_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_WINDOWS = 0


def list_zip(source: str, path: Path, labels_from: str | None = None) -> FileListing:
    """List the images in a zip; one folder around all of them is passed over.

    Raises UserError when it is not a zip, holds no image, or it is not clear what its folders mean.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _names(archive.infolist())
        file = PositionedFile(path)
    except OSError as error:
        raise UserError(f"{source}: cannot be opened ({reason(error)}); check the file") from error
    except Exception as error:  # zipfile fails in many ways on a damaged table of contents
        raise UserError(f"{source}: not a whole zip file ({reason(error)}); copy or pack it again") from error
    images, rest = [name for name in found if is_image(name)], [name for name in found if not is_image(name)]
    layout = lay_out(
        source, images, rest, lambda name: _read(file, found[name], None), packed=True, labels_from=labels_from
    )
    entries = [found[name] for name in layout.names]

    def read(index: int, limit: int | None) -> bytes:
        return _read(file, entries[index], limit)

    notes = list(layout.notes)
    if letters := [name for name in layout.names if "\\" in name]:
        notes.append(f"backslashes are taken for letters, not for folders, in {shortened(letters, 3)}")
    listing = FileListing(
        source, layout.names, layout.labels, layout.class_names, read, layout.rest, notes, layout.test_parts
    )
    listing.files = lambda: [path]
    return listing


def _names(entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Give what is visible by name; where backslashes stand for slashes, as some Windows tools write, slashes.

    That is so in a name that has no slash besides, and in all that Windows wrote, where they can be nothing else.
    """
    named: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        windows = "/" not in entry.filename or entry.create_system == _WINDOWS
        named[entry.filename.replace("\\", "/") if windows else entry.filename] = entry
    return {name: entry for name, entry in named.items() if is_visible(name)}


def _read(file: PositionedFile, entry: zipfile.ZipInfo, limit: int | None) -> bytes:
    """Give an entry's content, or its first `limit` bytes. Raises ValueError or zlib.error when broken."""
    if entry.flag_bits & _ENCRYPTED:
        raise ValueError("encrypted; pack it without a password")
    if entry.file_size > LARGEST:  # as announced: a small hostile file must not fill the memory
        raise ValueError(f"{entry.file_size:,} bytes are too many for an image")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"zip compression method {entry.compress_type}; pack it as stored or deflated")
    signature, name_length, extra_length = _HEADER.unpack(file.read(entry.header_offset, _HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError("the zip file is damaged here")
    start = entry.header_offset + _HEADER.size + name_length + extra_length
    stored = entry.compress_size if limit is None else min(entry.compress_size, limit)
    data = file.read(start, stored)
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        # Never more than announced, so that a small hostile file cannot fill the memory (0 means no bound).
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit or max(entry.file_size, 1))
    if limit is None and zlib.crc32(data) != entry.CRC:
        raise ValueError("its checksum does not match; the zip file is damaged")
    return data
