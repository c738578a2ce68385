from pathlib import Path

import numpy as np
import pytest

from data_images import cut, encode, noise, png, write_folder, write_zip
from onefold.data import contact_sheet, describe, inspect, open_dataset
from onefold.errors import UserError


def test_a_good_source(tmp_path: Path):
    files = {f"{c}/{k}.png": png(seed=10 * ord(c) + k) for c in "ab" for k in range(4)}
    files["b/9.png"] = png(seed=5)
    source = write_zip(tmp_path / "set.zip", files)
    found = inspect(source)
    assert (found.source, found.count, found.decoded) == (str(source), 9, 9)
    assert found.shapes == {(6, 5, 3): 9}
    assert found.classes == {"a": 4, "b": 5}
    assert (found.unreadable, found.advice) == ({}, ())
    ds = open_dataset(source)
    pixels = np.stack([ds[k][0] for k in range(9)]).reshape(-1, 3)
    assert found.values is not None
    assert found.values.minimum == tuple(pixels.min(0))
    assert found.values.maximum == tuple(pixels.max(0))
    np.testing.assert_allclose(found.values.mean, pixels.mean(0))
    np.testing.assert_allclose(found.values.std, pixels.std(0))
    text = describe(found)
    assert text[0] == f"{source}: 9 images"
    assert "sizes: 5×6 RGB (9)" in text
    assert "classes: 2: a (4), b (5)" in text
    assert "unreadable: 0" in text
    assert not any("\n" in line for line in text)


def test_a_bad_source_is_reported_not_refused(tmp_path: Path):
    files = {f"{k}.png": png(40, 50, seed=k) for k in range(5)}
    files |= {"5.png": png(20, 20), "6.png": encode(noise(40, 50)), "7.png": b"?", "8.png": cut(png(40, 50))}
    found = inspect(write_folder(tmp_path / "my set", files))
    assert found.count == 9
    assert found.decoded == 7
    assert found.shapes == {(40, 50, 3): 6, (20, 20, 3): 1, (40, 50, 1): 1}
    assert next(iter(found.shapes)) == (40, 50, 3)
    assert set(found.unreadable) == {"7.png", "8.png"}
    assert "not a JPEG" in found.unreadable["7.png"]
    assert len(found.advice) == 2
    assert f"onefold data convert '{tmp_path}/my set' OUT.zip --size 40 --unreadable skip" in found.advice[0]
    assert "2 images cannot be read" in found.advice[1]
    assert found.values is not None
    assert len(found.values.mean) == 3
    text = describe(found)
    assert "unreadable: 2" in text
    assert any(line.startswith("  8.png: ") for line in text)
    assert sum(line.startswith("advice: ") for line in text) == 2


def test_nothing_readable(tmp_path: Path):
    found = inspect(write_folder(tmp_path, {"1.png": b"?", "2.png": b""}))
    assert (found.shapes, found.values, found.decoded) == ({}, None, 0)
    assert "sizes: none can be read" in describe(found)


def test_long_lists_are_cut_short(tmp_path: Path):
    found = inspect(write_folder(tmp_path, {f"{c}/{k}.png": b"?" for c in range(30) for k in range(2)}))
    text = "\n".join(describe(found))
    assert "classes: 30: 0 (2), 1 (2)" in text
    assert "and 10 more" in text
    assert "and 40 more" in text


def test_a_sample_is_spread_but_every_header_is_seen(tmp_path: Path):
    files = {f"{k}.png": encode(np.full((4, 4), k, dtype=np.uint8)) for k in range(50)}
    files["49.png"] = png(4, 4)
    told = []
    found = inspect(write_folder(tmp_path, files), sample=5, progress=lambda *pair: told.append(pair))
    assert found.decoded == 5
    assert found.shapes == {(4, 4, 1): 49, (4, 4, 3): 1}
    assert found.values is not None
    assert (found.values.minimum, found.values.maximum, found.values.mean) == ((0,), (40,), (20.0,))
    assert told[-1] == (50, 50)
    assert inspect(tmp_path, sample=None).decoded == 50


def test_digits_and_missing():
    found = inspect("digits")
    assert found.values is not None
    assert (found.count, found.values.minimum, found.values.maximum) == (1437, (0,), (255,))
    with pytest.raises(UserError, match="no such file"):
        inspect("nothing here")


def test_contact_sheet_of_digits():
    ds = open_dataset("digits")
    sheet = contact_sheet(ds, 10)
    assert (sheet.mode, sheet.size) == ("RGB", (4 * 66 + 2, 3 * 66 + 2))
    pixels = np.asarray(sheet)
    for place in range(10):
        row, column = divmod(place, 4)
        tile = pixels[row * 66 + 2 :, column * 66 + 2 :][4:64:8, 4:64:8]
        assert np.array_equal(tile[..., :1], ds[place * 1437 // 10][0])
    assert contact_sheet(ds, 1000).size == (10 * 66 + 2, 10 * 66 + 2)
    with pytest.raises(UserError, match="at least 1"):
        contact_sheet(ds, 0)


@pytest.mark.parametrize(
    ("shape", "tile"), [((70, 90, 3), (90, 70)), ((512, 1024, 4), (256, 128)), ((64, 1, 7), (1, 64))]
)
def test_contact_sheet_of_any_shape(tmp_path: Path, shape: tuple[int, int, int], tile: tuple[int, int]):
    np.savez(tmp_path / "set.npz", images=noise(2, *shape))
    sheet = contact_sheet(open_dataset(tmp_path / "set.npz"))
    assert (sheet.mode, sheet.size) == ("RGB", (2 * tile[0] + 6, tile[1] + 4))
