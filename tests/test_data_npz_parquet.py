import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from data_images import cut, noise, png
from onefold.data import open_dataset
from onefold.data.listing import Unreadable
from onefold.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def npz(tmp_path: Path, *unnamed: np.ndarray, **named: np.ndarray) -> Path:
    np.savez(tmp_path / "set.npz", *unnamed, **named)
    return tmp_path / "set.npz"


@pytest.mark.parametrize("shape", [(7, 4, 5), (7, 4, 5, 1), (7, 4, 5, 3), (7, 6, 5, 4), (7, 8, 8, 12)])
def test_npz_gives_back_its_arrays(tmp_path: Path, shape: tuple[int, ...]):
    images = noise(*shape)
    source = npz(tmp_path, images=images, labels=np.array([5, -3, 5, 10, 5, -3, 10]))
    ds = open_dataset(source)
    assert ds.image_shape == (*shape[1:3], shape[3] if len(shape) == 4 else 1)
    assert (ds.source, len(ds), ds.class_names) == (str(source), 7, ("-3", "5", "10"))
    assert ds.labels.tolist() == [1, 0, 1, 2, 1, 0, 2]
    for k in range(7):
        image, label = ds[k]
        assert np.array_equal(image, images[k].reshape(ds.image_shape))
        assert label == ds.labels[k]


def test_npz_by_other_names(tmp_path: Path):
    images, labels = noise(3, 4, 4, 3), np.array(["b", "a", "b"])
    assert open_dataset(npz(tmp_path, x=images, y=labels)).class_names == ("a", "b")
    assert open_dataset(npz(tmp_path, images, labels)).labels.tolist() == [1, 0, 1]
    ds = open_dataset(npz(tmp_path, images))
    assert (ds.classes, ds[2][1], ds.labels.tolist()) == (0, 0, [0, 0, 0])


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": np.zeros((3, 4, 4, 3))}, "images are float64; store them as uint8"),
        ({"images": noise(3, 4)}, r"shape \(3, 4\); store them as \(n, H, W, C\)"),
        ({"images": noise(3, 3, 32, 32)}, "channels first"),
        (
            {"images": noise(0, 4, 4, 3)},
            r"holds no images, for their array has shape \(0, 4, 4, 3\); store at least one$",
        ),
        ({"images": noise(3, 4, 4), "labels": np.zeros(2, dtype=int)}, "3 images but 2 labels"),
        ({"images": noise(1, 4, 4), "labels": np.zeros(2, dtype=int)}, "1 image but 2 labels"),
        ({"images": noise(3, 4, 4), "labels": np.full(3, 0.5)}, "labels must be one integer or word"),
        ({"pixels": noise(3, 4, 4)}, r"no array named images \(found: pixels\)"),
        ({"images": np.array([{}, {}])}, "not a .npz file of plain arrays"),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], text: str):
    source = npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=text) as error:
        open_dataset(source)
    assert str(error.value).startswith(f"{source}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keras", [True, False])
def test_npz_with_parts(tmp_path: Path, keras: bool):
    parts = ("train", "test") if keras else ("train", "val", "test")
    arrays = {}
    for k, part in enumerate(parts):
        arrays[f"x_{part}" if keras else f"{part}_images"] = noise(5, 6, 6, seed=k)
        labels = np.arange(5, dtype=np.uint8) % 3 + k
        arrays[f"y_{part}" if keras else f"{part}_labels"] = labels if keras else labels[:, None]
    source = str(npz(tmp_path, **arrays))
    ds = open_dataset(source)
    assert ds.notes == (f"of its parts ({'train, test' if keras else 'train, test, val'}), train is read",)
    assert (ds.class_names, ds.labels.tolist()) == (("0", "1", "2"), [0, 1, 2, 0, 1])
    for k, part in enumerate(parts):
        ds = open_dataset(f"{source}:{part}")
        assert (ds.source, ds.notes) == (f"{source}:{part}", ())
        assert np.array_equal(ds[4][0][..., 0], noise(5, 6, 6, seed=k)[4])
        assert ds.class_names[0] == str(k)
    if keras:
        with pytest.raises(UserError, match=r"set\.npz:val: has no images of the part val \(found: x_train"):
            open_dataset(f"{source}:val")


def test_npz_with_images_beside_its_parts(tmp_path: Path):
    ds = open_dataset(npz(tmp_path, images=noise(3, 4, 4), x_train=noise(2, 4, 4), x_test=noise(2, 4, 4)))
    assert (len(ds), ds.notes) == (3, ())


@pytest.mark.parametrize("images", ["images", "data"])
@pytest.mark.parametrize("labels", ["labels", "label", "targets"])
def test_npz_with_labels_by_other_names(tmp_path: Path, images: str, labels: str):
    ds = open_dataset(npz(tmp_path, **{images: noise(3, 4, 4), labels: np.array([5, 2, 5])}))
    assert (ds.class_names, ds.labels.tolist(), ds.notes) == (("2", "5"), [1, 0, 1], ())


