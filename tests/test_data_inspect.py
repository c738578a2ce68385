import shlex
from pathlib import Path

import numpy as np
import pytest

from data_images import cut, encode, noise, png, write_folder, write_zip
from onefold.cli import run
from onefold.data import contact_sheet, describe, inspect, open_dataset
from onefold.data.messages import best_size
from onefold.errors import UserError


def test_a_good_source(tmp_path: Path):
    files = {f"{c}/{k}.png": png(6, 4, seed=10 * ord(c) + k) for c in "ab" for k in range(4)}
    files["b/9.png"] = png(6, 4, seed=5)
    source = write_zip(tmp_path / "set.zip", files)
    found = inspect(source)
    assert (found.source, found.count, found.decoded_count, found.measured_count) == (str(source), 9, 9, 9)
    assert found.shapes == {(6, 4, 3): 9}
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
    assert "sizes: 6×4 (height × width) RGB (9)" in text
    assert "values over 9 images, RGB:" in text
    assert "classes: 2: a (4), b (5)" in text
    assert "unreadable: 0" in text
    assert not any("\n" in line for line in text)


def test_a_bad_source_is_reported_not_refused(tmp_path: Path):
    files = {f"{k}.png": png(40, 50, seed=k) for k in range(5)}
    files |= {"5.png": png(20, 20), "6.png": encode(noise(40, 50)), "7.png": b"?", "8.png": cut(png(40, 50))}
    found = inspect(write_folder(tmp_path / "my set", files))
    assert found.count == 9
    assert found.decoded_count == 7
    assert found.shapes == {(40, 50, 3): 6, (20, 20, 3): 1, (40, 50, 1): 1}
    assert next(iter(found.shapes)) == (40, 50, 3)
    assert set(found.unreadable) == {"7.png", "8.png"}
    assert "not a JPEG" in found.unreadable["7.png"]
    assert len(found.advice) == 2
    assert f"onefold data convert '{tmp_path}/my set' OUT.zip --size 40 --unreadable skip" in found.advice[0]
    assert found.advice[1] == "2 images cannot be read: replace them; this command leaves them out"
    assert found.values is not None
    assert len(found.values.mean) == 3
    text = describe(found)
    assert "sizes: 40×50 (height × width) RGB (6), 20×20 RGB (1), 40×50 grey (1)" in text
    assert "values over 6 of 7 images, those in RGB:" in text
    assert "unreadable: 2" in text
    assert any(line.startswith("  8.png: ") for line in text)
    assert sum(line.startswith("advice: ") for line in text) == 2


def test_nothing_readable(tmp_path: Path):
    found = inspect(write_folder(tmp_path, {"1.png": b"?", "2.png": b""}))
    assert (found.shapes, found.values, found.decoded_count) == ({}, None, 0)
    assert "sizes: none can be read" in describe(found)
    assert found.advice == ("none of the images can be read: check the files",)  # to leave them out leaves none
    found = inspect(write_folder(tmp_path / "cut", {f"{k}.png": cut(png(20, 30)) for k in range(2)}))
    assert (len(found.shapes), found.advice) == (1, ("none of the images can be read: check the files",))


def converted(advice: str, source: Path) -> tuple[int, ...]:
    """What the command in an advice makes of the images."""
    command = shlex.split(advice.partition("onefold ")[2].partition(" (")[0])
    out = source.with_suffix(".converted.zip")
    assert command[:4] == ["data", "convert", str(source), "OUT.zip"]
    assert run(["data", "convert", str(source), str(out), *command[4:], "--quiet", "--overwrite"]) == 0
    return open_dataset(out).image_shape


@pytest.mark.parametrize(
    ("sizes", "channels", "shape"),
    [
        ([(17, 15)], 3, (16, 14, 3)),
        ([(33, 59)], 1, (32, 58, 1)),
        ([(1, 1)], 1, (2, 2, 1)),
        ([(20, 35), (36, 31), (30, 50)], 3, (24, 24, 3)),
        ([(7, 9), (9, 7)], 3, (6, 6, 3)),
        ([(1, 9), (9, 1)], 3, (2, 2, 3)),
    ],
)
def test_the_advised_command_makes_what_a_recipe_takes(
    tmp_path: Path, sizes: list[tuple[int, int]], channels: int, shape: tuple[int, ...]
):
    images = {f"{k}.png": encode(noise(*size, *([3] if channels == 3 else []))) for k, size in enumerate(sizes)}
    source = write_folder(tmp_path / "my set", images)
    advice = inspect(source).advice[0]
    assert converted(advice, source) == shape
    if len(sizes) == 1:
        height, width = sizes[0]
        assert advice.startswith(f"{height}×{width}: no recipe takes an odd height or width")
    else:  # the same numbers in the error as in the advice
        with pytest.raises(UserError) as error:
            open_dataset(source)
        assert str(error.value).endswith(advice.partition("alike: ")[2])


def test_of_images_that_differ_in_channels_alone_the_size_is_kept(tmp_path: Path):
    source = write_folder(tmp_path / "set", {"1.png": png(30, 44), "2.png": encode(noise(30, 44))})
    assert converted(inspect(source).advice[0], source) == (30, 44, 3)


def test_no_advice_is_beyond_what_convert_takes():
    assert best_size([(9001, 20000, 3), (9001, 20000, 1)]) == (8192, 8192)
    assert best_size([(9001, 20001, 3), (9003, 20000, 3)]) == (8192, 8192)


