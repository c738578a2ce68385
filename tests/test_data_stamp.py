"""Digests that are remembered: never for data that may have changed."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_images import noise, png, write_folder, write_zip
from onefold.data import as_dataset, open_dataset, stamp
from onefold.data.listing import Listing
from onefold.errors import UserError

FILES = {f"{name}/{k}.png": png(seed=k) for name in ("cat", "dog") for k in range(3)}


@pytest.fixture(autouse=True)
def _large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of any size are remembered, however young their files."""
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stamp, "LEAST", 1)
    monkeypatch.setattr(stamp, "RACY", -1e9)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are read for their digests."""
    found: list[str] = []
    honest = Listing.digest
    monkeypatch.setattr(Listing, "digest", lambda self, indices: found.append(self.source) or honest(self, indices))
    return found


def written(folder: Path, kind: str) -> Path:
    """A source of each kind that lies in files, by the end of its name."""
    path = folder / f"set{kind}"
    match kind:
        case ".npz":
            np.savez(path, images=noise(4, 4, 4), labels=[0, 1, 0, 1])
        case ".npy":
            np.save(path, noise(4, 4, 4))
        case "-images-idx3-ubyte":
            path.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4, *range(32)]))
        case ".zip":
            write_zip(path, FILES)
        case ".parquet":
            table = {"image": pa.array(list(FILES.values()), pa.binary()), "label": [0, 1, 0, 1, 0, 1]}
            pq.write_table(pa.table(table), path)
        case _:
            write_folder(path, FILES)
    return path


KINDS = [".npz", ".npy", "-images-idx3-ubyte", ".zip", ".parquet", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_is_read_once_until_a_file_is_touched(tmp_path: Path, readings: list[str], kind: str):
    source = written(tmp_path, kind)
    expected = open_dataset(source).digest()
    assert open_dataset(source).digest() == expected
    assert len(readings) == 1
    file = source if source.is_file() else source / "dog" / "2.png"
    before = file.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had never been touched
    assert open_dataset(source).digest() == expected
    assert len(readings) == 2


@pytest.mark.parametrize("kind", [".npz", ".parquet", ""])
def test_other_labels_have_another_digest(tmp_path: Path, kind: str):
    source = written(tmp_path, kind)
    assert open_dataset(source).digest() != open_dataset(source, labels_from="none").digest()


def test_what_is_left_out_has_its_part_in_it(tmp_path: Path):
    folder = write_folder(tmp_path / "set", {**FILES, "cat/broken.png": b"?"})
    assert (
        open_dataset(folder, unreadable="skip").digest() == open_dataset(write_folder(tmp_path / "b", FILES)).digest()
    )
    with pytest.raises(UserError, match=r"broken\.png"):
        open_dataset(folder)


def test_a_file_that_was_just_touched_is_not_trusted(
    tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
):
    source = written(tmp_path, ".npz")
    monkeypatch.setattr(stamp, "RACY", 3600)
    open_dataset(source).digest()
    open_dataset(source).digest()
    assert len(readings) == 2


def test_files_that_change_while_they_are_read_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(tmp_path, ".zip")
    honest = Listing.digest

    def slow(listing: Listing, indices: Iterable[int]) -> str:
        found = honest(listing, indices)
        source.touch()
        return found

    monkeypatch.setattr(Listing, "digest", slow)
    open_dataset(source).digest()
    assert not (tmp_path / "cache").exists()


def test_small_sets_and_images_in_memory_are_read_again(
    tmp_path: Path, readings: list[str], monkeypatch: pytest.MonkeyPatch
):
    as_dataset(noise(4, 4, 4)).digest()
    monkeypatch.setattr(stamp, "LEAST", 1 << 26)
    open_dataset(written(tmp_path, ".npz")).digest()
    assert len(readings) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"no digest", b"\xff" * 64])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, readings: list[str], content: bytes):
    source = written(tmp_path, ".zip")
    expected = open_dataset(source).digest()
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    path.write_bytes(content)
    assert open_dataset(source).digest() == expected
    assert len(readings) == 2
    assert path.read_text() == expected + "\n"
