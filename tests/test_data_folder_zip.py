import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_images import cut, encode, noise, png, write_folder, write_zip
from onefold.data import convert, describe, holdout, inspect, open_dataset
from onefold.data.listing import Unreadable
from onefold.errors import UserError

CLASSES = {f"{name}/{k}.png": png(seed=7 * int(name[5:]) + k) for name in ("class10", "class9") for k in range(12)}
FLAT = {f"{k}.png": png(seed=k) for k in range(12)}


def advised(source: Path) -> str:
    """The command that `inspect` advises."""
    return next(line for line in inspect(source).advice if "alike" in line).partition("alike: ")[2]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(params=["folder", "stored", "deflated"])
def write(request: pytest.FixtureRequest, tmp_path: Path):
    """Write the same files as a folder, or as a zip of either kind."""
    if request.param == "folder":
        return lambda files: write_folder(tmp_path / "set", files)
    method = zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED
    return lambda files: write_zip(tmp_path / "set.zip", files, method)


def test_a_subfolder_is_a_class_and_order_is_natural(write):
    source = write(CLASSES)
    ds = open_dataset(source)
    assert (ds.source, ds.image_shape, ds.classes) == (str(source), (6, 5, 3), 2)
    assert ds.class_names == ("class9", "class10")
    assert len(ds) == 24
    assert ds.labels.dtype == np.int64
    assert ds.labels.tolist() == [0] * 12 + [1] * 12
    assert ds.skipped == ()
    for k in range(24):
        image, label = ds[k]
        assert label == k // 12
        assert image.dtype == np.uint8
        number = 9 + k // 12
        assert np.array_equal(image, noise(6, 5, 3, seed=7 * number + k % 12))
    assert np.array_equal(ds[-1][0], ds[23][0])
    with pytest.raises(IndexError):
        ds[24]


def test_images_at_the_top_have_no_classes(write):
    ds = open_dataset(str(write(FLAT)))
    assert (ds.classes, ds.class_names) == (0, ())
    assert [ds[k][1] for k in range(12)] == ds.labels.tolist() == [0] * 12
    assert np.array_equal(ds[10][0], noise(6, 5, 3, seed=10))


def test_what_is_not_an_image_is_passed_over(write):
    litter = dict.fromkeys(
        ["notes.txt", ".hidden.png", ".git/a.png", "__MACOSX/a/b/._0.png", "more/list.csv", "0.heic"], b"?"
    )
    assert len(open_dataset(write(FLAT | litter))) == 12


def test_suffixes_of_any_case_and_every_format(write):
    grey = np.full((8, 8), 77, dtype=np.uint8)
    files = {
        "a.JPG": encode(grey, "JPEG"),
        "b.jpeg": encode(grey, "JPEG"),
        "c.Png": encode(grey),
        "d.BMP": encode(grey, "BMP"),
    }
    ds = open_dataset(write(files))
    assert ds.image_shape == (8, 8, 1)
    assert all((ds[k][0] == 77).all() for k in range(4))
    colour = open_dataset(
        write_folder(Path(ds.source).parent / "w", {"e.WebP": encode(noise(4, 4, 3), "WEBP", lossless=True)})
    )
    assert np.array_equal(colour[0][0], noise(4, 4, 3))


def test_mixed_layout_is_refused_by_name(write):
    with pytest.raises(UserError, match=r"top \(0\.png\).*folders \(class9/3\.png\)") as error:
        open_dataset(write({"0.png": png(), "class9/3.png": png()}))
    one_line(error)


def test_images_too_deep_are_refused_by_name(write):
    with pytest.raises(UserError, match=r"a/cat/1\.png lies too deep") as error:
        open_dataset(write({"a/cat/1.png": png(), "b/cat/1.png": png()}))
    one_line(error)


def test_no_images_is_refused(write):
    with pytest.raises(UserError, match="no images") as error:
        open_dataset(write({"readme.txt": b"hello"}))
    one_line(error)


@pytest.mark.parametrize(
    ("odd", "text"),
    [(png(6, 9), "6×9 RGB but 1.png is 6×5 RGB"), (encode(noise(6, 5)), "6×5 grey but 1.png is 6×5 RGB")],
)
def test_a_different_shape_names_the_first_file_and_the_cure(write, odd: bytes, text: str):
    """Height comes first, as everywhere."""
    source = write({"1.png": png(), "2.png": png(), "3.png": odd, "10.png": odd})
    with pytest.raises(UserError) as error:
        open_dataset(source)
    message = one_line(error)
    assert f"3.png is {text}" in message
    assert message.endswith("; make them alike: " + advised(source))
    with pytest.raises(UserError, match=r"3\.png is"):
        open_dataset(source, unreadable="skip")


