"""What every data set promises: the embedded digits, digests, views, and pixels as numbers."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_images import cut, encode, noise, png, write_folder, write_zip
from onefold.data import Subset, holdout, open_dataset, to_float, to_uint8
from onefold.errors import UserError


def test_digits():
    train, test = open_dataset("digits"), open_dataset("digits:test")
    assert (len(train), len(test)) == (1437, 360)
    assert (train.source, test.source) == ("digits", "digits:test")
    for ds in (train, test):
        assert ds.image_shape == (8, 8, 1)
        assert ds.class_names == tuple("0123456789")
        assert ds[0][0].shape == (8, 8, 1)
        assert ds[3][1] == ds.labels[3]
    together = np.bincount(train.labels) + np.bincount(test.labels)
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The 17 grey levels of the original, on the whole range of a byte.
    values = np.unique([train[k][0] for k in range(1437)])
    assert values.tolist() == np.round(np.arange(17) * 255 / 16).tolist()


def test_the_split_of_the_digits_is_fixed_and_disjoint():
    with np.load(files("onefold.data") / "digits.npz") as data:
        assert sorted(data["order"].tolist()) == list(range(1797))
        images, labels, order = data["images"], data["labels"], data["order"]
    train, test = open_dataset("digits"), open_dataset("digits:test")
    for place, ds in ((0, train), (1437, test)):
        for k in (0, 7, len(ds) - 1):
            assert np.array_equal(ds[k][0][..., 0], images[order[place + k]])
            assert ds[k][1] == labels[order[place + k]]
    assert train.digest() == "6773813f2eadfb1f8fb80abe9fd644e827e7af444cabd8c3716a4fa010044520"
    assert test.digest() == "4b9a4ebc0fc9f94bcf28aaa3befb9568f8f4ebca4a8d485e90e637884a41447f"


def test_the_licence_of_the_digits_is_there():
    text = (files("onefold.data") / "digits.LICENSE").read_text("utf-8")
    assert "10.24432/C50P49" in text
    assert "CC BY 4.0" in text


FILES = {f"{c}/{k}.png": png(seed=ord(c) + k) for c in "ab" for k in range(3)}


def digest(folder: Path, named: dict[str, bytes]) -> str:
    return open_dataset(write_folder(folder, named)).digest()


def test_the_digest_is_that_of_the_content(tmp_path: Path):
    same = digest(tmp_path / "1", FILES)
    assert len(same) == 64
    assert digest(tmp_path / "2", dict(reversed(FILES.items()))) == same
    assert open_dataset(write_zip(tmp_path / "set.zip", FILES)).digest() == same
    assert open_dataset(write_zip(tmp_path / "top.zip", {f"t/{n}": d for n, d in FILES.items()})).digest() == same
    assert open_dataset(tmp_path / "1", unreadable="skip").digest() == same


@pytest.mark.parametrize(
    "change",
    [
        {"a/0.png": png(seed=1000)},
        {"a/4.png": png()},
        {"a/0.png": FILES["a/1.png"], "a/1.png": FILES["a/0.png"]},
        {"a/2.png": FILES["b/0.png"], "b/0.png": FILES["a/2.png"]},
    ],
)
def test_the_digest_tells_every_change(tmp_path: Path, change: dict[str, bytes]):
    assert digest(tmp_path / "1", FILES) != digest(tmp_path / "2", FILES | change)


def test_the_digest_tells_labels_and_shapes(tmp_path: Path):
    found = set()
    arrays = noise(2, 4, 6), noise(2, 6, 4)
    for images in arrays:
        for labels in ([0, 1], [1, 0], [0, 0], [3, 4]):
            np.savez(tmp_path / "set.npz", images=images, labels=labels)
            found.add(open_dataset(tmp_path / "set.npz").digest())
    assert len(found) == 8


def test_the_digest_is_computed_once(tmp_path: Path):
    ds = open_dataset(write_folder(tmp_path / "set", FILES))
    before = ds.digest()
    (tmp_path / "set/a/0.png").unlink()
    assert ds.digest() == before


def test_skipped_images_do_not_count_in_the_digest(tmp_path: Path):
    same = digest(tmp_path / "1", FILES)
    write_folder(tmp_path / "1", {"a/9.png": cut(png(30, 30))})
    assert open_dataset(tmp_path / "1", unreadable="skip").digest() == same


def test_subset_is_a_view():
    ds = open_dataset("digits")
    part = Subset(ds, [5, 3, 5])
    assert (len(part), part.source, part.image_shape, part.classes) == (3, "digits", (8, 8, 1), 10)
    assert part.labels.tolist() == ds.labels[[5, 3, 5]].tolist()
    assert np.array_equal(part[1][0], ds[3][0])
    assert part[-1][1] == ds[5][1]
    with pytest.raises(IndexError):
        part[3]
    digests = {ds.digest(), part.digest(), Subset(ds, [3, 5, 5]).digest(), Subset(part, [0]).digest()}
    assert len(digests) == 4
    assert Subset(ds, np.array([5, 3, 5])).digest() == part.digest()


def test_a_subset_keeps_what_was_skipped(tmp_path: Path):
    write_folder(tmp_path, {"1.png": png(30, 30), "2.png": png(30, 30), "3.png": cut(png(30, 30))})
    train, test = holdout(open_dataset(tmp_path, unreadable="skip"), 0.5)
    assert train.skipped == test.skipped == ("3.png",)


@given(st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_holdout_parts_are_disjoint_and_complete(fraction: float, seed: int):
    ds = open_dataset("digits:test")
    ds = Subset(ds, range(len(ds)))
    if not 0 < round(360 * fraction) < 360:
        return
    train, test = holdout(ds, fraction, seed)
    assert len(test) == round(360 * fraction)
    assert sorted([*train._indices, *test._indices]) == list(range(360))


def test_holdout_is_fixed_by_its_seed():
    ds = open_dataset("digits")
    first, again, other = holdout(ds, 0.1), holdout(ds, 0.1), holdout(ds, 0.1, seed=1)
    assert first[1].digest() == again[1].digest()
    assert first[1].digest() != other[1].digest()
    assert set(first[1].labels.tolist()) == set(range(10))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1e-9, 3.0])
def test_holdout_refuses_empty_parts(fraction: float):
    with pytest.raises(UserError, match=r"digits: holding out a fraction .*--data\.holdout 0\.0007.*--test-data"):
        holdout(open_dataset("digits"), fraction)


@pytest.mark.parametrize("count", [2, 3, 7, 30, 299])
def test_the_advised_fraction_can_be_held_out(count: int):
    few = Subset(open_dataset("digits"), range(count))
    with pytest.raises(UserError, match=f"of {count} images") as error:
        holdout(few, 0.001)
    advised = float(str(error.value).partition("--data.holdout ")[2].partition(",")[0])
    assert len(holdout(few, advised)[1]) == 1


def test_one_image_cannot_be_cut_in_two():
    with pytest.raises(UserError, match=r"holds 1 image, but at least 2 are needed.*--test-data"):
        holdout(Subset(open_dataset("digits"), [0]), 0.5)


def test_bytes_to_numbers_and_back_is_exact():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    numbers = to_float(x)
    assert numbers.dtype == torch.float32
    assert (numbers.min(), numbers.max(), numbers.shape) == (-1, 1, x.shape)
    assert torch.allclose(numbers.double(), x.double() / 127.5 - 1, atol=1e-7)
    assert torch.equal(to_uint8(numbers), x)
    assert torch.equal(to_uint8(numbers.double()), x)


@given(st.integers(0, 255), st.floats(-0.49, 0.49))
def test_numbers_are_rounded_to_the_nearest_byte(value: int, off: float):
    assert to_uint8(torch.tensor((value + off) / 127.5 - 1)).item() == value


def test_numbers_outside_are_clamped():
    x = torch.tensor([-9.0, -1.01, 1.01, 9.0, float("inf"), -float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 255, 255, 255, 0]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_grey_is_one_channel(tmp_path: Path):
    ds = open_dataset(write_folder(tmp_path, {"a.png": encode(noise(3, 4))}))
    assert np.array_equal(ds[0][0], noise(3, 4)[..., None])
