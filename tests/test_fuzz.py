"""Damaged and hostile input: one line that says what is wrong, or a named skip; nothing else, and nothing is written.

Each case damages a good file at random: bytes are flipped, cut off, repeated, replaced by large numbers; values in JSON
are exchanged. `make nightly` has 10,000 cases and more, others each time; what it finds becomes a test below.
"""

import io
import json
import os
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import NIGHTLY
from data_images import encode, noise, png, write_folder
from helpers_runs import tiny
from onefold import load_run
from onefold.data import open_dataset
from onefold.errors import UserError
from onefold.metrics import Classifier, Moments, digits_classifier
from onefold.networks.base import Network
from onefold.training.loop import train

FILES = {f"{name}/{k}.png": png(seed=k) for name in ("cat", "dog") for k in range(2)}
IMAGES = {"png": {}, "jpeg": {}, "gif": {}, "tiff": {}, "webp": {}, "bmp": {}, "ppm": {}, "jp2": {}}
KINDS = {"jp2": "JPEG2000"}


# --- good files -------------------------------------------------------------------------------------------------------


@cache
def good(name: str) -> bytes:
    """A file that is read without complaint."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        pixels, labels = noise(3, 4, 4, 3), np.array([0, 1, 0])
        match name.rpartition(".")[2]:
            case "zip":
                with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                    [archive.writestr(inner, data) for inner, data in FILES.items()]
            case "tar":
                with tarfile.open(path, "w") as archive:
                    for k, data in enumerate(FILES.values()):
                        for suffix, content in (("png", data), ("cls", b"%d" % k), ("json", b'{"a": 1}')):
                            info = tarfile.TarInfo(f"{'long/' * 40 * (k == 1)}{k}.{suffix}")
                            info.size = len(content)
                            archive.addfile(info, io.BytesIO(content))
            case "npz":
                np.savez_compressed(path, images=pixels, labels=labels, class_names=np.array(["a", "b"]))
            case "npy":
                np.save(path, pixels)
            case "parquet" | "arrow":
                images = [{"bytes": data, "path": "1.png"} for data in FILES.values()]
                features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
                table = pa.table({"image": images, "label": [0, 1, 0, 1]})
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
                if name.endswith(".parquet"):
                    pq.write_table(table, path)
                else:
                    with pa.ipc.new_stream(path, table.schema) as sink:
                        sink.write_table(table)
            case "set-images-idx3-ubyte":
                path.write_bytes(struct.pack(">HBBIII", 0, 8, 3, 3, 4, 4) + pixels[..., 0].tobytes())
            case suffix:
                return encode(noise(9, 7, 3), KINDS.get(suffix, suffix.upper()))
        return path.read_bytes()


# --- damage -----------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**64,
    10**30,
    -0.5,
    1e308,
    "",
    "x",
    "../../x",
    "\udce9\n",
    [],
    {},
    [[]],
]
VALUES += [[1, 2, 3], {"a": {}}, ["x"] * 100]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four faults somewhere in a file."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.6 else rng.randrange(min(len(out), 200) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + rng.randrange(1, 64)]
            case 3:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            case 4:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) & (256**size - 1)
                out[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            case 5:
                out[at : at + 16] = rng.randbytes(rng.randrange(32))
            case _:
                out[at : at + 8] = rng.choice([b"00000000", b"77777777", b"99999999", b"../../..", b"\xff" * 8])
    return bytes(out)


def exchanged(content: Any, rng: random.Random) -> Any:
    """JSON with some values, or what holds them, exchanged for others."""
    if rng.random() < 0.25 or not isinstance(content, dict | list) or not content:
        return rng.choice(VALUES)
    key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
    new = dict(content) if isinstance(content, dict) else list(content)
    match rng.randrange(6):
        case 0:
            del new[key]
        case 1 if isinstance(new, dict):
            new[rng.choice(["unknown", "", "a.b", key + " "])] = new.pop(key)
        case _:
            new[key] = exchanged(content[key], rng)
    return new


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damaged(data, rng)
    return json.dumps(exchanged(json.loads(data), rng)).encode()


def survives(act: Callable[[], object]) -> None:
    """It works, or it is refused in one line."""
    said = "fine"
    try:
        act()
    except UserError as error:
        said = str(error)
    assert said
    assert "\n" not in said


def read(path: Path, **options: Any) -> None:
    data = open_dataset(path, **options)
    for k in range(len(data)):
        data[k]
    data.digest()


def look(path: Path) -> None:
    """Read a source in every way; nothing is written."""
    before = sorted(path.parent.rglob("*"))
    for options in ({}, {"unreadable": "skip"}, {"labels_from": "none"}):
        survives(lambda options=options: read(path, **options))
    assert sorted(path.parent.rglob("*")) == before


# --- sources ----------------------------------------------------------------------------------------------------------

SOURCES = ["a.zip", "a.tar", "a.npz", "a.npy", "a.parquet", "a.arrow", "set-images-idx3-ubyte"]
READERS = len(SOURCES) + len(IMAGES) + 6
CASES = -(-10_500 // READERS) if NIGHTLY else 12


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
def test_damaged_sources(name: str, seed: int):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(damaged(good(name), random.Random(seed)))
        look(path)


@pytest.mark.parametrize(("name", "seed"), [("a.zip", 445), ("a.arrow", 583), ("a.npy", 689)])
def test_what_was_found(tmp_path: Path, name: str, seed: int):
    """Names and headers that are no text; Python's own parser of numpy's headers."""
    (tmp_path / name).write_bytes(damaged(good(name), random.Random(seed)))
    look(tmp_path / name)


@pytest.mark.parametrize("suffix", IMAGES)
@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
def test_damaged_images(suffix: str, seed: int):
    with TemporaryDirectory() as folder:
        data = damaged(good(f"1.{suffix}"), random.Random(seed))
        path = write_folder(Path(folder) / "set", {f"a/1.{suffix}": data, f"a/2.{suffix}": good(f"1.{suffix}")})
        look(path)


@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
def test_damaged_labels(seed: int):
    with TemporaryDirectory() as folder:
        labels = json.dumps({"labels": [["0/1.png", 3], ["1/2.png", 4]]}).encode()
        files = {
            "0/1.png": png(seed=1),
            "1/2.png": png(seed=2),
            "dataset.json": damaged_json(labels, random.Random(seed)),
        }
        path = write_folder(Path(folder) / "set", files)
        look(path)


# --- runs and weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(training__images=16), tmp_path_factory.mktemp("run") / "run", quiet=True).folder


@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
@example(seed=16204)  # a setting named "onestep " with a space
def test_damaged_configurations(run: Path, seed: int):
    with TemporaryDirectory() as folder:
        (path := Path(folder) / "config.json").write_bytes(
            damaged_json((run / "config.json").read_bytes(), random.Random(seed))
        )
        survives(lambda: load_run(folder))
        survives(lambda: load_run(folder, data="digits"))
        assert list(Path(folder).iterdir()) == [path]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sampler.json"])
@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
@example(seed=388)  # networks too large to be built
@example(seed=89478485)
def test_damaged_networks(run: Path, name: str, seed: int):
    with TemporaryDirectory() as folder:
        shutil.copytree(run / "model", Path(folder) / "model")
        path, change = Path(folder) / "model" / name, damaged if name.endswith("safetensors") else damaged_json
        path.write_bytes(change(path.read_bytes(), random.Random(seed)))
        survives(lambda: Network.from_pretrained(folder))


@settings(max_examples=CASES)
@given(seed=st.integers(0, 2**48))
def test_damaged_features(seed: int):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        Moments.from_features(np.eye(4)).save(path)
        path.write_bytes(damaged(path.read_bytes(), random.Random(seed)))
        survives(lambda: Moments.load(path))
        path.write_bytes(damaged(digits_classifier().to_bytes()[:4000], random.Random(seed)))
        survives(lambda: Classifier.load(path))


# --- hostile on purpose -----------------------------------------------------------------------------------------------


def refused(path: Path, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_lead_out_of_an_archive_write_nothing(tmp_path: Path):
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    names = ["../../evil.png", "/tmp/onefold-evil.png", "a/../../../evil.png", "..\\..\\evil.png", "C:\\evil.png"]
    with zipfile.ZipFile(inside / "a.zip", "w") as archive:
        [archive.writestr(name, png(seed=k)) for k, name in enumerate(names)]
    with tarfile.open(inside / "a.tar", "w") as archive:
        for k, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(seed=k))
            archive.addfile(info, io.BytesIO(png(seed=k)))
    for name in ("a.zip", "a.tar"):
        for options in ({}, {"labels_from": "none"}, {"labels_from": "folders"}):
            survives(lambda name=name, options=options: read(inside / name, **options))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "a.zip", "in", "side"]
    assert not Path("/tmp/onefold-evil.png").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png"])
def test_tables_read_no_file_outside_their_folder(tmp_path: Path, name: str):
    (tmp_path / "secret.png").write_bytes(png())
    (folder := tmp_path / "set").mkdir()
    (folder / "link.png").symlink_to("../secret.png")
    pq.write_table(pa.table({"image": [name]}), folder / "a.parquet")
    refused(folder / "a.parquet", "a path outside the folder")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to("nowhere.png"), "No such file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40), "too many for an image"),
    ],
    ids=["pipe", "device", "dangling link", "link to itself", "a terabyte"],
)
def test_images_that_are_no_files(tmp_path: Path, make: Callable[[Path], None], said: str):
    folder = write_folder(tmp_path / "set", {"1.png": png(), "2.png": png(seed=2)})
    make(folder / "3.png")
    refused(folder, said)
    data = open_dataset(folder, unreadable="skip")
    assert (len(data), data.skipped) == (2, ("3.png",))


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".npz", ".npy", ".parquet", "-images-idx3-ubyte"])
def test_a_pipe_in_place_of_a_file(tmp_path: Path, suffix: str):
    os.mkfifo(tmp_path / f"a{suffix}")
    refused(tmp_path / f"a{suffix}", "is neither a file nor a folder, but a pipe or a device")


def header_of(width: int, height: int) -> bytes:
    """A PNG of few bytes that announces so many pixels."""
    data = bytearray(png(4, 4))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_small_files_that_would_fill_the_memory(tmp_path: Path):
    refused(write_folder(tmp_path / "png", {"1.png": header_of(60_000, 60_000)}), "too many pixels")
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", png())
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 0xF0000000)  # bytes when unpacked
    path.write_bytes(data)
    refused(path, "too many for an image")
    info = tarfile.TarInfo("1.png")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    refused(tmp_path / "a.tar", "cut short")
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 64, 64, 3)}".ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    with pytest.raises(UserError, match=r"memory|plain array"):
        open_dataset(tmp_path / "a.npy")


@pytest.mark.parametrize("labels", [[0, -5], [0, 2], [2**40, 0]])
def test_labels_out_of_range(tmp_path: Path, labels: list[int]):
    names = np.array(["a", "b"])
    np.savez(tmp_path / "a.npz", images=noise(2, 4, 4), labels=labels, class_names=names)
    refused(tmp_path / "a.npz", "2 names; make them fit")
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    table = pa.table({"image": [png(), png()], "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "there are 2 classes")


@pytest.mark.parametrize("changes", [{"width": 2**20}, {"depth": 10**7}, {"patch": 0}, {"image_size": [2**20, 2**20]}])
def test_a_configuration_that_would_fill_the_memory(run: Path, tmp_path: Path, changes: dict[str, Any]):
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError):
        Network.from_pretrained(tmp_path)