@pytest.mark.parametrize("kind", [np.uint8, np.float32, bool])
def test_npz_with_one_hot_labels(tmp_path: Path, kind: type):
    ds = open_dataset(npz(tmp_path, images=noise(3, 4, 4), labels=np.eye(5)[[4, 0, 2]].astype(kind)))
    assert (ds.classes, ds.labels.tolist()) == (5, [4, 0, 2])


@pytest.mark.parametrize("labels", [np.full((3, 2), 1), np.full((3, 2), 0.5), np.zeros((3, 2), dtype=int)])
def test_npz_with_labels_that_are_not_one_hot(tmp_path: Path, labels: np.ndarray):
    with pytest.raises(UserError, match="labels must be one integer or word per image"):
        open_dataset(npz(tmp_path, images=noise(3, 4, 4), labels=labels))


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 9, 8), (2, 12, 64, 64), (2, 13, 16, 16)])
def test_channels_first_are_refused_with_the_cure(tmp_path: Path, shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"look channels first; .* by images\.transpose\(0, 2, 3, 1\)$"):
        open_dataset(npz(tmp_path, images=noise(*shape)))
    assert open_dataset(npz(tmp_path, images=noise(*shape).transpose(0, 2, 3, 1))).image_shape[2] == shape[1]


def test_npy(tmp_path: Path):
    np.save(tmp_path / "set.npy", noise(3, 4, 5, 3))
    ds = open_dataset(tmp_path / "set.npy")
    assert (len(ds), ds.image_shape, ds.classes) == (3, (4, 5, 3), 0)
    assert np.array_equal(ds[2][0], noise(3, 4, 5, 3)[2])


@pytest.mark.parametrize("kind", ["text", "objects", "archive"])
def test_npy_that_is_none(tmp_path: Path, kind: str):
    path = tmp_path / "set.npy"
    if kind == "text":
        path.write_bytes(b"no npy")
    elif kind == "objects":
        np.save(path, np.array([{}, {}]))
    else:
        np.savez(tmp_path / "set.npz", images=noise(3, 4, 4))
        (tmp_path / "set.npz").rename(path)
    with pytest.raises(UserError, match=r"set\.npy: not a \.npy file of a plain array; write it with numpy\.save"):
        open_dataset(path)


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_and_their_folder(tmp_path: Path, packed: bool):
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    for k, part in enumerate(("train", "t10k")):
        labels = np.arange(5, dtype=np.uint8) % (3 - k)
        (tmp_path / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(noise(5, 6, 7, seed=k))))
        (tmp_path / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
    whole, train, test = (open_dataset(str(tmp_path) + part) for part in ("", ":train", ":test"))
    file = open_dataset(tmp_path / f"train-images-idx3-ubyte{end}")
    assert whole.notes == ("of its parts (train, test), train is read",)
    assert whole.digest() == train.digest() == file.digest()
    assert train.notes == test.notes == file.notes == ()
    assert (train.image_shape, train.classes, test.classes, test.source) == ((6, 7, 1), 3, 2, f"{tmp_path}:test")
    assert np.array_equal(test[3][0][..., 0], noise(5, 6, 7, seed=1)[3])
    assert test.labels.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="has no images of the part val; name another one"):
        open_dataset(f"{tmp_path}:val")
    with pytest.raises(UserError, match=r"holds no images, but values of shape \(5,\); give the file of the images"):
        open_dataset(tmp_path / f"train-labels-idx1-ubyte{end}")
    (tmp_path / f"train-labels-idx1-ubyte{end}").unlink()
    alone = open_dataset(tmp_path / f"train-images-idx3-ubyte{end}")
    assert (alone.classes, alone.notes) == (
        0,
        (f"there are no labels, for there is no file train-labels-idx1-ubyte{end} beside it",),
    )


@pytest.mark.parametrize(("end", "other"), [("", ".gz"), (".gz", "")])
def test_idx_labels_may_be_packed_otherwise(tmp_path: Path, end: str, other: str):
    pack = {"": bytes, ".gz": gzip.compress}
    (tmp_path / f"images-ubyte{end}").write_bytes(pack[end](idx(noise(2, 3, 4))))
    (tmp_path / f"labels-ubyte{other}").write_bytes(pack[other](idx(np.array([7, 5], dtype=np.uint8))))
    ds = open_dataset(tmp_path / f"images-ubyte{end}")
    assert (ds.class_names, ds.labels.tolist()) == (("5", "7"), [1, 0])


@pytest.mark.parametrize("data", [b"", b"\0\0", idx(noise(2, 3, 4))[:-1], idx(noise(2, 3, 4), kind=9), b"PNG" * 9])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_that_is_none(tmp_path: Path, data: bytes, end: str):
    for content in (data, gzip.compress(data)) if end else (data,):
        (tmp_path / f"a-ubyte{end}").write_bytes(content)
        with pytest.raises(UserError, match=r"a-ubyte.*: not a whole IDX file of bytes; copy or pack it again"):
            open_dataset(tmp_path / f"a-ubyte{end}")


