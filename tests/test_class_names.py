"""Class names live in the run: recorded, compared, and known to the network that it publishes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import onefold
from conftest import randomised
from data_images import encode, noise, write_folder
from helpers_runs import tiny
from onefold import cli
from onefold.data import Dataset, as_dataset, open_dataset, with_classes_of
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.networks.base import Network, NetworkConfig, build
from onefold.sampling import resolve_labels
from onefold.training.config import DataConfig
from onefold.training.datasets import SHOWN, DataRecord, describe, open_data
from onefold.training.loop import train
from onefold.training.phases import phases_of
from onefold.training.prepare import fit_to_data
from onefold.training.run import Run, load_run

PETS = ("cat", "dog", "fox")


def folder(path: Path, *classes: str, count: int = 12, start: int = 0) -> Path:
    files = {
        f"{c}/{k}.png": encode(noise(4, 4, seed=start + 100 * j + k))
        for j, c in enumerate(classes)
        for k in range(count)
    }
    return write_folder(path, files)


def config_of(source: Path | str, **changes: Any) -> onefold.Config:
    changes = {
        "data.source": str(source),
        "data.test": None,
        "training.images": 16,
        "training.sample_every": 16,
        **changes,
    }
    return tiny().with_changes(changes)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("pets")
    return train(config_of(folder(place / "images", *PETS)), place / "run", quiet=True)


# --- the network knows them -------------------------------------------------------------------------------------------


def test_the_published_network_knows_its_classes(pets: Run, tmp_path: Path):
    assert Network.from_pretrained(pets.folder / "model").config.class_names == PETS
    network = load_run(pets.folder).network
    network.save_pretrained(tmp_path)
    assert Network.from_pretrained(tmp_path).config.class_names == PETS


def test_samples_by_name_are_those_by_number(pets: Run):
    network = pets.network
    by_name = network.sample(4, labels=["fox", "cat", "dog", "2"])
    assert np.array_equal(by_name, network.sample(4, labels=[2, 0, 1, 2]))
    for labels, text in (
        (["fix"], r"labels: 'fix' is no class of this network; perhaps fox \(2\)"),
        (["whale"], r"labels: 'whale' is no class of this network; it knows cat \(0\), dog \(1\), fox \(2\)$"),
        ("fox", r"labels: 'fox' is a single label; give one for each image, \['fox'\] \* 1"),
        (2, r"labels: 2 is a single label; give one for each image, \[2\] \* 1"),
    ):
        with pytest.raises(UserError, match=text):
            network.sample(1, labels=labels)


def test_where_names_are_numbers_a_word_is_a_name():
    names = ["1", "2", "5", "999"]
    assert resolve_labels(3, ["1", "999", "5"], 0, 4, names) == [0, 3, 2]
    assert resolve_labels(2, [1, 4], 0, 4, names) == [1, 4]
    with pytest.raises(UserError, match=r"labels: '0' is no class of this network; it knows 1 \(0\), 2 \(1\), 5 \(2\)"):
        resolve_labels(1, ["0"], 0, 4, names)
    assert resolve_labels(3, ["0", "9", "10"], 0, 10) == [0, 9, 10]
    with pytest.raises(UserError, match="labels: 'x' is no class of this network, which knows classes by number"):
        resolve_labels(1, ["x"], 0, 10)
    with pytest.raises(UserError, match="labels: -1 is not a class"):
        resolve_labels(1, ["-1"], 0, 10)


def test_pictures_are_named_by_class(pets: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.run(["sample", str(pets.folder), "--labels", "fox", "cat", "3", "--seed", "3", "--separate", "--out", "a"])
        == 0
    )
    assert sorted(path.name for path in Path("a").iterdir()) == ["seed3-fox.png", "seed4-cat.png", "seed5-class3.png"]
    with Image.open("a/seed3-fox.png") as image:
        assert (image.text["label"], image.text["class"], image.text["seed"]) == ("2", "fox", "3")
    assert cli.run(["sample", str(pets.folder), "--labels", "dog", "--n", "2", "--out", "b.png"]) == 0
    with Image.open("b.png") as image:
        assert (image.text["labels"], image.text["classes"]) == ("[1, 1]", "dog, dog")
    assert cli.run(["sample", str(pets.folder), "--labels", "cow"]) == 2


def test_names_of_any_letters_become_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ("a/b", "7", "großer Hund")
    data = as_dataset((noise(12, 4, 4), [names[k % 3] for k in range(12)]))
    run = train(config_of("digits"), tmp_path / "run", data=data, quiet=True)
    assert run.config.network.class_names == ("7", "a/b", "großer Hund")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sample", "run", "--labels", "a/b", "7", "großer Hund", "--separate", "--out", "a"]) == 0
    files = {"seed0-a_b.png", "seed1-7.png", "seed2-großer_Hund.png"}
    assert {path.name for path in Path("a").iterdir()} == files


def test_names_that_are_the_numbers_are_not_repeated():
    assert fit_to_data(tiny(), open_dataset("digits")).network.class_names == ()
    with pytest.raises(
        UserError, match=r"network\.class_names: 2 given where network\.classes is 10; name each class, or none"
    ):
        NetworkConfig(class_names=("a", "b"))


def test_label_vectors_follow_the_names(pets: Run, tmp_path: Path):
    """From the weights of another run: those of classes of the same name, whatever their numbers."""
    data = open_dataset(folder(tmp_path / "other", "bee", "cat", "fox"))
    config = fit_to_data(config_of(data.source), data)
    source = randomised(build(pets.config.network), seed=5)
    network = phases_of(config)[0].begin_from(source)
    own, theirs = network.state_dict()["labels.weight"], source.state_dict()["labels.weight"]
    assert torch.equal(own[[1, 2]], theirs[[0, 2]])
    assert not torch.equal(own[0], theirs[0])
    assert not torch.equal(own[0], theirs[1])


# --- before training --------------------------------------------------------------------------------------------------


def test_a_line_names_images_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = folder(tmp_path / "set/train", *PETS)
    folder(tmp_path / "set/val", "cat", "fox", count=4)
    train(config_of(source.parent), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    there = str(source.parent)
    assert lines[:3] == [
        f"{there}: 36 images to train on, 8 to test on, from {there}:val; 3 classes: cat (12), dog (12), fox (12)",
        "note: of its parts (train, val), train is read",
        f"note: {there}:val has no images of the classes dog",
    ]
    run = load_run(tmp_path / "run")
    assert run.config.data.test == f"{there}:val"
    test = run.open_data()[1]
    assert test.labels.tolist() == [0] * 4 + [2] * 4
    assert [test[k][1] for k in range(8)] == test.labels.tolist()


def test_a_long_list_of_classes_is_cut_and_no_classes_are_said(tmp_path: Path):
    names = [f"c{k}" for k in range(SHOWN + 5)]
    named = open_data(DataConfig(str(folder(tmp_path / "a", *names, count=2)), holdout=0.5))
    assert re.search(r"; 17 classes: c0 \(\d\), .*, c11 \(\d\) and 5 more$", describe(named))
    write_folder(tmp_path / "b", {f"{k}.png": encode(noise(4, 4, seed=k)) for k in range(4)})
    plain = open_data(DataConfig(str(tmp_path / "b"), holdout=0.5))
    assert describe(plain) == f"{tmp_path / 'b'}: 2 images to train on, 2 to test on, set apart from them; no classes"


def test_a_test_part_of_another_kind_is_not_used_and_said(tmp_path: Path):
    """As where the test images of a contest have no labels."""
    source = folder(tmp_path / "set/train", *PETS).parent
    write_folder(source / "test", {f"{k}.png": encode(noise(4, 4, seed=k)) for k in range(5)})
    training, test = open_data(DataConfig(str(source), holdout=0.25))
    assert (len(training), len(test)) == (27, 9)
    assert f"{source}:test has no classes, and is not used" in training.notes
    folder(source / "val", *PETS, count=2)
    assert open_data(DataConfig(str(source)))[1].source == f"{source}:val"
    folder(source / "val", "wolf", count=2)
    with pytest.raises(UserError, match=r":val: has 1 class that .*set lacks \(wolf; there: cat, dog, fox\)"):
        open_data(DataConfig(str(source)))


@pytest.mark.parametrize(
    ("test", "train", "text"),
    [
        (("cat", "eel"), PETS, r"has 1 class that .* lacks \(eel; there: cat, dog, fox\); name its classes alike"),
        (("0", "1", "2", "4"), ("0", "1", "2", "3"), r"has 1 class that .* lacks \(4; there"),
        (("0", "1", "2"), PETS, r"has 3 classes that .* lacks \(0, 1, 2; there"),
        (PETS, ("0", "1", "2"), r"has 3 classes that .* lacks \(cat, dog, fox; there: 0, 1, 2\)"),
        (("01", "02"), ("1", "2"), r"lacks \(01, 02; there"),
        (("Cat",), PETS, r"lacks \(Cat; there"),
        ((), PETS, r"has no classes, but .* has 3 \(cat, dog, fox\); .*--labels-from none"),
        (PETS, (), r"has no classes, but .* has 3 \(cat, dog, fox\); .*--labels-from none"),
    ],
)
def test_test_images_of_other_classes_are_refused_by_name(test: tuple[str, ...], train: tuple[str, ...], text: str):
    with pytest.raises(UserError, match=text) as error:
        with_classes_of(labelled(test), labelled(train))
    assert "\n" not in str(error.value)


def labelled(names: tuple[str, ...]) -> Dataset:
    images = noise(2 * max(1, len(names)), 4, 4)
    return as_dataset((images, np.array([*names, *names])) if names else images)


def test_test_images_are_numbered_by_name():
    test, wanted = labelled(("10", "2")), labelled(("1", "2", "3", "10"))
    same = with_classes_of(test, wanted)
    assert (test.class_names, test.labels.tolist()) == (("2", "10"), [1, 0, 1, 0])
    assert (same.class_names, same.labels.tolist()) == (("1", "2", "3", "10"), [3, 1, 3, 1])
    assert [same[k][1] for k in range(4)] == [3, 1, 3, 1]
    assert np.array_equal(same[2][0], test[2][0])
    assert same.notes == (f"{test.source} has no images of the classes 1, 3",)
    assert same.digest() != test.digest()
    assert with_classes_of(wanted, wanted) is wanted


# --- what has changed -------------------------------------------------------------------------------------------------


def test_the_run_records_its_data(pets: Run):
    described = json.loads((pets.folder / "data.json").read_text())
    assert described["class_names"] == list(PETS)
    training, test = open_data(pets.config.data)
    counts = [np.bincount(part.labels, minlength=3).tolist() for part in (training, test)]
    assert [described[use]["counts"] for use in ("train", "test")] == counts
    assert [described[use]["images"] for use in ("train", "test")] == [len(training), len(test)]
    assert described["train"]["fingerprint"] == training.fingerprint()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return train(config_of(folder(tmp_path / "images", *PETS), **{"data.holdout": 0.25}), tmp_path / "run", quiet=True)


def changed(run: Run) -> list[str]:
    lines: list[str] = []
    load_run(run.folder).open_data(lines.append)
    return lines


def test_nothing_changed_is_nothing_said(run: Run):
    assert changed(run) == []


def test_other_classes_are_refused(run: Run):
    images = Path(run.config.data.source)
    (images / "fox").rename(images / "ant")
    text = r"its classes are not those that the run .* began with: it now lacks fox and has ant; restore the data or"
    for action in (
        lambda: train(None, run.folder, resume=True, images=32, quiet=True),
        lambda: evaluate(load_run(run.folder)),
        lambda: changed(run),
    ):
        with pytest.raises(UserError, match=text):
            action()


def test_other_names_are_refused_without_a_record_too(run: Run):
    images = Path(run.config.data.source)
    (images / "fox").rename(images / "ant")
    (run.folder / "data.json").unlink()
    with pytest.raises(UserError, match="its classes have other names than when the run began"):
        train(None, run.folder, resume=True, images=32, quiet=True)


def test_other_images_are_said(run: Run, capsys: pytest.CaptureFixture[str]):
    images = Path(run.config.data.source)
    (images / "cat/0.png").write_bytes(encode(noise(4, 4, seed=999)))
    expected = [
        f"{images}: its {use} images or their labels are others than when the run began" for use in ("training", "test")
    ]
    assert changed(run) == expected
    train(None, run.folder, resume=True, images=32)
    assert f"note: {expected[0]}" in capsys.readouterr().out
    said: list[str] = []
    evaluate(load_run(run.folder), images=20, say=said.append)
    assert said[:2] == expected
    (images / "cat/0.png").unlink()
    assert changed(run)[0] == f"{images}: now has 26 training images; the run began with 27"


def test_a_moved_label_changes_the_fingerprint(tmp_path: Path):
    def fingerprint(*moves: tuple[str, str]) -> str | None:
        place = folder(tmp_path / f"{len(moves)}", *PETS)
        for old, new in moves:
            (place / old).rename(place / new)
        return open_dataset(place).fingerprint()

    whole = fingerprint()
    assert whole is not None
    assert whole == open_dataset(folder(tmp_path / "again", *PETS)).fingerprint()
    assert whole != fingerprint(("cat/11.png", "dog/99.png"))


def test_a_fingerprint_reads_few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onefold.data.dataset.HEADERS", 4)
    data = open_dataset(folder(tmp_path, "a", "b", count=20))
    read: list[int] = []
    content = type(data._listing).content  # pyright: ignore
    monkeypatch.setattr(type(data._listing), "content", lambda self, k: read.append(k) or content(self, k))  # pyright: ignore
    assert data.fingerprint() is not None
    assert read == [0, 10, 20, 30]


def test_images_of_an_object_are_not_read_to_record_them(tmp_path: Path):
    class Random:
        image_shape, classes, class_names = (4, 4, 1), 2, ("sad", "happy")

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.random.default_rng().integers(0, 256, (4, 4, 1), np.uint8), index % 2

    run = train(config_of("digits"), tmp_path / "run", data=Random(), quiet=True)
    record = DataRecord.read(run.folder)
    assert record is not None
    assert (record.class_names, record.train.counts, record.train.fingerprint) == (("sad", "happy"), (), None)
    assert describe(run.open_data()).endswith("2 classes: sad, happy")
    assert run.network.config.class_names == ("sad", "happy")
    lines: list[str] = []
    load_run(run.folder, data=Random()).open_data(lines.append)
    assert lines == []
