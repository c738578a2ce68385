"""From any source to one that can be trained on: a zip of PNGs of one size and one kind of channels.

Images may differ in size and channels. Each is resized by its shorter side, with an antialiased filter, and
its centre is kept. All become grey if all were grey, else RGB; transparent parts become white.
"""

import os
import re
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image, ImageOps

from onefold.data.classes import natural_key
from onefold.data.decode import Shape, over_white, to_image
from onefold.data.layout import looks_like_chunks
from onefold.data.listing import Listing, Unreadable
from onefold.data.messages import LARGEST, channels_text
from onefold.data.parallel import CHUNK, Progress, map_indices
from onefold.data.parts import looks_like_parts
from onefold.data.source import check_output, list_source
from onefold.errors import UserError, printable, writing

Result = TypeVar("Result")

# Pixels that a thread makes before it hands them over: many small images, or one large one.
_PIXELS = 1 << 20


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    written_count: images in the zip, each of `image_shape` (H, W, C).
    enlarged_count: how many of them were smaller than that, and so are blurred.
    skipped: names of the images that could not be read.
    notes: what should be said about the source, a line each, such as files that are not read as images.
    """

    path: Path
    image_shape: Shape
    written_count: int
    enlarged_count: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out_zip: str | Path,
    size: int | tuple[int, int],
    *,
    unreadable: Literal["refuse", "skip"] = "refuse",
    overwrite: bool = False,
    labels_from: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the images of `source` to the zip `out_zip`, each of `size`: a side or (height, width).

    The zip has a folder per class, in the order of the classes; a class without images vanishes. It appears
    when it is complete; until then, and after a failure, `out_zip` is as it was before. Missing folders are made.

    `unreadable` "skip" leaves out what cannot be decoded. `labels_from` is as of `open_dataset`. `progress` is told of
    the images that are done.

    Raises UserError when the source cannot be opened or holds other channels than grey, RGB and RGBA, when an
    image cannot be read, when `size` is beyond 1…8,192 pixels, when `out_zip` is there already (unless
    `overwrite`) or is the source, and when it cannot be written.
    """
    out = Path(out_zip).expanduser()
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise UserError(f"--size {height}×{width}: a side must have 1 to {LARGEST:,} pixels; choose another size")
    check_output(out, ".zip", source)
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; choose another name, or replace it with --overwrite")
    listing = list_source(source, labels_from)
    if unreadable == "refuse":
        listing.refuse_damaged()

    def attempt(function: Callable[[int], Result], index: int) -> Result | None:
        try:
            return function(index)
        except Unreadable as error:
            if unreadable == "skip":
                return None
            error.cure = "leave such images out with --unreadable skip"
            raise

    everything = range(len(listing))
    shapes = list(map_indices(lambda index: attempt(listing.shape, index), everything))
    channels = {shape[2] for shape in shapes if shape is not None}
    for other in channels - {1, 3, 4}:
        raise UserError(f"{listing.source}: images have {channels_text(other)}; only grey, RGB and RGBA convert")
    mode = "L" if channels == {1} else "RGB"
    folders = class_folders(listing.class_names)

    def render(index: int) -> tuple[bytes, bool] | None:
        return attempt(lambda k: _png(listing, k, mode, width, height), index)

    readable = [index for index in everything if shapes[index] is not None]
    written, enlarged = 0, 0
    skipped = [name for name, _ in listing.damaged]
    skipped += [listing.names[index] for index in everything if shapes[index] is None]
    with _whole_zip(out) as archive:
        chunk = min(CHUNK, max(1, _PIXELS // (height * width)))
        for index, result in zip(readable, map_indices(render, readable, progress, chunk=chunk), strict=True):
            if result is None:
                skipped.append(listing.names[index])
                continue
            png, small = result
            folder = folders[listing.labels[index]] + "/" if folders else ""
            # A ZipInfo of its own carries no date of today: the same images make the same file.
            archive.writestr(zipfile.ZipInfo(f"{folder}{index:08d}.png"), png)
            written += 1
            enlarged += small
        if written == 0:
            raise UserError(f"{listing.source}: none of its images can be read; check the files")
    return Conversion(
        out,
        (height, width, 1 if mode == "L" else 3),
        written,
        enlarged,
        tuple(skipped),
        tuple(map(printable, listing.notes)),
    )


def class_folders(class_names: tuple[str, ...]) -> list[str]:
    """Make a folder name for each class that sorts to its number, so that labels survive the conversion.

    Mostly that is the class's own name. Names that would be hidden, nested, alike or sorted differently are
    changed or numbered; so are those that would not be read as classes, such as train and test. A byte that is no UTF-8
    becomes the letter that it is in Latin-1, what cannot be printed "_".
    """
    folders = [re.sub(r"[/\\]", "_", _letters(name)).strip() for name in class_names]
    folders = [f"_{name}" if name.startswith((".", "__MACOSX")) or not name else name for name in folders]
    plain = not looks_like_parts(folders, beside=True) and not looks_like_chunks([(name, 1) for name in folders])
    if plain and len(set(folders)) == len(folders) and sorted(folders, key=natural_key) == folders:
        return folders
    return [f"{number:05d} {name}" for number, name in enumerate(folders)]


def _letters(name: str) -> str:
    """A name that every zip and file system can hold."""
    name = "".join(chr(ord(letter) - 0xDC00) if "\udca0" <= letter <= "\udcff" else letter for letter in name)
    return "".join(letter if printable(letter) == letter else "_" for letter in name)


def _png(listing: Listing, index: int, mode: str, width: int, height: int) -> tuple[bytes, bool]:
    """Resize and crop one image; give its PNG, and whether it had to be enlarged."""
    image = to_image(listing.image(index))
    if image.mode == "RGBA":
        image = over_white(image)
    if image.mode != mode:
        image = image.convert(mode)
    small = image.width < width or image.height < height
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue(), small


@contextmanager
def _whole_zip(out: Path) -> Generator[zipfile.ZipFile]:
    """Open a zip that takes its name only when all went well. Raises UserError when it cannot be written."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                yield archive
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