def test_a_different_shape_beyond_the_headers_is_found_when_read(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onefold.data.dataset.HEADERS", 2)
    ds = open_dataset(write({"1.png": png(), "2.png": png(7, 7), "3.png": png(), "4.png": png()}))
    assert ds[0][0].shape == (6, 5, 3)
    with pytest.raises(UserError, match=r"2\.png is 7×7 RGB but 1\.png is 6×5 RGB"):
        ds[1]


BROKEN = {
    "cut.png": (cut(png(40, 40)), "truncated"),
    "empty.png": (b"", "empty"),
    "text.png": (b"this is no image", "not a JPEG, PNG, "),
    "empty.jpg": (b"", "the file is empty"),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG, "),
    "deep.png": (encode(noise(40, 40).astype(np.int32), "TIFF"), "more than 16 bits"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuse_names_the_unreadable_image(write, name: str):
    data, why = BROKEN[name]
    source = write({"0.png": png(40, 40), name: data})
    with pytest.raises(Unreadable, match="--unreadable skip") as error:
        [open_dataset(source)[k] for k in range(2)]
    message = one_line(error)
    assert message.startswith(f"{source}: {name} cannot be read (")
    assert why in message
    assert (error.value.name, why in error.value.reason) == (name, True)
    assert f"leave such images out: onefold data convert {source} OUT.zip --size 40 --unreadable skip (" in message
    assert "object at 0x" not in message


def test_where_no_image_is_good_none_is_left_out(write):
    with pytest.raises(Unreadable, match=r"replace it$") as error:
        open_dataset(write({"1.png": b"?", "2.png": b""}))[0]
    one_line(error)


def test_skip_leaves_out_and_names_the_unreadable_images(write):
    good = {f"{c}/{k}.png": png(40, 40, seed=k) for c in "ab" for k in range(3)}
    bad = {f"a/{name}": data for name, (data, _) in BROKEN.items()}
    ds = open_dataset(write(good | bad), unreadable="skip")
    assert ds.skipped == tuple(f"a/{name}" for name in sorted(BROKEN))
    assert ds.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [ds[k][1] for k in range(6)] == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(ds[5][0], noise(40, 40, 3, seed=2))


def test_skip_with_nothing_left_is_refused(write):
    with pytest.raises(UserError, match="none of its images can be read; check the files"):
        open_dataset(write({"text.png": b"?"}), unreadable="skip")


def test_a_zip_may_have_one_folder_around_everything(tmp_path: Path):
    ds = open_dataset(write_zip(tmp_path / "a.zip", {f"top/{name}": data for name, data in CLASSES.items()}))
    assert ds.class_names == ("class9", "class10")
    flat = open_dataset(write_zip(tmp_path / "b.zip", {f"top/{name}": data for name, data in FLAT.items()}))
    assert flat.classes == 0
    folder = write_folder(tmp_path / "c", {f"top/{name}": data for name, data in FLAT.items()})
    assert open_dataset(folder).class_names == ("top",)


def test_a_zip_is_read_by_many_threads(write):
    ds = open_dataset(write(CLASSES))
    expected = [ds[k][0] for k in range(24)]
    chosen = np.random.default_rng(0).integers(0, 24, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for k, image in zip(chosen, pool.map(lambda k: ds[k][0], chosen), strict=True):
            assert np.array_equal(image, expected[k])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_zip_is_read_by_forked_processes(tmp_path: Path):
    ds = open_dataset(write_zip(tmp_path / "set.zip", CLASSES))
    expected = [ds[k][0] for k in range(24)]

    def reads() -> bool:
        return all(np.array_equal(ds[k][0], expected[k]) for _ in range(50) for k in range(24))

    child = os.fork()
    if child == 0:
        os._exit(0 if reads() else 1)
    assert reads()
    assert os.waitpid(child, 0)[1] == 0


def test_damage_inside_a_zip_is_noticed(tmp_path: Path):
    path = write_zip(tmp_path / "set.zip", {"a.bmp": encode(noise(9, 9, 3), "BMP")})
    data = bytearray(path.read_bytes())
    data[120] ^= 1  # a pixel: only the checksum can tell
    path.write_bytes(data)
    with pytest.raises(Unreadable, match="checksum"):
        open_dataset(path)[0]


def test_zip_kinds_that_cannot_be_read_say_so(tmp_path: Path):
    path = write_zip(tmp_path / "set.zip", {"a.png": png()}, zipfile.ZIP_LZMA)
    with pytest.raises(Unreadable, match="compression method 14"):
        open_dataset(path)
    data = bytearray(write_zip(tmp_path / "set.zip", {"a.png": png()}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(Unreadable, match="encrypted"):
        open_dataset(path)


def test_a_zip_that_is_none_or_shrinks_later(tmp_path: Path):
    path = tmp_path / "set.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a whole zip file") as error:
        open_dataset(path)
    one_line(error)
    ds = open_dataset(write_zip(path, FLAT))
    os.truncate(path, 100)
    with pytest.raises(Unreadable, match="cut short"):
        ds[11]


def test_a_link_to_a_folder_above_does_not_hang(tmp_path: Path):
    folder = write_folder(tmp_path / "set", FLAT)
    (folder / "loop").symlink_to(folder)
    with pytest.raises(UserError, match=r"lies too deep|both at the top"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["digitz", "", "no/such.zip"])
def test_a_name_that_is_nothing_tells_what_is_known(name: str):
    with pytest.raises(UserError, match=r"no such file or folder.*image folder.*digits:test") as error:
        open_dataset(name)
    one_line(error)


def test_an_unknown_suffix_tells_what_is_known(tmp_path: Path):
    (tmp_path / "cats.rar").write_bytes(b"?")
    with pytest.raises(UserError, match=r"cats\.rar: not a kind of file.*\.parquet"):
        open_dataset(tmp_path / "cats.rar")


def test_a_folder_named_like_an_embedded_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "digits", FLAT)
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("digits")) == 1437
    ds = open_dataset(Path("digits"))
    assert (len(ds), ds.source) == (12, "./digits")
    assert len(open_dataset(ds.source)) == 12


CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10-test.zip"


@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10 is not here")
def test_cifar10():
    ds = open_dataset(CIFAR)
    assert (len(ds), ds.image_shape, ds.classes) == (10_000, (32, 32, 3), 10)
    assert np.bincount(ds.labels).tolist() == [1000] * 10
    assert ds.class_names[:2] == ("airplane", "automobile")
    assert ds[9_999][0].shape == (32, 32, 3)


def test_files_that_are_not_read_are_counted_and_lost_classes_named(write, tmp_path: Path):
    files = {"cats/1.jpg": png(), "cats/2.heic": b"?", "cats/Thumbs.db": b"?", "dogs/1.heic": b"?", "dogs/2": b"?"}
    files |= {"readme.TXT": b"?", ".hidden/1.heic": b"?", "cats/2.png": png()}
    ds = open_dataset(write(files))
    assert ds.class_names == () if ds.source.endswith(".zip") else ("cats",)
    assert ds.notes == (
        "4 files left out, for onefold does not read such files as images: .heic (2), no suffix (1), .txt (1)",
        "no class is made of dogs, where there are no images that onefold reads",
    )
    assert holdout(ds, 0.5)[1].notes == ds.notes
    assert inspect(ds.source).notes == ds.notes
    assert f"note: {ds.notes[1]}" in describe(inspect(ds.source))
    assert convert(ds.source, tmp_path / "new.zip", 4).notes == ds.notes
    assert open_dataset(tmp_path / "new.zip").notes == ()


def test_one_file_that_is_not_read(write):
    ds = open_dataset(write(FLAT | {"list.csv": b"?"}))
    assert ds.notes == ("1 file left out, for onefold does not read such files as images: .csv (1)",)


def test_an_empty_folder_is_no_class_and_said(tmp_path: Path):
    (tmp_path / "set/class11").mkdir(parents=True)
    ds = open_dataset(write_folder(tmp_path / "set", CLASSES))
    assert ds.classes == 2
    assert ds.notes == ("no class is made of class11, where there are no images that onefold reads",)


def test_what_there_is_instead_of_images_is_said(write):
    with pytest.raises(UserError, match=r"reads JPEG.*, and there are only others \(\.heic \(1\), no suffix \(1\)\)"):
        open_dataset(write({"1.heic": b"?", "2": b"?"}))


def test_sixteen_bits_are_said_once(write):
    deep = encode(noise(6, 5).astype(np.uint16) * 257)
    ds = open_dataset(write({"1.png": deep, "2.png": deep}))
    assert ds.notes == ("images with 16 bits per channel are read with 8",) == inspect(ds.source).notes
    assert np.array_equal(ds[0][0][..., 0], noise(6, 5))
    assert open_dataset(write({"1.png": encode(noise(6, 5)), "2.png": encode(noise(6, 5))})).notes == ()


def test_a_zip_with_backslashes_has_classes(tmp_path: Path):
    path = write_zip(tmp_path / "set.zip", {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (CLASSES | {"class9/Thumbs.db": b"?", "__MACOSX/class9/1.png": b"?"}).items():
            info = zipfile.ZipInfo()
            info.filename = name.replace("/", "\\")
            archive.writestr(info, data)
    ds, same = open_dataset(path), open_dataset(write_zip(tmp_path / "same.zip", CLASSES))
    assert (ds.class_names, ds.digest()) == (same.class_names, same.digest())
    assert inspect(path).notes == ()


def test_a_backslash_among_slashes_is_a_letter(tmp_path: Path):
    ds = open_dataset(write_zip(tmp_path / "set.zip", {"a/1.png": png(), "b\\c/1.png": png()}))
    assert ds.class_names == ("a", "b\\c")
