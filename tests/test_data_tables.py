"""Tables in shards and folders, as the Hugging Face Hub and `datasets` have them, and columns of labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_images import noise, png, write_folder
from onefold.data import inspect, open_dataset, tables
from onefold.data.columns import OnDisk
from onefold.data.listing import Unreadable
from onefold.errors import UserError

NAMES = ["zebra", "ant", "bee"]


def class_label(names: Any) -> dict[str, Any]:
    return {"names": names, "_type": "ClassLabel"}


def table(numbers: Sequence[int], features: dict[str, Any] | None = None, **columns: list[Any]) -> Any:
    """A row for each number, whose image is made from it."""
    images = [{"bytes": png(4, 5, seed=number), "path": f"{number}.png"} for number in numbers]
    made = pa.table({"image": images, **columns})
    return made if features is None else described(made, features)


def described(made: Any, features: dict[str, Any]) -> Any:
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def parquet(path: Path, made: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=2)
    return path


def arrow(path: Path, made: Any, *, file: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, made.schema) as out:
        out.write_table(made, max_chunksize=2)
    return path


def labels(source: Path | str, **options: Any) -> list[str | None]:
    """The classes of the images; image k must be the one made from number k."""
    data = open_dataset(source, **options)
    for k in range(len(data)):
        assert np.array_equal(data[k][0], noise(4, 5, 3, seed=k))
    numbers = data.labels.tolist()
    assert numbers == [data[k][1] for k in range(len(data))]
    return [data.class_names[k] if data.class_names else None for k in numbers]


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["", "data/", "plain_text/"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_shards(tmp_path: Path, around: str, shards: int):
    features = {"label": class_label(NAMES)}
    for part, count in (("train", 7), ("test", 4)):
        for k, rows in enumerate(np.array_split(np.arange(count), shards)):
            made = table(rows.tolist(), features, label=[int(row) % 3 for row in rows])
            parquet(tmp_path / f"{around}{part}-{k:05d}-of-{shards:05d}.parquet", made)
    write_folder(tmp_path, {"README.md": b"?", ".gitattributes": b"?"})
    assert labels(tmp_path) == [NAMES[k % 3] for k in range(7)]
    assert labels(f"{tmp_path}:test") == [NAMES[k % 3] for k in range(4)]
    data = open_dataset(tmp_path)
    assert (data.class_names, data.test_sources) == (tuple(NAMES), (f"{tmp_path}:test",))
    assert data.notes == ("of its parts (train, test), train is read",)
    assert inspect(tmp_path).classes == {"zebra": 3, "ant": 2, "bee": 2}


@pytest.mark.parametrize(
    "names",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("cifar100-train.parquet", "cifar100-test.parquet"),
        ("Train.parquet", "validation.parquet"),
        ("a-train-00000-of-00001-0123abcd.parquet", "a-dev-00000-of-00001-0123abcd.parquet"),
    ],
)
def test_parts_by_other_names(tmp_path: Path, names: tuple[str, str]):
    for name, number in zip(names, (0, 9), strict=True):
        parquet(tmp_path / name, table([number], label=["x"]))
    assert labels(tmp_path) == ["x"]
    (test,) = open_dataset(tmp_path).test_sources
    assert np.array_equal(open_dataset(test)[0][0], noise(4, 5, 3, seed=9))


def test_shards_of_no_part_are_one_set(tmp_path: Path):
    for k in range(2):
        parquet(tmp_path / f"{k}.parquet", table([k], label=[k]))
    assert labels(tmp_path) == ["0", "1"]
    with pytest.raises(UserError, match="has no parts; give it without :test"):
        open_dataset(f"{tmp_path}:test")


def test_further_parts_are_named(tmp_path: Path):
    for part in ("train", "extra"):
        parquet(tmp_path / f"{part}-00000-of-00001.parquet", table([0]))
    assert open_dataset(tmp_path).notes == ("not read, for they are no part to train or test on: extra",)


def test_folders_of_shards_that_are_not_whole_or_not_one(tmp_path: Path):
    for k in (0, 2):
        parquet(tmp_path / f"a/train-{k:05d}-of-00003.parquet", table([k]))
    with pytest.raises(UserError, match="1 shard of 3 missing, such as number 00001; download all of them"):
        open_dataset(tmp_path / "a")
    for name in ("cropped", "full"):
        parquet(tmp_path / f"b/{name}/train-00000-of-00001.parquet", table([0]))
    with pytest.raises(UserError, match=r"holds several sets \(cropped, full\); give one of these folders"):
        open_dataset(tmp_path / "b")
    for name in ("dogs", "cats"):
        parquet(tmp_path / f"c/{name}-00000-of-00001.parquet", table([0]))
    with pytest.raises(UserError, match=r"several tables \(cats, dogs\), and none is named train; give one of them"):
        open_dataset(tmp_path / "c")
    for k, names in enumerate((NAMES, NAMES[::-1])):
        made = table([k], {"label": class_label(names)}, label=[0])
        parquet(tmp_path / f"d/train-{k:05d}-of-00002.parquet", made)
    with pytest.raises(
        UserError, match=r"names other classes than train-00000-of-00002\.parquet; make the shards alike"
    ):
        open_dataset(tmp_path / "d")
    parquet(tmp_path / "e/0.parquet", table([0], label=[1]))
    parquet(tmp_path / "e/1.parquet", table([1]))
    with pytest.raises(UserError, match=r"1\.parquet: holds no column label, but 0\.parquet does"):
        open_dataset(tmp_path / "e")


@pytest.mark.parametrize("parts", [(), ("train", "test")])
def test_a_data_set_saved_to_disk(tmp_path: Path, parts: tuple[str, ...]):
    info = {"features": {"image": {"_type": "Image"}, "label": class_label(NAMES)}}
    if parts:
        write_folder(tmp_path, {"dataset_dict.json": json.dumps({"splits": parts}).encode()})
    for part in parts or ("",):
        files = [f"data-{k:05d}-of-00002.arrow" for k in range(2)]
        for k, file in enumerate(files):
            arrow(tmp_path / part / file, table([2 * k, 2 * k + 1], label=[k, 2]))
        state = {"_data_files": [{"filename": file} for file in files]}
        described_by = {"state.json": state, "dataset_info.json": info}
        write_folder(tmp_path / part, {name: json.dumps(value).encode() for name, value in described_by.items()})
    assert labels(tmp_path) == ["zebra", "bee", "ant", "bee"]
    if parts:
        assert labels(f"{tmp_path}:test") == labels(tmp_path / "test") == ["zebra", "bee", "ant", "bee"]
    (tmp_path / (parts[0] if parts else "") / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing, which state\.json names"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("file", [True, False])
def test_an_arrow_file(tmp_path: Path, file: bool):
    made = table([0, 1, 2], {"label": class_label(NAMES)}, label=[2, 0, 1])
    assert labels(arrow(tmp_path / "set.arrow", made, file=file)) == ["bee", "zebra", "ant"]
    (tmp_path / "set.arrow").write_bytes(b"?")
    with pytest.raises(UserError, match=r"not a whole arrow file; copy or write it again"):
        open_dataset(tmp_path / "set.arrow")


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["label", "labels", "class", "Target", "y", "category", "class_id", "categoryId", "dog_breed", "species"]
)
def test_columns_that_hold_labels_by_their_names(tmp_path: Path, column: str):
    source = parquet(tmp_path / "set.parquet", table([0, 1, 2], **{"id": [7, 8, 9], column: [4, 6, 4]}))
    assert labels(source) == ["4", "6", "4"]


@pytest.mark.parametrize("column", ["digit", "emotion"])
def test_columns_that_the_hub_calls_labels(tmp_path: Path, column: str):
    made = table([0, 1, 2], {column: class_label(NAMES)}, id=[7, 8, 9], **{column: [1, 1, 0]})
    source = parquet(tmp_path / "set.parquet", made)
    assert labels(source) == ["ant", "ant", "zebra"]
    assert open_dataset(source).notes == (f"labels are those of {column}",)


def test_of_several_columns_one_is_chosen_and_said(tmp_path: Path):
    features = {"fine_label": class_label(NAMES), "coarse_label": class_label(["p", "q"])}
    made = table([0, 1, 2], features, coarse_label=[0, 1, 0], fine_label=[2, 0, 1], shade=[1, 2, 2])
    source = parquet(tmp_path / "set.parquet", made)
    assert labels(source) == ["bee", "zebra", "ant"]
    note = "labels are those of fine_label; not used: coarse_label (--labels-from coarse_label takes it)"
    assert open_dataset(source).notes == (note,)
    assert labels(source, labels_from="coarse_label") == ["p", "q", "p"]
    assert open_dataset(source, labels_from="coarse_label").notes == ()
    assert labels(source, labels_from="shade") == ["1", "2", "2"]
    assert labels(source, labels_from="none") == [None] * 3
    with pytest.raises(
        UserError, match=r"--labels-from colour: .* has no such column \(found: coarse_label, fine_label"
    ):
        open_dataset(source, labels_from="colour")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[2], [0], [1]], ["bee", "zebra", "ant"]),
        ([2.0, 0.0, 1.0], ["bee", "zebra", "ant"]),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], ["bee", "zebra", "ant"]),
        (["bee", "zebra", "ant"], ["bee", "zebra", "ant"]),
        ([-1, -1, -1], [None] * 3),
        ([[], [], []], [None] * 3),
    ],
)
def test_labels_in_every_form(tmp_path: Path, values: list[Any], expected: list[str | None]):
    made = table([0, 1, 2], {"label": class_label(NAMES)}, label=values)
    assert labels(parquet(tmp_path / "set.parquet", made)) == expected


@pytest.mark.parametrize(
    "feature",
    [
        {"feature": class_label(NAMES), "_type": "Sequence"},
        [class_label(NAMES)],
        class_label({"0": "zebra", "1": "ant", "2": "bee"}),
    ],
)
def test_names_of_classes_wherever_the_hub_writes_them(tmp_path: Path, feature: Any):
    made = table([0, 1], {"label": feature}, label=[[2], [1]])
    assert labels(parquet(tmp_path / "set.parquet", made)) == ["bee", "ant"]


def test_two_classes_of_one_name_stay_two(tmp_path: Path):
    made = table([0, 1, 2], {"label": class_label(["crane", "ant", "crane"])}, label=[0, 2, 1])
    source = parquet(tmp_path / "set.parquet", made)
    assert labels(source) == ["crane (0)", "crane (2)", "ant"]
    assert inspect(source).classes == {"crane (0)": 1, "ant": 1, "crane (2)": 1}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1, None, 2], "row 1 has no label; fill it, leave such rows out, or say --labels-from none"),
        ([[1], [], [2]], "row 1 has no label"),
        ([0.0, float("nan"), 1.0], "row 1 has no label"),
        ([0.5, 1.0, 2.0], "labels must be one integer or word per image"),
        ([[0, 1], [1], [0]], "labels must be one integer or word per image"),
        ([[1, 1, 0]] * 3, "labels must be one integer or word per image"),
        ([0, -1, 1], "row 1 has label -1, but there are 3 classes"),
        (["ant", "wasp", "bee"], "row 1 has label wasp, but there are 3 classes"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, values: list[Any], text: str):
    made = table([0, 1, 2], {"label": class_label(NAMES)}, label=values)
    with pytest.raises(UserError, match=text):
        open_dataset(parquet(tmp_path / "set.parquet", made))
    assert labels(tmp_path / "set.parquet", labels_from="none") == [None] * 3


def test_columns_that_may_hold_labels_are_named(tmp_path: Path):
    made = table([0, 1, 2], genre=["a", "b", "a"], id=[1, 2, 3], caption=["p", "q", "r"])
    source = parquet(tmp_path / "set.parquet", made)
    assert open_dataset(source).notes == ("there are no labels; if genre holds the classes, say --labels-from genre",)
    source = parquet(tmp_path / "set.parquet", table([0, 1], label=[{"k": 1}] * 2))
    assert open_dataset(source).notes == ("label holds struct<k: int64>, which is not read as labels",)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("struct", [True, False])
def test_images_by_path_within_the_folder_alone(tmp_path: Path, struct: bool):
    folder = tmp_path / "set"
    write_folder(folder, {"a/0.png": png(4, 5), "1.png": png(4, 5, seed=1)})
    write_folder(tmp_path, {"secret.png": png(4, 5)})
    (folder / "link.png").symlink_to(tmp_path / "secret.png")

    def written(*paths: str) -> Path:
        images = [{"bytes": None, "path": path} for path in paths] if struct else list(paths)
        return parquet(folder / "train.parquet", pa.table({"image": images, "label": ["x"] * len(paths)}))

    assert labels(written("a/0.png", str(folder / "1.png"))) == ["x", "x"]
    assert labels(folder) == ["x", "x"]
    assert "3 image files beside the tables not read" in open_dataset(folder).notes[-1]
    for path, why in (
        ("../secret.png", "a path outside the folder, .*secret"),
        ("link.png", "a path outside the folder"),
        (str(tmp_path / "secret.png"), "a path outside the folder"),
        ("2.png", r"only a path: 2\.png is not there"),
    ):
        with pytest.raises(Unreadable, match=why):
            open_dataset(written(path))


def test_the_column_that_the_hub_calls_an_image(tmp_path: Path):
    made = table([0, 1]).rename_columns(["scan"])
    with pytest.raises(UserError, match=r"holds no column image \(found: scan\)"):
        open_dataset(parquet(tmp_path / "set.parquet", made))
    assert labels(parquet(tmp_path / "set.parquet", described(made, {"scan": {"_type": "Image"}}))) == [None, None]


def test_a_metadata_table_beside_images_is_no_table_of_images(tmp_path: Path):
    parquet(tmp_path / "metadata.parquet", pa.table({"file_name": ["0.png"]}))
    write_folder(tmp_path, {"0.png": png(4, 5)})
    assert labels(tmp_path) == [None]
    assert open_dataset(tmp_path).notes[0].startswith("metadata.parquet may hold labels")


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "expected", "note"),
    [
        ({"images": 0, "fine_labels": [2, 0, 1], "coarse_labels": [0, 1, 0]}, "201", "not used: coarse_labels"),
        ({"images": 0, "Class": [1, 1, 0]}, "110", None),
        ({"data": 0, "y": [[2], [0], [1]]}, "201", None),
        ({"X_train": 0, "Y_train": [2, 0, 1]}, "201", None),
        ({"images_train": 0, "labels_train": [2.0, 0.0, 1.0]}, "201", None),
        ({"train_data": 0, "train_targets": [2, 0, 1], "valid_data": 0}, "201", "of its parts (train, val)"),
        (
            {"images": 0, "train_labels": [2, 0, 1]},
            None,
            "train_labels may hold labels, but of a part, and is not used",
        ),
        ({"x": 0, "who": [0, 1, 1]}, None, "if who holds the classes, say --labels-from who"),
        ({"images": 0, "labels": [2, 0, 1], "class_names": NAMES}, ["bee", "zebra", "ant"], None),
        ({"images": 0, "labels": [2, 0, 2], "label_names": ["a", "b", "a"]}, ["a (2)", "a (0)", "a (2)"], None),
    ],
)
def test_keys_of_arrays(tmp_path: Path, arrays: dict[str, Any], expected: Sequence[str] | None, note: str | None):
    images = np.stack([noise(4, 5, 3, seed=k) for k in range(3)])
    np.savez(tmp_path / "set.npz", **{key: np.array(value) if value else images for key, value in arrays.items()})
    assert labels(tmp_path / "set.npz") == (list(expected) if expected else [None] * 3)
    notes = " ".join(open_dataset(tmp_path / "set.npz").notes)
    assert note in notes if note else not notes
    assert labels(tmp_path / "set.npz", labels_from="none") == [None] * 3


def test_a_key_of_an_array_can_be_chosen(tmp_path: Path):
    images = np.stack([noise(4, 5, 3, seed=k) for k in range(3)])
    np.savez(tmp_path / "set.npz", images=images, labels=[2, 0, 1], who=[0, 1, 1])
    assert labels(tmp_path / "set.npz", labels_from="who") == ["0", "1", "1"]
    with pytest.raises(UserError, match=r"--labels-from which: .* has no such column \(found: labels, who\)"):
        open_dataset(tmp_path / "set.npz", labels_from="which")
    np.savez(tmp_path / "set.npz", images=images, labels=[2, 0, 3], names=NAMES)
    with pytest.raises(UserError, match="labels goes from 0 to 3, but names has 3 names; make them fit"):
        open_dataset(tmp_path / "set.npz")


@pytest.mark.parametrize("source", ["digits", "set.npy"])
def test_sources_without_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str):
    monkeypatch.chdir(tmp_path)
    np.save("set.npy", noise(3, 4, 5))
    assert open_dataset(source, labels_from="none").classes == 0
    with pytest.raises(UserError, match=r"--labels-from y: .*; leave it out"):
        open_dataset(source, labels_from="y")


# --- large files ------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: int, rows: int) -> list[bytes]:
    """Shards of `rows` images in groups of 3 rows; gives all the files in them."""
    folder.mkdir()
    files = [png(seed=k) for k in range(shards * rows)]
    for shard in range(shards):
        own = slice(shard * rows, (shard + 1) * rows)
        images = [{"bytes": file, "path": None} for file in files[own]]
        table = pa.table({"image": images, "label": [k % 2 for k in range(rows)]})
        pq.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=3)
    return files


def test_a_large_table_is_read_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shards(tmp_path / "set", 2, 8)
    held = open_dataset(tmp_path / "set")
    monkeypatch.setattr(tables, "_IN_MEMORY", 100)
    reads: list[int] = []
    honest = OnDisk._read
    monkeypatch.setattr(OnDisk, "_read", lambda self, group: reads.append(group) or honest(self, group))
    on_disk = open_dataset(tmp_path / "set")
    order = [15, 0, 7, 8, 3, 3]
    for k in order:
        assert np.array_equal(on_disk[k][0], held[k][0])
        assert on_disk[k][1] == held[k][1]
    assert 6 <= len(reads) < 20, "each group when it is opened, then as they are asked for"
    assert on_disk.digest() == held.digest()


def test_a_damaged_shard_is_named_and_refused_or_skipped(tmp_path: Path):
    write_shards(tmp_path / "set", 3, 4)
    for which in ("00000", "00001"):
        path = tmp_path / "set" / f"train-{which}-of-00003.parquet"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train-00000-of-00003\.parquet is damaged \(not a whole parquet file\)"):
        open_dataset(tmp_path / "set")
    data = open_dataset(tmp_path / "set", unreadable="skip")
    assert len(data) == 4
    assert data.skipped == ("train-00000-of-00003.parquet", "train-00001-of-00003.parquet")
