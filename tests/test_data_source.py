"""What a source is: the registry of readers, and a format of one's own."""

import ast
import graphlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import onefold
from data_images import noise, png, write_folder
from onefold.data import as_dataset, convert, inspect, open_dataset, register_reader, source
from onefold.errors import UserError
from onefold.recipes import recipe


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_READERS", dict(source._READERS))


# A format of one's own: a count, sides and channels, then labels and pixels, a byte each.
def write_raw(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path.write_bytes(struct.pack("<4I", *images.shape) + labels.astype(np.uint8).tobytes() + images.tobytes())
    return path


def read_raw(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = path.read_bytes()
    if len(data) < 16:
        raise UserError(f"{name}: is cut short; copy it again")
    count, *shape = struct.unpack("<4I", data[:16])
    values = np.frombuffer(data, np.uint8, offset=16)
    return values[count:].reshape(count, *shape), values[:count]


IMAGES, LABELS = noise(40, 8, 8, 1), np.arange(40) % 4


def test_a_format_of_ones_own_is_opened_inspected_and_converted(tmp_path: Path):
    register_reader(".Raw", read_raw)
    path = write_raw(tmp_path / "set.RAW", IMAGES, LABELS)
    ds = open_dataset(path)
    assert (ds.source, len(ds), ds.image_shape, ds.class_names) == (str(path), 40, (8, 8, 1), ("0", "1", "2", "3"))
    assert np.array_equal(ds[7][0], IMAGES[7])
    assert ds.labels.tolist() == LABELS.tolist()
    assert inspect(path).classes == dict.fromkeys("0123", 10)
    convert(path, tmp_path / "set.zip", 8)
    assert np.array_equal(open_dataset(tmp_path / "set.zip")[10][0], IMAGES[1])
    (tmp_path / "short.raw").write_bytes(b"?")
    with pytest.raises(UserError, match=r"short\.raw: is cut short"):
        open_dataset(tmp_path / "short.raw")


def test_a_format_of_ones_own_is_trained_on(tmp_path: Path):
    register_reader(".raw", read_raw)
    path = write_raw(tmp_path / "set.raw", IMAGES, LABELS)
    config = recipe("digits").with_changes(
        {
            "data.source": str(path),
            "data.test": None,
            "network.width": 16,
            "network.depth": 1,
            "network.heads": 1,
            "training.images": 32,
            "training.batch": 16,
            "training.device": "cpu",
        }
    )
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert (run.network.config.classes, run.config.data.source) == (4, str(path))
    assert run.history[-1]["images"] == 32


def test_a_reader_may_return_files_or_an_object(tmp_path: Path):
    class Two:
        image_shape, classes, class_names = (6, 5, 3), 2, ("x", "y")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return noise(6, 5, 3, seed=index), index

    (tmp_path / "a.tar.mine").write_bytes(b"")
    digests = set()
    for given in (Two(), as_dataset(Two()), ([png(seed=0), png(seed=1)], ["x", "y"])):
        register_reader(".mine", lambda name, path, given=given: given)
        ds = open_dataset(tmp_path / "a.tar.mine")
        assert (ds.source, ds.class_names, ds.labels.tolist()) == (str(tmp_path / "a.tar.mine"), ("x", "y"), [0, 1])
        assert np.array_equal(ds[1][0], noise(6, 5, 3, seed=1))
        digests.add(ds.digest())
    assert len(digests) == 2  # that of files is of their bytes
    register_reader(".mine", lambda name, path: 7)
    with pytest.raises(UserError, match=r"a\.tar\.mine: has no image_shape"):
        open_dataset(tmp_path / "a.tar.mine")


def test_the_longest_suffix_decides(tmp_path: Path):
    (tmp_path / "set.tar.gz").write_bytes(b"")
    register_reader(".gz", lambda name, path: noise(1, 4, 4))
    register_reader(".tar.gz", lambda name, path: noise(2, 4, 4))
    assert len(open_dataset(tmp_path / "set.tar.gz")) == 2


def test_a_format_may_be_a_folder(tmp_path: Path):
    folder = write_folder(tmp_path / "set.mine", {"0.png": png()})
    assert len(open_dataset(folder)) == 1
    register_reader(".mine", lambda name, path: noise(2, 4, 4))
    assert len(open_dataset(folder)) == 2
    assert len(open_dataset(write_folder(tmp_path / "set.zip", {"0.png": png()}))) == 1


def test_messages_name_the_registered_formats(tmp_path: Path):
    register_reader(".mine", read_raw)
    (tmp_path / "cats.rar").write_bytes(b"?")
    for name in ("cats.rar", "none"):
        with pytest.raises(UserError, match=r"\.zip, .*\.mine file, or one of the words digits and digits:test$"):
            open_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("mine", "suffix 'mine': must begin with a dot"),
        (".", "must begin with a dot"),
        ("", "must begin with a dot"),
        (".ZIP", r"suffix \.ZIP: is read by onefold itself; choose another one"),
    ],
)
def test_suffixes_that_cannot_be_registered(suffix: str, text: str):
    with pytest.raises(UserError, match=text):
        register_reader(suffix, read_raw)


def imports(path: Path) -> Iterator[str]:
    """The files of the same folder that a file imports, function-level imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("onefold.data."):
            yield str(node.module).removeprefix("onefold.data.")


def test_files_import_each_other_in_no_circle():
    folder = Path(source.__file__).parent
    found = {path.stem: set(imports(path)) for path in folder.glob("*.py") if path.stem != "__init__"}
    graphlib.TopologicalSorter(found).prepare()  # raises where they run in a circle
    assert {"zip", "objects", "dataset"} <= found["source"]
    for path in folder.glob("*.py"):
        assert "from onefold.data import" not in path.read_text(encoding="utf-8")


def test_two_files_at_most_know_the_formats():
    folder = Path(onefold.__file__).parent
    knowing = {
        path.name for path in folder.rglob("*.py") if all(k in path.read_text("utf-8") for k in (".zip", ".parquet"))
    }
    assert knowing <= {"source.py", "config.py"}
