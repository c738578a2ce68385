import errno
import importlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_images import cut, encode, noise, png, write_folder, write_zip
from onefold.data import convert, open_dataset
from onefold.data.classes import natural_key
from onefold.data.convert import class_folders
from onefold.data.listing import Unreadable
from onefold.errors import UserError


def test_mixed_sizes_and_channels_become_a_data_set(tmp_path: Path):
    files = {
        "cat/1.png": png(20, 31),
        "cat/2.jpg": encode(noise(17, 17), "JPEG"),
        "dog 10/1.png": encode(noise(8, 40, 4)),
        "dog 9/1.bmp": encode(noise(16, 16, 3), "BMP"),
    }
    source = write_folder(tmp_path / "set", files)
    with pytest.raises(UserError, match="onefold data convert"):
        open_dataset(source)
    told = []
    done = convert(source, tmp_path / "out.zip", 16, progress=lambda *pair: told.append(pair))
    assert (done.path, done.image_shape) == (tmp_path / "out.zip", (16, 16, 3))
    assert (done.written_count, done.enlarged_count, done.skipped) == (4, 1, ())
    assert told[-1] == (4, 4)
    ds = open_dataset(done.path)
    assert (ds.image_shape, ds.class_names) == ((16, 16, 3), ("cat", "dog 9", "dog 10"))
    assert ds.labels.tolist() == [0, 0, 1, 2]
    assert np.array_equal(ds[2][0], noise(16, 16, 3))  # of that size already: not touched
    with zipfile.ZipFile(done.path) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert all(entry.filename.endswith(".png") for entry in archive.infolist())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set"]


def test_all_grey_stays_grey_and_height_comes_first(tmp_path: Path):
    source = write_zip(tmp_path / "set.zip", {"1.png": encode(noise(30, 40)), "2.png": encode(noise(9, 9))})
    assert convert(source, tmp_path / "out.zip", (8, 6)).image_shape == (8, 6, 1)
    ds = open_dataset(tmp_path / "out.zip")
    assert (ds.image_shape, ds.classes) == ((8, 6, 1), 0)


def test_the_centre_is_kept(tmp_path: Path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = (255, 0, 0)
    pixels[:, :20] = (0, 0, 255)
    convert(write_folder(tmp_path / "set", {"1.png": encode(pixels)}), tmp_path / "out.zip", 10)
    # The filter looks a little beyond the edge, as it does when an image is resized and then cropped.
    image = open_dataset(tmp_path / "out.zip")[0][0].astype(int)
    assert np.abs(image - (255, 0, 0)).max() < 20
    assert np.abs(image[:, 3:7] - (255, 0, 0)).max() < 2


def test_resizing_is_antialiased(tmp_path: Path):
    # A checkerboard is grey from afar; without antialiasing it would be all black or all white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    convert(write_folder(tmp_path / "set", {"1.png": encode(board)}), tmp_path / "out.zip", 8)
    assert np.abs(open_dataset(tmp_path / "out.zip")[0][0].astype(int) - 127).max() < 8


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 4), st.tuples(*[st.integers(0, 255)] * 3))
def test_every_size_becomes_the_size_and_keeps_a_colour(
    tmp_path_factory: pytest.TempPathFactory, sides: tuple[int, int, int, int], colour: tuple[int, int, int]
):
    folder = tmp_path_factory.mktemp("convert")
    height, width, new_height, new_width = sides
    pixels = np.full((height, width, 3), colour, dtype=np.uint8)
    done = convert(write_folder(folder / "set", {"1.png": encode(pixels)}), folder / "out.zip", (new_height, new_width))
    image = open_dataset(done.path)[0][0]
    assert image.shape == (new_height, new_width, 3)
    assert (image == colour).all()
    assert done.enlarged_count == (height < new_height or width < new_width)


def test_transparent_parts_become_white(tmp_path: Path):
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    convert(write_folder(tmp_path / "set", {"1.png": encode(clear)}), tmp_path / "out.zip", 4)
    assert (open_dataset(tmp_path / "out.zip")[0][0] == 255).all()


def test_the_same_images_make_the_same_file(tmp_path: Path):
    source = write_folder(tmp_path / "set", {f"{k}.png": png(9, 9 + k, seed=k) for k in range(70)})
    first = convert(source, tmp_path / "1.zip", 8).path.read_bytes()
    assert convert(source, tmp_path / "2.zip", 8).path.read_bytes() == first
    ds = open_dataset(tmp_path / "1.zip")
    for k in (0, 9, 10, 69):  # in the order of the source
        image = Image.open(io.BytesIO((source / f"{k}.png").read_bytes()))
        centre = (k / 2, 0, 9 + k / 2, 9)
        expected = image.resize((8, 8), Image.Resampling.LANCZOS, box=centre)
        assert np.abs(ds[k][0].astype(int) - np.asarray(expected)).max() <= 1


def test_digits_and_arrays_convert(tmp_path: Path):
    convert("digits", tmp_path / "digits.zip", 8)
    ds, digits = open_dataset(tmp_path / "digits.zip"), open_dataset("digits")
    assert ds.class_names == digits.class_names
    assert np.bincount(ds.labels).tolist() == np.bincount(digits.labels).tolist()
    first = int(np.flatnonzero(digits.labels == 0)[0])
    assert np.array_equal(ds[0][0], digits[first][0])
    np.savez(tmp_path / "five.npz", images=noise(2, 8, 8, 5))
    with pytest.raises(UserError, match=r"five\.npz: images have 5 channels; only grey, RGB and RGBA convert"):
        convert(tmp_path / "five.npz", tmp_path / "out.zip", 8)


