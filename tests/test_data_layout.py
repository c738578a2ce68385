"""What folders and files around images mean: parts, dataset.json, chunks, classes. In folders and zips alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_images import encode, noise, write_folder, write_zip
from onefold.data import convert, describe, inspect, open_dataset
from onefold.data.layout import looks_like_chunks
from onefold.data.parts import part_in, part_of, parts_of_folders
from onefold.errors import UserError


def images(*names: str, start: int = 0) -> dict[str, bytes]:
    """A file for each name, no two alike."""
    return {name: encode(noise(4, 5, 3, seed=start + k)) for k, name in enumerate(names)}


def several(*folders: str, count: int = 3) -> dict[str, bytes]:
    return images(*(f"{folder}/{k}.png" for folder in folders for k in range(count)))


@pytest.fixture(params=["folder", "zip"])
def write(request: pytest.FixtureRequest, tmp_path: Path):
    """Write the same files as a folder or a zip."""

    def written(files: dict[str, bytes], name: str = "set") -> str:
        path = tmp_path / name
        return str(write_folder(path, files) if request.param == "folder" else write_zip(Path(f"{path}.zip"), files))

    return written


def read(files: dict[str, bytes], source: str, **options: Any) -> dict[str, str | None]:
    """The class of each file that a source holds, by the file's name: its pixels say which file it is."""
    names = {pixels(data): name for name, data in files.items() if name.endswith(".png")}
    data = open_dataset(source, **options)
    found = [data[k] for k in range(len(data))]
    return {names[x.tobytes()]: data.class_names[y] if data.class_names else None for x, y in found}


def pixels(data: bytes) -> bytes:
    from onefold.data.decode import decode

    return decode(data).tobytes()


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "other", "part"),
    [
        ("train", "test", "test"),
        ("Training", "VALIDATION", "val"),
        ("TRAIN", "valid", "val"),
        ("train", "dev", "val"),
        ("training", "Eval", "test"),
        ("train2017", "val2017", "val"),
        ("train_images", "test_images", "test"),
        ("imgs-train", "imgs-testing", "test"),
    ],
)
@pytest.mark.parametrize("around", ["", "top/", "a/b/"])
@pytest.mark.parametrize("classes", [True, False])
def test_split_folders_are_parts_and_no_classes(write, train: str, other: str, part: str, around: str, classes: bool):
    inner = ("cat/", "dog/") if classes else ("",)
    files = images(*(f"{around}{p}/{c}{k}.png" for p in (train, other) for c in inner for k in range(4)))
    source = write(files)
    for opened, folder in ((source, train), (f"{source}:train", train), (f"{source}:{part}", other)):
        expected = {
            name: name.split("/")[-2] if classes else None for name in files if name.startswith(f"{around}{folder}/")
        }
        assert read(files, opened) == expected
    data = open_dataset(source)
    assert data.test_sources == (f"{source}:{part}",)
    assert data.notes == (f"of its parts (train, {part}), train is read",)
    assert inspect(source).count == len(data)
    assert f"note: test images: {source}:{part}" in describe(inspect(source))


def test_of_three_parts_test_comes_before_val(write):
    source = write(several("val", "train", "test"))
    assert open_dataset(source).test_sources == (f"{source}:test", f"{source}:val")
    assert len(open_dataset(f"{source}:validation")) == 3


@pytest.mark.parametrize("around", ["", "top/"])
def test_a_part_alone_is_read_and_said(write, around: str):
    files = several(f"{around}train/cat", f"{around}train/dog")
    assert set(read(files, write(files)).values()) == {"cat", "dog"}
    assert open_dataset(write(files)).notes == ()
    files = several(f"{around}test/cat", f"{around}test/dog")
    source = write(files, "other")
    assert set(read(files, source).values()) == {"cat", "dog"}
    assert open_dataset(source).notes == ("it has a part test alone, which is read",)


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "car", "bus"),
        ("test", "extra"),
        ("valid", "invalid"),
        ("train", "training"),
        ("val", "dev"),
        ("trainA", "trainB", "testA", "testB"),
        ("train2017", "val2018"),
        ("top/train", "top/misc"),
    ],
)
def test_what_may_be_parts_is_refused_until_somebody_says(write, folders: tuple[str, ...]):
    files = several(*folders)
    source = write(files)
    with pytest.raises(
        UserError, match=r"like a part to train or test on, .*; give the folder to train on and"
    ) as error:
        open_dataset(source)
    assert "say --labels-from folders if each folder is a class" in str(error.value)
    for command in (inspect, lambda source: convert(source, Path(source).parent / "new.zip", 4)):
        with pytest.raises(UserError, match="like a part"):
            command(source)
    if not folders[0].startswith("top"):
        assert read(files, source, labels_from="folders") == {name: name.split("/")[0] for name in files}


