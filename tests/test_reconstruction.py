import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_images import encode, noise, write_folder, write_zip
from helpers_runs import tiny
from onefold import metrics
from onefold.cli import run as command
from onefold.data import open_dataset, read_all
from onefold.errors import UserError
from onefold.pixels import to_float, to_uint8
from onefold.reconstruction import reconstruct, write_reconstructions
from onefold.training.loop import train
from onefold.training.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("digits") / "run", quiet=True)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A network for images of 4×6 RGB."""
    folder = tmp_path_factory.mktemp("colour")
    np.savez(folder / "images.npz", images=noise(40, 4, 6, 3))
    config = tiny(data__source=str(folder / "images.npz"), data__test=None, training__images=16)
    return train(config, folder / "run", quiet=True)


def cells(path: Path, height: int, width: int) -> np.ndarray:
    """The images of a grid that enlarges each to some 48 pixels, (rows, columns, height, width, …)."""
    sheet = np.array(Image.open(path))
    scale = 48 // max(height, width)
    inner = sheet[1:, 1:]
    rows, columns = inner.shape[0] // (height * scale + 1), inner.shape[1] // (width * scale + 1)
    blocks = inner.reshape(rows, height * scale + 1, columns, width * scale + 1, *inner.shape[2:]).swapaxes(1, 2)
    return blocks[:, :, :-1:scale, :-1:scale]


@torch.no_grad()
def expected(run: Run, x: torch.Tensor) -> torch.Tensor:
    return to_uint8(run.network.decode(run.network.encode(to_float(x))))


def test_originals_stand_above_their_reconstructions(run: Run, tmp_path: Path):
    psnr, count = write_reconstructions(run.folder, [Path("digits:test")], tmp_path / "out.png")
    x, _ = read_all(open_dataset("digits:test"), range(30))
    made = expected(run, x)
    assert count == 30
    assert psnr == pytest.approx(metrics.psnr(made, x), rel=1e-6)
    found = cells(tmp_path / "out.png", 8, 8)
    assert found.shape == (6, 10, 8, 8)
    assert (found[0::2].reshape(30, 8, 8) == x[:, 0].numpy()).all()
    assert (found[1::2].reshape(30, 8, 8) == made[:, 0].numpy()).all()


def test_image_files_keep_their_order(coloured: Run, tmp_path: Path):
    pictures = [noise(4, 6, 3, seed=k) for k in range(3)]
    for k, pixels in enumerate(pictures):
        (tmp_path / f"{2 - k}.png").write_bytes(encode(pixels))
    paths = [tmp_path / f"{2 - k}.png" for k in range(3)]
    _, count = write_reconstructions(coloured.folder, paths, tmp_path / "out.png")
    assert count == 3
    found = cells(tmp_path / "out.png", 4, 6)
    assert found.shape == (2, 3, 4, 6, 3)
    assert (found[0] == np.stack(pictures)).all()


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_data_sources_are_taken(coloured: Run, tmp_path: Path, kind: str):
    pictures = {f"{k}.png": encode(noise(4, 6, 3, seed=k)) for k in range(4)}
    if kind == "folder":
        source = write_folder(tmp_path / "images", pictures)
    elif kind == "zip":
        source = write_zip(tmp_path / "images.zip", pictures)
    else:
        source = tmp_path / "images.npz"
        np.savez(source, images=noise(4, 4, 6, 3))
    assert write_reconstructions(coloured.folder, [source], tmp_path / "out.png")[1] == 4


@pytest.mark.parametrize("count", [1, 9, 10, 11])
def test_any_number_of_images_fits_the_sheet(run: Run, tmp_path: Path, count: int):
    np.savez(tmp_path / "images.npz", images=noise(count, 8, 8, 1))
    assert write_reconstructions(run.folder, [tmp_path / "images.npz"], tmp_path / "out.png")[1] == count
    rows, columns = cells(tmp_path / "out.png", 8, 8).shape[:2]
    assert (rows, columns) == (2 * -(-count // 10), min(10, count))


def test_files_are_read_as_data_sets_read_them(coloured: Run, tmp_path: Path):
    """A photo lies on its side in the file and says so; transparency is laid on white; 16 bits become 8."""
    upright = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    (tmp_path / "sideways.png").write_bytes(encode(np.rot90(upright).copy(), exif=exif))
    write_reconstructions(coloured.folder, [tmp_path / "sideways.png"], tmp_path / "out.png")
    assert (cells(tmp_path / "out.png", 4, 6)[0, 0] == upright).all()


def test_sixteen_bits_become_eight_and_more_are_refused(run: Run, tmp_path: Path):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    write_reconstructions(run.folder, [tmp_path / "deep.png"], tmp_path / "out.png")
    assert (cells(tmp_path / "out.png", 8, 8)[0, 0].squeeze() == np.round(deep / 257)).all()
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "deeper.tif")
    with pytest.raises(UserError, match=r"deeper\.tif: cannot be read as an image \(more than 16 bits"):
        write_reconstructions(run.folder, [tmp_path / "deeper.tif"], tmp_path / "out.png")


def test_a_saved_network_will_do(run: Run, tmp_path: Path):
    shutil.copytree(run.folder / "model", tmp_path / "network")
    with_run = write_reconstructions(run.folder, [Path("digits:test")], tmp_path / "one.png")
    assert write_reconstructions(tmp_path / "network", [Path("digits:test")], tmp_path / "two.png") == with_run


# --- from Python ---


def test_arrays_tensors_and_files_give_what_encoding_and_decoding_makes_of_them(run: Run, tmp_path: Path):
    x, _ = read_all(open_dataset("digits:test"), range(12))
    arrays = x.permute(0, 2, 3, 1).numpy()
    wanted = expected(run, x).permute(0, 2, 3, 1).numpy()
    paths = [tmp_path / f"{k}.png" for k in range(12)]
    for path, image in zip(paths, arrays, strict=True):
        path.write_bytes(encode(image[..., 0]))
    for source in (run, run.network, run.folder, str(run.folder / "model")):
        for images in (arrays, np.asfortranarray(arrays), x.permute(0, 2, 3, 1), paths, list(map(str, paths))):
            found = reconstruct(source, images)
            assert found.dtype == np.uint8
            assert (found == wanted).all()
    reversed_view = arrays[::-1]
    reversed_view.flags.writeable = False
    assert (reconstruct(run, reversed_view) == wanted[::-1]).all()
    assert (reconstruct(run, paths[3]) == wanted[3:4]).all()
    assert reconstruct(run, "digits:test").shape == (360, 8, 8, 1)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_has_no_part_in_a_reconstruction(run: Run, batch: int):
    images = noise(12, 8, 8, 1)
    assert (np.abs(reconstruct(run, images, batch=batch).astype(int) - reconstruct(run, images)) <= 1).all()


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (noise(8, 8, 1), r"images: shape \(8, 8, 1\) is not \(n, 8, 8, 1\), .* images\[None\]$"),
        (noise(4, 1, 8, 8), r"images: shape \(4, 1, 8, 8\) is not \(n, 8, 8, 1\), .*put the channels last$"),
        (noise(4, 8, 9, 1), r"images: shape \(4, 8, 9, 1\) is not .*give at least one image of "),
        (noise(0, 8, 8, 1), r"images: shape \(0, 8, 8, 1\) is not .*give at least one image"),
        (noise(4, 8, 8), r"images: shape \(4, 8, 8\) is not"),
        (np.full((4, 8, 8, 1), 0.5), r"images: float64 from 0\.5 to 0\.5, not uint8; scale to 0…255"),
        (torch.full((4, 8, 8, 1), -1.0), r"images: float32 from -1 to -1, not uint8"),
        (np.full((4, 8, 8, 1), 300), r"images: int64 from 300 to 300, not uint8"),
        ([noise(8, 8, 1)], r"images: ndarray is neither an array nor a path; stack"),
        ([], "images: none were given"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(run: Run, images: object, text: str):
    with pytest.raises(UserError, match=text) as caught:
        reconstruct(run, images)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="batch: 0 is not positive"):
        reconstruct(run, noise(4, 8, 8, 1), batch=0)


# --- what cannot be reconstructed -------------------------------------------------------------------------------------


def test_wrong_images_are_named(coloured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = encode(noise(4, 6, 3))
    contents = {
        "large.png": encode(noise(8, 12, 3)),
        "turned.png": encode(noise(6, 4, 3)),
        "cut.png": good[: len(good) - 40],
        "head.png": good[:30],
        "text.png": b"hello",
        "empty.png": b"",
    }
    write_folder(tmp_path, contents)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.png").write_bytes(good)
    for name in [*contents, "missing.png", "folder.png"]:
        for arguments in ([tmp_path / name], [tmp_path / "good.png", tmp_path / name]):
            words = ["reconstruct", str(coloured.folder), *map(str, arguments), "--out", str(tmp_path / "out.png")]
            assert command(words) == 2, name
            message = capsys.readouterr().err
            assert message.count("\n") == 1
            assert name in message
            if name in ("large.png", "turned.png"):
                assert "the network takes 4×6; resize it to 4×6, as of a folder `" in message
                assert "data convert FOLDER OUT.zip --size 6 --height 4` does" in message
            assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("pixels", "cure"),
    [
        (noise(4, 8, 8, 3), "give images of 8×8 grey$"),
        (noise(4, 9, 9, 3), "give images of 8×8 grey$"),
        (noise(4, 6, 8, 1), "make them so: .* --size 8$"),
    ],
    ids=["channels", "both", "size"],
)
def test_data_of_another_shape_are_refused(run: Run, tmp_path: Path, pixels: np.ndarray, cure: str):
    np.savez(tmp_path / "images.npz", images=pixels)
    with pytest.raises(UserError, match=rf"images\.npz.*the network takes 8×8 grey; {cure}"):
        write_reconstructions(run.folder, [tmp_path / "images.npz"], tmp_path / "out.png")


def test_no_images_are_an_error(run: Run, tmp_path: Path):
    with pytest.raises(UserError, match="none were given"):
        write_reconstructions(run.folder, [], tmp_path / "out.png")


def test_two_channels_come_from_arrays(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 4, 2))
    config = tiny(data__source=str(tmp_path / "images.npz"), data__test=None, training__images=16)
    train(config, tmp_path / "run", quiet=True)
    (tmp_path / "one.png").write_bytes(encode(noise(4, 4)))
    with pytest.raises(UserError, match=r"takes 4×4 2 channels; give them in an \.npz file$"):
        write_reconstructions(tmp_path / "run", [tmp_path / "one.png"], tmp_path / "out.png")
    assert write_reconstructions(tmp_path / "run", [tmp_path / "images.npz"], tmp_path / "out.png")[1] == 30
