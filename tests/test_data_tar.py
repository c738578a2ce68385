"""Tar shards: what is in them is read with its label, wherever it stands; what is damaged is named."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_images import cut, encode, png, write_folder
from onefold.cli import run as command
from onefold.data import Loader, inspect, open_dataset
from onefold.data.positioned import PositionedFile
from onefold.data.source import list_source
from onefold.data.tar import members_of
from onefold.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], kind: str = "pax") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def grey(level: int) -> bytes:
    return encode(np.full((4, 4), level, np.uint8))


def samples(levels: Sequence[int], classes: int = 3) -> dict[str, bytes]:
    """Grey images, each with its class in a file beside it."""
    pairs = [(f"{level:06d}", level) for level in levels]
    return {
        name: data
        for key, level in pairs
        for name, data in ((f"{key}.png", grey(level)), (f"{key}.cls", b"%d" % (level % classes)))
    }


def read(source: Path | str, **options: str) -> list[tuple[int, str | None]]:
    """(level, name of the class) of each image."""
    data = open_dataset(source, **options)  # type: ignore[arg-type]
    found = (data[k] for k in range(len(data)))
    return [(int(image[0, 0, 0]), data.class_names[label] if data.class_names else None) for image, label in found]


# --- the format -------------------------------------------------------------------------------------------------------

NAMES = st.lists(st.text("ab/.é_", min_size=1, max_size=150), min_size=1, max_size=6)


@settings(max_examples=60)
@given(names=NAMES, kind=st.sampled_from(list(FORMATS)), sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6))
def test_members_are_those_that_tarfile_finds(names: list[str], kind: str, sizes: list[int]):
    files = [(name, bytes([k]) * size) for k, (name, size) in enumerate(zip(names, sizes, strict=False))]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        try:
            write_tar(path, files, kind)
        except ValueError:  # names that ustar has no room for
            return
        with tarfile.open(path) as archive:
            expected = [
                (info.name.removeprefix("./").rstrip("/"), info.offset_data, info.size)
                for info in archive
                if info.isreg()
            ]
        found = [(member.name.rstrip("/"), member.start, member.size) for member in members_of(PositionedFile(path))]
        assert found == expected


def test_links_and_folders_are_passed_over(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in (
            ("d", tarfile.DIRTYPE, ""),
            ("l.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("h.png", tarfile.LNKTYPE, "1.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        info = tarfile.TarInfo("1.png")
        info.size = len(grey(7))
        archive.addfile(info, io.BytesIO(grey(7)))
    assert read(path) == [(7, None)]


# --- images and labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_images_and_classes_of_several_shards(tmp_path: Path, kind: str):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"set-{shard:03d}.tar", samples(range(10 * shard, 10 * shard + 4)), kind)
    expected = [(10 * shard + k, str((10 * shard + k) % 3)) for shard in range(3) for k in range(4)]
    for source in (tmp_path / "set", tmp_path / "set" / "set-*.tar", tmp_path / "set" / "set-00[0-2].tar"):
        assert read(source) == expected
        assert open_dataset(source).class_names == ("0", "1", "2")
    assert read(tmp_path / "set" / "set-001.tar") == expected[4:8]
    data = open_dataset(tmp_path / "set")
    assert data.image_shape == (4, 4, 1)
    listing = list_source(tmp_path / "set")
    assert [listing.names[k] for k in (0, 11, -1)] == [
        "set-000.tar:000000.png",
        "set-002.tar:000023.png",
        "set-002.tar:000023.png",
    ]
    with pytest.raises(IndexError):
        listing.names[12]


def described(*texts: str) -> list[tuple[str, bytes]]:
    """Images 1, 2, … with a JSON file each."""
    pairs = enumerate(texts, 1)
    return [file for k, text in pairs for file in ((f"{k}.png", grey(k)), (f"{k}.json", text.encode()))]


@pytest.mark.parametrize(
    ("files", "expected", "options"),
    [
        ([("1.cls", b"7\n"), ("1.png", grey(1)), ("2.png", grey(2)), ("2.cls", b" 11 ")], ["7", "11"], {}),
        ([("1.png", grey(1)), ("1.cls", b"fox"), ("2.png", grey(2)), ("2.cls", "猫".encode())], ["fox", "猫"], {}),
        ([*described('{"label": "fox"}', '{"label": ["cat"]}')], ["fox", "cat"], {}),
        ([*described('{"a": 3}', '{"a": 4}')], ["3", "4"], {"labels_from": "a"}),
        ([*described('{"a": 3}', '{"a": 4}')], [None, None], {}),
        ([("1.png", grey(1)), ("1.cls", b"0"), ("2.png", grey(2))], [None, None], {"labels_from": "none"}),
        ([("x/fox/1.png", grey(1)), ("x/cat/1.png", grey(2))], ["fox", "cat"], {"labels_from": "folders"}),
        ([("fox/1.png", grey(1)), ("cat/1.png", grey(2))], [None, None], {}),
        ([("1.png", grey(1)), ("1.txt", b"a fox"), ("2.png", grey(2)), ("2.seg.png", grey(9))], [None, None], {}),
        ([("1.PNG", grey(1)), ("__key__", b""), ("3.cls", b"3"), ("./2.png", grey(2))], [None, None], {}),
        ([(".a.png", grey(9)), ("1.png", grey(1)), ("__MACOSX/1.png", grey(9)), ("2.png", grey(2))], [None, None], {}),
    ],
)  # fmt: skip
def test_labels(tmp_path: Path, files: list[tuple[str, bytes]], expected: list[str | None], options: dict[str, str]):
    path = write_tar(tmp_path / "a.tar", files)
    assert read(path, **options) == [(1, expected[0]), (2, expected[1])]


def test_what_is_not_read_is_said(tmp_path: Path):
    path = write_tar(
        tmp_path / "a.tar", [("fox/1.png", grey(1)), ("fox/1.txt", b"?"), ("cat/2.png", grey(2)), ("cat/2.txt", b"?")]
    )
    notes = open_dataset(path).notes
    assert "2 files left out, beside the images: .txt (2)" in notes
    assert "there are no labels; if the folders are classes, say --labels-from folders" in notes


@pytest.mark.parametrize(
    ("files", "said", "options"),
    [
        ([("1.png", grey(1)), ("1.cls", b"0"), ("2.png", grey(2))], "1 image without a label (2.png); add them", {}),
        ([("1.txt", b"")], "holds no images", {}),
        ([("1.png", grey(1)), ("1.json", b'{"label": {"a": 1}}')], "1.json holds dict as label", {}),
        ([("1.png", grey(1)), ("1.json", b'{"a": 1}')], "has no such column (found: a)", {"labels_from": "b"}),
    ],
)
def test_labels_that_are_not_clear_are_refused(
    tmp_path: Path, files: list[tuple[str, bytes]], said: str, options: dict[str, str]
):
    with pytest.raises(UserError) as caught:
        open_dataset(write_tar(tmp_path / "a.tar", files), **options)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts(tmp_path: Path):
    for name, level in (("train-000", 1), ("train-001", 2), ("val-000", 3)):
        write_tar(tmp_path / "set" / f"{name}.tar", samples([level]))
    data = open_dataset(tmp_path / "set")
    assert data.test_sources == (f"{tmp_path / 'set'}:val",)
    assert [level for level, _ in read(tmp_path / "set")] == [1, 2]
    assert [level for level, _ in read(f"{tmp_path / 'set'}:val")] == [3]
    assert [level for level, _ in read(tmp_path / "set" / "train-*.tar")] == [1, 2]


def test_a_gap_in_the_row_is_said(tmp_path: Path):
    for k in (0, 1, 3):
        write_tar(tmp_path / "set" / f"a-{k:05d}.tar", samples([k]))
    assert "1 shard missing in the row of their numbers: 2" in open_dataset(tmp_path / "set").notes


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_global_shuffle_resumes_at_the_exact_image(tmp_path: Path):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"{shard}.tar", samples(range(20 * shard, 20 * shard + 20)))
    data = open_dataset(tmp_path / "set")

    def levels(loader: Loader, batches: int) -> list[int]:
        with loader:
            return [int(x[0, 0, 0]) for _ in range(batches) for x in next(loader)[0]]

    whole = levels(Loader(data, batch=7, seed=3, in_memory=False), 18)
    assert sorted(whole[:60]) == list(range(60)), "each image once an epoch"
    assert {level // 20 for level in whole[:12]} == {0, 1, 2}, "over all shards"
    for workers, start in ((0, 35), (3, 63)):
        assert (
            levels(Loader(data, batch=7, seed=3, start=start, in_memory=False, workers=workers), 5)
            == whole[start : start + 35]
        )


def test_more_shards_than_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onefold.data.tar._OPEN", 2)
    for shard in range(5):
        write_tar(tmp_path / "set" / f"{shard}.tar", samples([shard]))
    assert [level for level, _ in read(tmp_path / "set")] == [0, 1, 2, 3, 4]


# --- damage -----------------------------------------------------------------------------------------------------------


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 512 * 5])  # within the second image's header


def without_end(path: Path) -> None:
    """As if it had been cut off between two members."""
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2]
    path.write_bytes(path.read_bytes()[: last.offset])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[512 * 4 + 10] ^= 1  # in the second image's name
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [shortened, without_end, flipped])
def test_a_damaged_shard_is_named_and_refused_or_skipped(tmp_path: Path, damage, capsys: pytest.CaptureFixture[str]):
    for shard in range(3):
        write_tar(tmp_path / "set" / f"{shard}.tar", samples(range(10 * shard, 10 * shard + 3)))
    damage(tmp_path / "set" / "1.tar")
    with pytest.raises(UserError, match=r"set: 1\.tar is damaged \(.*\); copy it again, or leave out what cannot"):
        open_dataset(tmp_path / "set")
    data = open_dataset(tmp_path / "set", unreadable="skip")
    kept = [int(data[k][0][0, 0, 0]) for k in range(len(data))]
    assert set(range(3)) | set(range(20, 23)) <= set(kept)
    assert data.skipped == ("1.tar",)
    assert any("1.tar is damaged" in note for note in data.notes)
    assert any("1.tar is damaged" in note for note in inspect(tmp_path / "set").notes)
    out = str(tmp_path / "out.zip")
    assert command(["data", "convert", str(tmp_path / "set"), out, "--size", "4"]) == 2
    assert command(["data", "convert", str(tmp_path / "set"), out, "--size", "4", "--unreadable", "skip"]) == 0
    assert "1.tar" in capsys.readouterr().out


def test_a_broken_image_is_named_and_refused_or_skipped(tmp_path: Path):
    files = {"1.png": png(seed=1), "2.png": cut(png(seed=2)), "3.png": png(seed=3)}
    path = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=r"a\.tar:2\.png cannot be read"):
        [open_dataset(path)[k] for k in range(3)]
    data = open_dataset(path, unreadable="skip")
    assert (len(data), data.skipped) == (2, ("a.tar:2.png",))


def test_a_file_that_is_no_tar(tmp_path: Path):
    write_folder(tmp_path, {"a.tar": b"no tar at all" * 100, "b.tar": b"", "c.tar": bytes(1024)})
    for name, said in (("a", "not a whole tar file"), ("b", "not a whole tar file"), ("c", "holds no images")):
        with pytest.raises(UserError, match=said):
            open_dataset(tmp_path / f"{name}.tar")


def test_memory_does_not_hold_an_object_for_each_image(tmp_path: Path):
    listing = list_source(write_tar(tmp_path / "a.tar", samples(range(200))))
    arrays = {name: value for name, value in vars(listing).items() if isinstance(value, list | tuple | dict)}
    assert all(len(value) < 10 for value in arrays.values())
    assert json.dumps(len(listing)) == "200"