def test_images_beside_a_part_are_refused(write):
    with pytest.raises(UserError, match="train looks like a part to train or test on, beside images"):
        open_dataset(write(images("train/1.png", "2.png")))


@pytest.mark.parametrize("folders", [("train station", "airport"), ("trained", "wild"), ("contest", "festival")])
def test_classes_that_only_sound_like_parts(write, folders: tuple[str, ...]):
    files = several(*folders)
    assert read(files, write(files)) == {name: name.split("/")[0] for name in files}


def test_parts_without_one_to_train_on(write):
    source = write(several("val", "test"))
    with pytest.raises(UserError, match=r"has parts test and val, none to train on; name one, as .*:test$"):
        open_dataset(source)
    assert len(open_dataset(f"{source}:val")) == 3
    with pytest.raises(UserError, match=r"has no images of the part train \(found: test, val\); name another one"):
        open_dataset(f"{source}:train")
    with pytest.raises(UserError, match="has no parts; give it without :test"):
        open_dataset(f"{write(several('a', 'b'), 'other')}:test")


def test_a_class_called_train_survives_conversion(tmp_path: Path):
    np.savez(tmp_path / "set.npz", images=noise(6, 4, 4), labels=np.array(["bus", "car", "train"] * 2))
    done = convert(tmp_path / "set.npz", tmp_path / "set.zip", 4)
    data = open_dataset(done.path)
    assert (data.class_names, data.labels.tolist()) == (("00000 bus", "00001 car", "00002 train"), [0, 0, 1, 1, 2, 2])
    np.savez(tmp_path / "set.npz", images=noise(4, 4, 4), labels=np.array(["0001", "0002"] * 2))
    done = convert(tmp_path / "set.npz", tmp_path / "set.zip", 4, overwrite=True)
    assert open_dataset(done.path).class_names == ("00000 0001", "00001 0002")


def test_a_part_without_images_and_other_folders_are_said(write):
    source = write(
        several("train/a", "train/b") | {"test/a/1.heic": b"?", "labels/1.txt": b"?", "train/a/x.heic": b"?"}
    )
    data = open_dataset(source)
    assert len(data) == 6
    assert data.notes[0] == "no images that onefold reads in labels, test"
    assert any(".heic (2), .txt (1)" in note for note in data.notes)
    files = several("train", "test") | {"test/x.heic": b"?"}
    assert open_dataset(write(files, "other")).notes == ("of its parts (train, test), train is read",)


def test_words_for_parts():
    assert [part_of(f"set:{word}") for word in ("Training", "dev", "EVAL", "none")] == ["train", "val", "test", None]
    assert [part_in(name) for name in ("x-test-0", "cifar_TRAIN.x", "train-test", "contest")] == [
        "test",
        "train",
        None,
        None,
    ]
    assert parts_of_folders(["a_train", "a_test"]) == {"a_train": "train", "a_test": "test"}
    assert parts_of_folders([]) is None


# --- dataset.json -----------------------------------------------------------------------------------------------------

CHUNKS = [f"{k // 3:05d}/img{k:08d}.png" for k in range(8)]


def labels(value: object) -> bytes:
    return json.dumps({"labels": value}).encode()


@pytest.mark.parametrize("around", ["", "top/"])
@pytest.mark.parametrize("kind", ["pairs", "dict", "one-hot", "words", "backslashes"])
def test_labels_of_a_dataset_json(write, around: str, kind: str):
    files = images(*(around + name for name in CHUNKS))
    given: Any = [[name, k % 3] for k, name in enumerate(CHUNKS)]
    names = ["0", "1", "2"]
    if kind == "dict":
        given = dict(given)
    elif kind == "one-hot":
        given = [[name, [float(label == k) for k in range(3)]] for name, label in given]
    elif kind == "words":
        names = ["ant", "bee", "cow"]
        given = [[name, names[label]] for name, label in given]
    elif kind == "backslashes":
        given = [[name.replace("/", "\\"), label] for name, label in given]
    source = write(files | {f"{around}dataset.json": labels(given)})
    assert read(files, source) == {around + name: names[k % 3] for k, name in enumerate(CHUNKS)}
    assert open_dataset(source).notes == (f"labels are those of {around}dataset.json",)