def test_arrays_of_many_channels_do_not_convert(tmp_path: Path):
    np.savez(tmp_path / "set.npz", images=noise(2, 17, 16, 5))
    (advice,) = inspect(tmp_path / "set.npz").advice
    assert advice.endswith("store arrays of 16×16")


def test_unreadable_images_of_one_size(tmp_path: Path):
    good = {f"{k}.png": png(10, 12, seed=k) for k in range(3)}
    source = write_folder(tmp_path / "set", good | {"7.png": b"?"})
    (advice,) = inspect(source).advice
    assert advice.startswith("1 image cannot be read: replace it, or leave such images out: onefold data convert ")
    assert advice.endswith(" --unreadable skip (train and data stats also take --unreadable skip)")
    assert converted(advice, source) == (10, 12, 3)


def test_images_of_one_colour(tmp_path: Path):
    np.savez(tmp_path / "set.npz", images=np.zeros((1, 4, 4, 3), dtype=np.uint8))
    found = inspect(tmp_path / "set.npz")
    assert describe(found)[0].endswith("set.npz: 1 image")
    assert any(line == "values over 1 image, RGB:" for line in describe(found))
    (advice,) = found.advice
    assert "all images are alike" in advice
    np.savez(tmp_path / "set.npz", images=np.stack([np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)]))
    assert inspect(tmp_path / "set.npz").advice == ()


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
    assert found.decoded_count == 5
    assert found.shapes == {(4, 4, 1): 49, (4, 4, 3): 1}
    assert found.values is not None
    assert (found.values.minimum, found.values.maximum, found.values.mean) == ((0,), (40,), (20.0,))
    assert told[-1] == (50, 50)
    assert inspect(tmp_path, sample=None).decoded_count == 50


def test_digits_and_missing():
    found = inspect("digits")
    assert found.values is not None
    assert (found.count, found.values.minimum, found.values.maximum) == (1437, (0,), (255,))
    with pytest.raises(UserError, match="no such file"):
        inspect("nothing here")


def test_contact_sheet_of_digits():
    ds = open_dataset("digits")
    sheet, missing = contact_sheet("digits", 10)
    assert missing == ()
    assert (sheet.mode, sheet.size) == ("RGB", (4 * 66 + 2, 3 * 66 + 2))
    pixels = np.asarray(sheet)
    for place in range(10):
        row, column = divmod(place, 4)
        tile = pixels[row * 66 + 2 :, column * 66 + 2 :][4:64:8, 4:64:8]
        assert np.array_equal(tile[..., :1], ds[place * 1437 // 10][0])
    assert contact_sheet("digits", 1000)[0].size == (10 * 66 + 2, 10 * 66 + 2)
    with pytest.raises(UserError, match="at least 1"):
        contact_sheet("digits", 0)


@pytest.mark.parametrize(
    ("shape", "tile"), [((70, 90, 3), (90, 70)), ((512, 1024, 4), (256, 128)), ((64, 1, 7), (1, 64))]
)
def test_contact_sheet_of_any_shape(tmp_path: Path, shape: tuple[int, int, int], tile: tuple[int, int]):
    np.savez(tmp_path / "set.npz", images=noise(2, *shape))
    sheet, _ = contact_sheet(tmp_path / "set.npz")
    assert (sheet.mode, sheet.size) == ("RGB", (2 * tile[0] + 6, tile[1] + 4))


@pytest.mark.parametrize("sides", [(1000, 333), (333, 1000), (77, 999), (513, 1000), (63, 7), (5, 64)])
def test_images_of_one_size_fill_their_tiles(tmp_path: Path, sides: tuple[int, int]):
    np.savez(tmp_path / "set.npz", images=np.zeros((1, *sides), dtype=np.uint8))
    sheet, _ = contact_sheet(tmp_path / "set.npz")
    assert (np.asarray(sheet)[2:-2, 2:-2] == 0).all()


def test_contact_sheet_of_mixed_sizes(tmp_path: Path):
    """Each image is as large as its tile allows, in its own proportions, and in the middle of it."""
    sides = [(40, 40), (300, 600), (100, 25), (8, 8)]
    files = {f"{k}.png": encode(np.zeros((*side, 3), dtype=np.uint8)) for k, side in enumerate(sides)}
    source = write_folder(tmp_path / "set", files | {"4.png": cut(png(90, 90)), "5.png": b"?"})
    sheet, missing = contact_sheet(source)
    assert missing == ("4.png", "5.png")
    assert sheet.size == (2 * 258 + 2, 2 * 130 + 2)
    dark = np.asarray(sheet)[..., 0] == 0
    for place, (height, width) in enumerate([(128, 128), (128, 256), (128, 32), (128, 128)]):
        row, column = divmod(place, 2)
        tile = dark[2 + row * 130 :, 2 + column * 258 :][:128, :256]
        expected = np.zeros((128, 256), dtype=bool)
        expected[:, (256 - width) // 2 : (256 + width) // 2] = True
        assert np.array_equal(tile, expected)
        assert tile.sum() == height * width


def test_reduced_tiles_are_antialiased(tmp_path: Path):
    """A checkerboard is grey from afar; without a filter its tile would be all black or all white."""
    board = (np.indices((1, 512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=board)
    tile = np.asarray(contact_sheet(tmp_path / "set.npz")[0])[8:-8, 8:-8].astype(int)
    assert np.abs(tile - 127).max() < 8


def test_contact_sheet_of_nothing_readable(tmp_path: Path):
    with pytest.raises(UserError, match="none of the images drawn can be read; check the files"):
        contact_sheet(write_folder(tmp_path, {"1.png": b"?"}))