def test_a_part_of_what_has_none(tmp_path: Path):
    np.save(tmp_path / "set.npy", noise(3, 4, 4))
    with pytest.raises(UserError, match=r"set\.npy has no part named test; give it without :test"):
        open_dataset(f"{tmp_path / 'set.npy'}:test")
    with pytest.raises(UserError, match="no such file or folder"):
        open_dataset(f"{tmp_path / 'none.npz'}:test")


@pytest.mark.parametrize("data", [b"", b"no npz", b"PK\x03\x04 broken"])
def test_npz_that_is_none(tmp_path: Path, data: bytes):
    (tmp_path / "set.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"not a \.npz file of plain arrays"):
        open_dataset(tmp_path / "set.npz")


def test_npz_that_holds_a_plain_npy(tmp_path: Path):
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, noise(3, 4, 4))
    with pytest.raises(UserError, match=r"not a \.npz file of plain arrays"):
        open_dataset(tmp_path / "set.npz")


def parquet(tmp_path: Path, columns: dict[str, object], metadata: dict[str, str] | None = None) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set.parquet", row_group_size=2)
    return tmp_path / "set.parquet"


def hub(names: list[str]) -> dict[str, str]:
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


FILES = [png(seed=k) for k in range(5)]


@pytest.mark.parametrize("name", ["image", "img"])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_parquet_gives_back_its_images(tmp_path: Path, name: str, kind: str):
    column = (
        pa.array([{"bytes": data, "path": f"{k}.png"} for k, data in enumerate(FILES)])
        if kind == "struct"
        else pa.array(FILES, type=getattr(pa, kind)())
    )
    ds = open_dataset(parquet(tmp_path, {"id": list(range(5)), name: column, "label": [3, 1, 3, 1, 7]}))
    assert (len(ds), ds.image_shape, ds.class_names) == (5, (6, 5, 3), ("1", "3", "7"))
    assert ds.labels.tolist() == [1, 0, 1, 0, 2]
    for k in range(5):
        assert np.array_equal(ds[k][0], noise(6, 5, 3, seed=k))


def test_parquet_keeps_the_hubs_class_names_and_numbers(tmp_path: Path):
    names = ["zebra", "ant", "unused"]
    ds = open_dataset(parquet(tmp_path, {"image": FILES, "label": [1, 0, 1, 1, 0]}, hub(names)))
    assert ds.class_names == tuple(names)
    assert ds.labels.tolist() == [1, 0, 1, 1, 0]


def test_parquet_without_labels(tmp_path: Path):
    assert open_dataset(parquet(tmp_path, {"image": FILES})).classes == 0
    ds = open_dataset(parquet(tmp_path, {"image": FILES, "label": [-1] * 5}, hub(["a", "b"])))
    assert (ds.classes, ds.labels.tolist()) == (0, [0] * 5)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            {"image": ["a.png"]},
            r"row 0 cannot be read \(the row holds no bytes, .* a\.png is not there; store",
        ),
        ({"image": [[1, 2]]}, "column image holds list<.*>; store each image's file as bytes"),
        ({"pixels": [b"?"]}, r"no column image \(found: pixels\)"),
        ({"image": FILES[:2], "label": [1, None]}, "row 1 has no label"),
        ({"image": FILES[:2], "label": [1.5, 2.5]}, "labels must be one integer or word"),
        ({"image": pa.array([], type=pa.binary())}, "holds no images, for its table has no rows"),
        ({"image": [FILES[0], png(9, 9)]}, "row 1 is 9×9 RGB but row 0 is 6×5 RGB"),
    ],
)
def test_parquet_errors(tmp_path: Path, columns: dict[str, object], text: str):
    source = parquet(tmp_path, columns)
    with pytest.raises(UserError, match=text) as error:
        open_dataset(source)
    assert str(error.value).startswith(f"{source}: ")
    assert "\n" not in str(error.value)


def test_parquet_labels_outside_the_hubs_names(tmp_path: Path):
    with pytest.raises(UserError, match="row 1 has label 2, but there are 2 classes"):
        open_dataset(parquet(tmp_path, {"image": FILES[:2], "label": [0, 2]}, hub(["a", "b"])))


def test_parquet_with_unreadable_rows(tmp_path: Path):
    images = [{"bytes": FILES[0]}, {"bytes": None}, {"bytes": cut(FILES[1])}, {"bytes": FILES[2]}]
    source = parquet(tmp_path, {"image": images, "label": [0, 1, 0, 1]})
    with pytest.raises(Unreadable, match=r"row 1 cannot be read \(the row holds no bytes"):
        open_dataset(source)
    ds = open_dataset(source, unreadable="skip")
    assert ds.skipped == ("row 1", "row 2")
    assert ds.labels.tolist() == [0, 1]
    assert np.array_equal(ds[1][0], noise(6, 5, 3, seed=2))


def test_parquet_that_is_none(tmp_path: Path):
    (tmp_path / "set.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="not a whole parquet file"):
        open_dataset(tmp_path / "set.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = parquet(tmp_path, {"image": FILES})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'onefold\[parquet\]'"):
        open_dataset(source)
