"""The commands of `onefold data`: what they write, and that it is never the user's own files."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_images import cut, encode, noise, png, write_folder
from onefold import cli, metrics
from onefold.extractor import extractor_for
from onefold.recipes import recipe
from onefold.training.datasets import open_data
from onefold.training.run import Run, create_folder


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def data(line: str) -> int:
    return cli.run(["data", *line.split()])


def contents(folder: str | Path = ".") -> dict[str, str]:
    """Every file below a folder, with what it holds."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


WRONG = [
    ("inspect set.npz --sheet set.npz", "set.npz: the result is a png file; give it a name that ends in .png"),
    ("inspect digits --sheet notes", "notes: the result is a png file"),
    ("inspect photos --sheet photos/1.png", "photos/1.png: would become one of the images of photos"),
    ("inspect photos --sheet photos/new.png", "photos/new.png: would become one of the images of photos"),
    ("inspect set.npz --sheet sheet.png", "sheet.png: is the source itself"),
    ("inspect digits --sheet notes/x.png", "notes is a file, not a folder; choose another place"),
    ("stats set.npz --out set.npz", "set.npz: the result is a safetensors file"),
    ("stats set.npz --out alike.safetensors", "alike.safetensors: is the source itself"),
    ("stats digits --out classifier.safetensors", "classifier.safetensors: exists already and holds no statistics"),
    ("stats digits --out notes/deep/x.safetensors", "notes is a file, not a folder; choose another place"),
    ("stats digits --run run --features classifier.safetensors", "--run: cannot go with --features; choose one"),
    ("stats digits --run photos", "photos: not a run"),
    ("stats broken", "leave such images out: onefold data convert broken OUT.zip --size 8 --unreadable skip"),
    ("convert set.zip set.zip --size 8 --overwrite", "set.zip: is the source itself"),
    ("convert photos out.zip --size 1000000", "--size 1000000×1000000: a side must have 1 to 8,192 pixels"),
    ("convert photos notes/out.zip --size 8", "notes is a file, not a folder; choose another place"),
]


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[line for line, _ in WRONG])
def test_what_would_harm_is_refused(capsys: pytest.CaptureFixture[str], line: str, said: str):
    np.savez("set.npz", images=noise(9, 8, 8))
    Path("sheet.png").symlink_to("set.npz")
    Path("alike.safetensors").symlink_to("set.npz")
    Path("notes").write_text("mine")
    metrics.digits_classifier().save("classifier.safetensors")
    write_folder(Path("photos"), {"1.png": png(8, 8)})
    write_folder(Path("broken"), {"1.png": png(8, 8), "2.png": cut(png(8, 8))})
    assert data("convert photos set.zip --size 4") == 0
    before = contents()
    capsys.readouterr()
    assert data(line) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert captured.out == ""
    assert contents() == before


def test_a_sheet_of_mixed_sizes_is_written(capsys: pytest.CaptureFixture[str]):
    files = {"1.png": png(30, 40), "2.png": encode(noise(90, 50)), "3.png": cut(png(50, 60))}
    write_folder(Path("photos"), files)
    before = contents("photos")
    assert data("inspect photos --sheet new/photos.png") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["new/photos.png: contact sheet", "1 unreadable image left out: 3.png"]
    with Image.open("new/photos.png") as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
    assert contents("photos") == before


def test_convert_says_what_it_wrote(capsys: pytest.CaptureFixture[str]):
    write_folder(Path("photos"), {"1.png": png(40, 30), "2.png": b"?"})
    assert data("convert photos a/b/out.zip --size 14 --height 16 --unreadable skip") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "a/b/out.zip: 1 image of 16×14 RGB (height × width)",
        "1 unreadable image left out: 2.png",
    ]


def test_stats_leave_out_what_cannot_be_read(capsys: pytest.CaptureFixture[str]):
    good = {f"{k}.png": png(8, 8, seed=k) for k in range(6)}
    write_folder(Path("photos"), good | {"7.png": cut(png(8, 8))})
    line = "stats photos --unreadable skip --out new/photos.safetensors"
    assert data(line) == 0
    assert "of 6 images\n1 unreadable image left out: 7.png\n" in capsys.readouterr().out
    assert metrics.Moments.load("new/photos.safetensors").n == 6
    assert data(line) == 0  # statistics are replaced


def test_stats_in_the_features_of_a_run():
    """Those of its training part, in which it is evaluated: all of its source has others."""
    np.savez("images.npz", images=noise(40, 8, 8), labels=np.arange(40) % 2)
    np.savez("other.npz", images=noise(20, 8, 8, seed=1))
    config = recipe("digits").with_changes({"data.source": "images.npz", "data.test": None, "data.holdout": 0.25})
    create_folder(Run(Path("run"), config))
    assert data("stats images.npz --out own.safetensors") == 0
    assert data("stats images.npz --out run.safetensors --run run") == 0
    assert data("stats other.npz --out other.safetensors --run run") == 0
    of_run = extractor_for(open_data(config.data)[0]).sha256
    found = [metrics.Moments.load(f"{name}.safetensors") for name in ("own", "run", "other")]
    assert [moments.extractor == of_run for moments in found] == [False, True, True]
    assert [moments.n for moments in found] == [40, 40, 20]