def test_null_labels_are_no_classes(write):
    files = images(*CHUNKS)
    source = write(files | {"dataset.json": labels(None)})
    assert read(files, source) == dict.fromkeys(CHUNKS)
    assert open_dataset(source).notes == ("folders are no classes, for the labels of dataset.json are null",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (labels([[name, 0] for name in CHUNKS[:-2]]), r"no label for 2 images \(00002/img00000006\.png, 00002/img"),
        (labels([[name, None] for name in CHUNKS]), "no label for 8 images"),
        (
            labels([[CHUNKS[0], 1], *([name, 0] for name in CHUNKS)]),
            r"gives 00000/img00000000\.png two labels, 1 and 0",
        ),
        (labels([1, 2]), "are no pairs of name and label"),
        (labels([[name, 0.5] for name in CHUNKS]), "labels must be one integer or word per image"),
        (b"{", "dataset.json cannot be read as JSON"),
        (b'{"images": []}', r"3 folders \(00000, 00001, 00002\) look like numbered chunks"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_refused(write, content: bytes, text: str):
    with pytest.raises(UserError, match=text) as error:
        open_dataset(write(images(*CHUNKS) | {"dataset.json": content}))
    assert "\n" not in str(error.value)


def test_labels_that_name_no_image_are_said(write):
    source = write(images("1.png") | {"dataset.json": labels([["1.png", 4], ["2.png", 5]])})
    data = open_dataset(source)
    assert data.class_names == ("4",)
    assert data.notes[1] == "1 label of dataset.json name no image (2.png)"


def test_each_part_may_have_its_own_dataset_json_or_share_one(write):
    files = several("train", "test")
    both = [[name, int(name[-5]) % 2] for name in files]
    for given in (
        {"dataset.json": labels(both)},
        {
            f"{part}/dataset.json": labels([[n.partition("/")[2], k] for n, k in both if n.startswith(part)])
            for part in ("train", "test")
        },
    ):
        source = write(files | given)
        for part in ("train", "test"):
            expected = {name: str(label) for name, label in both if name.startswith(part)}
            assert read(files, f"{source}:{part}") == expected


def test_what_labels_are_taken_from_can_be_said(write):
    files = several("cat", "dog")
    source = write(files | {"dataset.json": labels([[name, name[-5]] for name in files])})
    assert set(read(files, source).values()) == {"0", "1", "2"}
    assert read(files, source, labels_from="dataset.json") == read(files, source)
    assert read(files, source, labels_from="folders") == {name: name[:3] for name in files}
    assert read(files, source, labels_from="none") == dict.fromkeys(files)
    with pytest.raises(UserError, match=r"--labels-from colour: images in files have no such column; give folders, "):
        open_dataset(source, labels_from="colour")
    with pytest.raises(UserError, match=r"--labels-from dataset\.json: .*other.* holds no such file with labels"):
        open_dataset(write(files, "other"), labels_from="dataset.json")


def test_tables_that_may_hold_labels_are_named(write):
    data = open_dataset(write(images("1.png") | {"labels.csv": b"?", "notes.txt": b"?"}))
    assert data.notes[0] == "labels.csv may hold labels, which onefold does not read from such a file"


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders",
    [
        ("00000", "00001"),
        ("0001", "0002", "0003"),
        ("00000", "01000", "02000"),
        ("part1", "part2"),
        ("chunk_0", "chunk_1"),
    ],
)
@pytest.mark.parametrize("around", ["", "top/", "train/"])
def test_chunks_are_no_classes_until_somebody_says(write, folders: tuple[str, ...], around: str):
    files = several(*(around + folder for folder in folders))
    source = write(files)
    with pytest.raises(UserError, match=r"look like numbered chunks, and no dataset\.json .* --labels-from none if"):
        open_dataset(source)
    assert read(files, source, labels_from="none") == dict.fromkeys(files)
    assert read(files, source, labels_from="folders") == {name: name.split("/")[-2] for name in files}


@pytest.mark.parametrize(
    "folders", [("0", "1", "2"), ("00", "01"), ("1998", "1999"), ("001 ant", "002 bee"), ("00000", "x")]
)
def test_numbered_classes_that_are_no_chunks(write, folders: tuple[str, ...]):
    files = several(*folders)
    assert read(files, write(files)) == {name: name.split("/")[0] for name in files}


def test_short_numbers_are_chunks_where_only_the_last_is_smaller():
    assert looks_like_chunks([("00", 50), ("01", 50), ("02", 7)])
    assert not looks_like_chunks([("00", 50), ("01", 50), ("02", 50)])
    assert not looks_like_chunks([("00", 50), ("01", 40), ("02", 7)])
    assert not looks_like_chunks([("0", 50), ("1", 50), ("2", 7)])
    assert not looks_like_chunks([("00000", 50)])