@pytest.mark.parametrize("bad", [cut(png(30, 30)), b"?"])
def test_unreadable_images(tmp_path: Path, bad: bytes):
    source = write_folder(tmp_path / "set", {"a/1.png": png(30, 30), "a/2.png": bad, "b/3.png": png(9, 9)})
    with pytest.raises(Unreadable, match=r"a/2\.png cannot be read .* leave such images out with --unreadable skip$"):
        convert(source, tmp_path / "out.zip", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    done = convert(source, tmp_path / "out.zip", 8, unreadable="skip")
    assert (done.written_count, done.skipped) == (2, ("a/2.png",))
    assert open_dataset(done.path).class_names == ("a", "b")


def test_nothing_readable(tmp_path: Path):
    source = write_folder(tmp_path / "set", {"1.png": b"?", "2.png": cut(png(30, 30))})
    with pytest.raises(UserError, match="none of its images can be read; check the files"):
        convert(source, tmp_path / "out.zip", 8, unreadable="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path):
    source = write_folder(tmp_path / "set", {"1.png": png()})
    (tmp_path / "out.zip").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        convert(source, tmp_path / "out.zip", 4)
    assert (tmp_path / "out.zip").read_bytes() == b"precious"
    assert convert(source, tmp_path / "out.zip", 4, overwrite=True).written_count == 1
    assert len(open_dataset(tmp_path / "out.zip")) == 1


def test_the_source_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_zip(tmp_path / "x.zip", {"1.png": png()})
    before = source.read_bytes()
    (tmp_path / "link.zip").symlink_to(source)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    names: list[str | Path] = [source, "x.zip", "./x.zip", "folder/../x.zip", "link.zip"]
    for name in names:
        for out in names:
            with pytest.raises(UserError, match="is the source itself"):
                convert(name, out, 2, overwrite=True)
    assert source.read_bytes() == before
    assert (tmp_path / "link.zip").is_symlink()


def test_the_zip_may_lie_in_the_folder_that_it_is_made_of(tmp_path: Path):
    source = write_folder(tmp_path / "set", {"1.png": png(9, 9)})
    for _ in range(2):
        assert convert(source, source / "set.zip", 4, overwrite=True).written_count == 1
    assert open_dataset(source).image_shape == (9, 9, 3)


def test_missing_folders_are_made(tmp_path: Path):
    source = write_folder(tmp_path / "set", {"1.png": png(9, 9)})
    assert len(open_dataset(convert(source, tmp_path / "a" / "b" / "out.zip", 4).path)) == 1
    for out in ("set/1.png/out.zip", "set/1.png/deep/out.zip"):
        with pytest.raises(UserError, match=r"set/1\.png is a file, not a folder; choose another place"):
            convert(source, tmp_path / out, 4)
    with pytest.raises(UserError, match="none of its images"):
        convert(write_folder(tmp_path / "bad", {"1.png": b"?"}), tmp_path / "out.zip", 4, unreadable="skip")


def test_large_images_are_made_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With 32 for each thread, as of small ones, large images would fill the memory before they are written."""
    module = importlib.import_module("onefold.data.convert")
    made, waiting = [], []

    def render(*arguments: object) -> tuple[bytes, bool]:
        made.append(1)
        return b"", False

    def write(*arguments: object) -> None:
        waiting.append(len(made) - len(waiting))

    monkeypatch.setattr(module, "_png", render)
    monkeypatch.setattr(zipfile.ZipFile, "writestr", write)
    source = write_folder(tmp_path / "set", {f"{k}.png": png(1, 1) for k in range(100)})
    convert(source, tmp_path / "out.zip", 1024)
    assert len(waiting) == 100
    assert max(waiting) <= 17


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_folder(tmp_path / "set", {f"{k}.png": png(seed=k) for k in range(5)})
    (tmp_path / "out.zip").write_bytes(b"precious")
    real, calls = zipfile.ZipFile.writestr, []

    def full(archive: zipfile.ZipFile, *args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(archive, *args)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match=r"out\.zip: cannot be written \(no space left on the disk\)") as error:
        convert(source, tmp_path / "out.zip", 4, overwrite=True)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "set"]
    assert (tmp_path / "out.zip").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("out", "size", "text"),
    [
        ("out.tar", 4, "ends in .zip"),
        ("out.zip", 0, "--size 0×0: a side must have 1 to 8,192 pixels"),
        ("out.zip", (4, -1), "--size 4×-1: a side must have 1 to 8,192 pixels"),
        ("out.zip", 8193, "a side must have 1 to 8,192 pixels"),
        ("out.zip", (1_000_000, 4), "--size 1000000×4: a side must have 1 to 8,192 pixels"),
    ],
)
def test_wrong_options(tmp_path: Path, out: str, size: int | tuple[int, int], text: str):
    source = write_folder(tmp_path / "set", {"1.png": png()})
    with pytest.raises(UserError, match=text):
        convert(source, tmp_path / out, size)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("cat", "dog 9", "dog 10"), ["cat", "dog 9", "dog 10"]),
        (("zebra", "ant"), ["00000 zebra", "00001 ant"]),
        (("a/b", "a_b"), ["00000 a_b", "00001 a_b"]),
        (("", ".x"), ["_", "_.x"]),
        (("-1", "0"), ["00000 -1", "00001 0"]),
    ],
)
def test_class_folders(names: tuple[str, ...], folders: list[str]):
    assert class_folders(names) == folders


@given(st.lists(st.text("aB019 ./\\_-é", max_size=6), min_size=1, max_size=30, unique=True))
def test_class_folders_keep_their_numbers(names: list[str]):
    folders = class_folders(tuple(names))
    assert len(set(folders)) == len(names)
    assert sorted(folders, key=natural_key) == folders
    assert not any("/" in name or name.startswith(".") or name.strip() == "" for name in folders)
