"""Data that are Python objects: `as_dataset`."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data_images import noise, png
from onefold.data import Loader, as_dataset, holdout, inspect, open_dataset, read_all
from onefold.errors import UserError


class Faces(torch.utils.data.Dataset):
    """As users of torch write theirs; counts how often each item is read."""

    image_shape = (6, 5, 3)
    classes = 4

    def __init__(self, **changes: object) -> None:
        self.images = noise(12, 6, 5, 3)
        self.read = [0] * 12
        self.__dict__.update(changes)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> object:
        self.read[index] += 1
        return self.images[index], index % 4


class Tensors(Faces):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.images[index]), torch.tensor(index % 4)


class Listlike:
    image_shape = (4, 4, 1)
    classes = np.int64(0)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> list[object]:
        return [noise(3, 4, 4)[index], None]


def test_a_torch_style_object_is_a_data_set():
    ds = as_dataset(Faces())
    assert ds.source == "Faces (a Python object)"
    assert (len(ds), ds.image_shape, ds.classes, ds.class_names) == (12, (6, 5, 3), 4, ("0", "1", "2", "3"))
    assert ds.labels.tolist() == [0, 1, 2, 3] * 3
    assert ds.labels.dtype == np.int64
    for k in (0, 7, -1):
        image, label = ds[k]
        assert np.array_equal(image, noise(12, 6, 5, 3)[k])
        assert label == k % 4
    with pytest.raises(IndexError):
        ds[12]
    train, test = holdout(ds, 0.25)
    assert (len(train), len(test)) == (9, 3)


def test_tensors_and_their_labels_are_read():
    x, y = read_all(as_dataset(Tensors()))
    assert np.array_equal(x.numpy().transpose(0, 2, 3, 1), noise(12, 6, 5, 3))
    assert y.tolist() == [0, 1, 2, 3] * 3


def test_a_list_like_object_without_classes():
    ds = as_dataset(Listlike())
    assert (len(ds), ds.image_shape, ds.classes, ds.class_names) == (3, (4, 4, 1), 0, ())
    assert ds[2][0].shape == (4, 4, 1)
    assert ds.labels.tolist() == [0, 0, 0]


def test_class_names_are_kept():
    assert as_dataset(Faces(class_names=["a", "b", "c", "d"])).class_names == ("a", "b", "c", "d")


def test_labels_are_read_once_and_only_when_asked_for():
    faces = Faces()
    ds = as_dataset(faces)
    part, _ = holdout(ds, 0.5)
    with Loader(part, batch=3, seed=0, in_memory=False) as loader:
        next(loader)
    assert sum(faces.read) <= 5  # the first, to check it, one to know the shape, and a batch
    before = sum(faces.read)
    for _ in range(3):
        assert len(ds.labels) == 12
        assert len(part.labels) == 6
    assert sum(faces.read) == before + 12
    ds.digest()
    assert sum(faces.read) <= before + 3 * 12


def test_an_object_is_asked_for_one_item_at_a_time():
    class Alone(Faces):
        inside = 0

        def __getitem__(self, index: int) -> object:
            self.inside += 1
            assert self.inside == 1
            time.sleep(0.001)
            self.inside -= 1
            return super().__getitem__(index)

    ds = as_dataset(Alone())
    with Loader(ds, batch=2, seed=0, in_memory=False, workers=4) as loader:
        for _ in range(10):
            next(loader)


def test_the_digest_is_that_of_images_and_labels():
    same = as_dataset(Faces()).digest()
    assert as_dataset(Tensors()).digest() == same
    assert as_dataset((noise(12, 6, 5, 3), np.arange(12) % 4)).digest() == same
    assert as_dataset(Faces(images=noise(12, 6, 5, 3, seed=1))).digest() != same
    assert as_dataset(Faces(classes=5)).digest() != same
    assert as_dataset((noise(12, 6, 5, 3), np.arange(12) % 3)).digest() != same


def test_what_is_a_data_set_or_names_one(tmp_path: Path):
    digits = open_dataset("digits")
    assert as_dataset(digits) is digits
    assert as_dataset("digits").digest() == digits.digest()
    np.savez(tmp_path / "set.npz", images=noise(3, 4, 4))
    assert len(as_dataset(tmp_path / "set.npz")) == 3


def test_arrays_tensors_and_encoded_files():
    images = noise(4, 6, 5, 3)
    assert as_dataset(images).classes == 0
    ds = as_dataset((torch.from_numpy(images), ["b", "a", "b", "a"]))
    assert (ds.source, ds.class_names, ds.labels.tolist()) == ("tuple (a Python object)", ("a", "b"), [1, 0, 1, 0])
    assert np.array_equal(ds[3][0], images[3])
    ds = as_dataset(([png(seed=1), png(seed=2)], [7, 7]))
    assert (ds.image_shape, ds.class_names) == ((6, 5, 3), ("7",))
    assert np.array_equal(ds[1][0], noise(6, 5, 3, seed=2))


class Alike(Faces):
    """Gives the same item always."""

    def __getitem__(self, index: int) -> object:
        return self.item


class Nothing:
    pass


class Lengthless:
    image_shape, classes = (6, 5, 3), 4

    def __getitem__(self, index: int) -> object:
        return noise(6, 5, 3), 0


class Itemless:
    image_shape, classes = (6, 5, 3), 4

    def __len__(self) -> int:
        return 1


class Empty(Itemless, Lengthless):
    def __len__(self) -> int:
        return 0


GOOD = noise(6, 5, 3)
WRONG = [
    (Nothing(), r"Nothing \(a Python object\): has no image_shape; give it image_shape, \(H, W, C\)"),
    (3.5, r"float \(a Python object\): has no image_shape"),
    ([(GOOD, 1)], r"list \(a Python object\): has no image_shape"),
    (Lengthless(), r"Lengthless .*: has no len\(\); give it len\(\), the number of images"),
    (Itemless(), r"Itemless .*: has no \[i\]; let \[i\] give image i"),
    (Empty(), r"Empty .*: holds no images, for its len\(\) is 0"),
    (Faces(image_shape=(6, 5)), r"image_shape is \(6, 5\); give three integers, \(H, W, C\)"),
    (Faces(image_shape=(6, 5, 0)), r"image_shape is \(6, 5, 0\); its numbers must be at least 1"),
    (Faces(image_shape=(3, 32, 40)), r"looks channels first; give \(H, W, C\), \(32, 40, 3\)"),
    (Faces(classes=["a", "b"]), r"classes is \['a', 'b'\]; give the number of classes, or 0"),
    (Faces(classes=-1), "classes is -1; give the number of classes, or 0"),
    (Faces(class_names=["a"]), "class_names has 1 name, but classes is 4; name each class"),
    (Alike(item=GOOD), r"Alike .*: \[0\] gives a ndarray; let it give a pair, image and label"),
    (Alike(item=(GOOD, 1, 2)), r"\[0\] gives a tuple; let it give a pair"),
    (Alike(item=(GOOD / 255, 1)), "image 0 is float64; give uint8 with values from 0 to 255"),
    (Alike(item=(torch.zeros(6, 5, 3), 1)), "image 0 is float32; give uint8"),
    (Alike(item=(GOOD[:5], 1)), r"image 0 has shape \(5, 5, 3\), but image_shape is \(6, 5, 3\); make them alike"),
    (Alike(item=(GOOD.transpose(2, 0, 1), 1)), r"\(3, 6, 5\), looks channels first;.* by \.transpose\(1, 2, 0\)"),
    (Alike(item=(torch.from_numpy(GOOD).permute(2, 0, 1), 1)), r"looks channels first;.* by \.permute\(1, 2, 0\)"),
    (Alike(item=(GOOD, 4)), "image 0 has label 4, but there are 4 classes; number them from 0 to 3"),
    (Alike(item=(GOOD, -1)), "image 0 has label -1, but there are 4 classes"),
    (Alike(item=(GOOD, "cat")), "image 0 has the label 'cat'; give an integer from 0 to 3"),
    (Alike(item=(GOOD, 1.0)), "image 0 has the label 1.0; give an integer"),
    (Alike(item=(GOOD, np.eye(4)[1])), "image 0 has the label .*; give an integer"),
    ((GOOD[None] / 255, [1]), r"tuple .*: images are float64; store them as uint8"),
    ((GOOD[None], [1, 2]), "1 image but 2 labels"),
    (([png()], [1, 2]), "1 image but 2 labels"),
]


@pytest.mark.parametrize(("thing", "text"), WRONG)
def test_what_is_wrong_is_said_on_one_line(thing: object, text: str):
    with pytest.raises(UserError, match=text) as error:
        as_dataset(thing)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{type(thing).__name__} (a Python object): ")


def test_a_later_item_that_is_wrong_is_named():
    class Late(Faces):
        def __getitem__(self, index: int) -> object:
            return self.images[index][: 6 - index // 9], index % 4

    ds = as_dataset(Late())
    assert ds[8][1] == 0
    with pytest.raises(UserError, match=r"Late .*: image 9 has shape \(5, 5, 3\)"):
        ds[9]
    with pytest.raises(UserError, match="image 9"):
        read_all(ds)


def test_what_the_object_raises_passes_through():
    class Lazy(Faces):
        def __getitem__(self, index: int) -> object:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        as_dataset(Lazy())
    assert inspect("digits").count == 1437
