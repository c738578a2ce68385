"""Few images, moved data, large images: it works, or one line says what does; and what is printed can be done."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import onefold
from data_images import encode, noise, png, write_folder
from helpers_runs import tiny
from onefold import metrics
from onefold.cli import run as command
from onefold.data import decode as decoding
from onefold.data import open_dataset
from onefold.errors import UserError
from onefold.training.datasets import held_out_count
from onefold.training.loop import train
from onefold.training.run import load_run

SMALL = ["--images", "48", "--training.batch", "16", "--training.warmup", "0", "--training.health-every", "16"]
SMALL += ["--network.depth", "1", "--network.width", "32", "--network.heads", "2", "--sampler.steps", "2"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))


def printed_commands(text: str) -> list[list[str]]:
    """The commands of onefold in a text: in backquotes, or behind "next:"."""
    found = re.findall(r"`(onefold [^`]*)`", text) + re.findall(r"next: (onefold .*)", text)
    return [shlex.split(line)[1:] for line in found]


# --- few images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [
        *[(1, 0.05, 0), (2, 0.05, 0), (7, 0.05, 0), (8, 0.05, 2), (20, 0.05, 5), (32, 0.05, 8), (100, 0.05, 8)],
        *[(160, 0.05, 8), (200, 0.05, 10), (1000, 0.05, 50), (1000, 0.001, 8), (7, 0.5, 4), (2, 0.5, 0)],
    ],
)
def test_as_many_are_held_out_as_tell_something(count: int, fraction: float, held: int):
    assert held_out_count(count, fraction) == held


@pytest.mark.parametrize("layout", ["top", "one class", "a class each"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 20])
def test_few_images_train_and_what_is_printed_next_works(
    count: int, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = {"top": "{k}.png", "one class": "thing/{k}.png", "a class each": "{k}/a.png"}[layout]
    write_folder(tmp_path / "my pictures", {folder.format(k=k): png(8, 8, seed=k) for k in range(count)})
    run = tmp_path / "a run"
    assert command(["train", "digits", "--data", "my pictures", "--out", str(run), *SMALL]) == 0
    out, error = capsys.readouterr()
    assert "nan" not in out.lower() + (run / "log.jsonl").read_text().lower()
    assert all(line.startswith(("cpu, ", "training ", "first pictures: ")) for line in error.splitlines()), error
    assert ("too few to set some apart" in out) == (count < 8)
    assert ("a collapse is not seen" in out) == (count == 1)
    health = load_run(run).history[-1]["health"]
    assert (health["latent_std"] is None) == (count == 1), "the alarm sees what it judges"
    (following,) = printed_commands(out)
    assert following[0] == ("sample" if count < 4 else "evaluate")
    assert command(following) == 0, capsys.readouterr().err


def test_what_serves_for_both_is_said_in_the_record(tmp_path: Path):
    write_folder(tmp_path / "seven", {f"{k}.png": png(8, 8, seed=k) for k in range(7)})
    run = train(tiny(data__source="seven", data__test=None), tmp_path / "run", quiet=True)
    training, test = run.open_data()
    assert test.digest() == training.digest()
    record = onefold.evaluate(run)
    assert "test" not in record["protocol"]["split"]
    assert record["memorisation"] is not None, "measured by leaving each out in turn"


def test_too_few_to_measure_is_one_line_with_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path / "three", {f"{k}.png": png(8, 8, seed=k) for k in range(3)})
    train(tiny(data__source="three", data__test=None), tmp_path / "a run", quiet=True)
    assert command(["evaluate", "a run"]) == 2
    error = capsys.readouterr().err
    assert "too few to measure anything" in error
    (cure,) = printed_commands(error)
    assert command(cure) == 0


def test_an_unfinished_run_says_which_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny(training__images=160)
    run = train(config, tmp_path / "a run", quiet=True)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    (run.folder / "log.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert command(["onestep", "a run"]) == 2
    (cure,) = printed_commands(capsys.readouterr().err)
    shutil.rmtree(run.folder / "checkpoints" / "000000160")
    assert command([*cure, "--quiet"]) == 0
    assert load_run(run.folder).images == 160
    shutil.rmtree(run.folder / "model")
    with pytest.raises(UserError, match="no model yet") as error:
        _ = load_run(run.folder).network
    assert command([*printed_commands(str(error.value))[0], "--quiet"]) == 0


# --- moved ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was trained in `work` on a relative path; we stand elsewhere."""
    work = tmp_path / "work"
    write_folder(work / "pictures", {f"{c}/{k}.png": png(8, 8, seed=k) for k in range(40) for c in "ab"})
    monkeypatch.chdir(work)
    assert command(["train", "digits", "--data", "pictures", "--out", "run", "--quiet", *SMALL]) == 0
    monkeypatch.chdir(tmp_path)
    return work


def test_a_relative_path_is_found_from_everywhere(moved: Path):
    run = load_run(moved / "run")
    assert run.config.data.source == str(moved / "pictures")
    assert len(run.open_data()[0]) == 72
    shutil.move(moved / "run", "elsewhere")
    assert command(["evaluate", "elsewhere", "--images", "20", "--quiet"]) == 0


def test_embedded_sets_and_parts_keep_their_names(tmp_path: Path):
    run = train(tiny(training__images=16), tmp_path / "run", quiet=True)
    assert (run.config.data.source, run.config.data.test) == ("digits", "digits:test")
    np.savez(tmp_path / "a.npz", x_train=noise(40, 8, 8, 1), x_test=noise(20, 8, 8, 1))
    config = tiny(training__images=16, data__source="a.npz", data__test="a.npz:test")
    data = train(config, tmp_path / "other", quiet=True).config.data
    assert (data.source, data.test) == (str(tmp_path / "a.npz"), f"{tmp_path / 'a.npz'}:test")


@pytest.mark.parametrize(
    "arguments", [["evaluate", "work/run"], ["onestep", "work/run"], ["train", "--resume", "--out", "work/run"]]
)
def test_data_that_have_gone_are_named_with_whose_they_are(
    arguments: list[str], moved: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.move(moved / "pictures", "new place")
    more = ["--images", "96"] if arguments[0] == "train" else ["--images", "20"]
    if arguments[0] == "onestep":
        more = ["--images", "32"]
    assert command([*arguments, *more, "--quiet"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    for part in (str(moved / "pictures"), "work/run was trained on it", "data.source in its config.json", "--data"):
        assert part in error
    assert command([*arguments, *more, "--quiet", "--data", "new place"]) == 0, capsys.readouterr().err
    if arguments[0] == "train":
        assert load_run(moved / "run").config.data.source == os.path.abspath("new place")  # noqa: PTH100
        assert command(["evaluate", "work/run", "--images", "20", "--quiet"]) == 0, "it is known from then on"


def test_data_of_another_kind_are_not_the_runs(moved: Path, tmp_path: Path):
    write_folder(tmp_path / "other", {f"{k}.png": png(8, 10, seed=k) for k in range(40)})
    with pytest.raises(UserError, match=r"other: 8×10 RGB with 0 classes, but .* was trained on 8×8 RGB with 2"):
        load_run(moved / "run", data=str(tmp_path / "other"))
    with pytest.raises(UserError, match="8×10"):
        train(None, moved / "run", resume=True, data=tmp_path / "other", quiet=True)
    assert load_run(moved / "run").config.data.source == str(moved / "pictures")


def test_a_python_objects_run_says_that_only_python_can_give_it(tmp_path: Path):
    data = onefold.data.as_dataset((noise(40, 8, 8, 1), np.arange(40) % 3))
    run = train(tiny(training__images=16), tmp_path / "run", data=data, quiet=True)
    with pytest.raises(UserError, match=r"only Python can give: onefold\.load_run\(folder, data=…\)"):
        onefold.evaluate(load_run(run.folder), images=20)
    assert onefold.evaluate(load_run(run.folder, data=data), images=20)["protocol"]["real_images"] == 20


# --- large images -----------------------------------------------------------------------------------------------------


def test_an_image_of_too_many_pixels_is_refused_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    write_folder(tmp_path / "photos", {"a.png": png(20, 20), "scan.png": encode(noise(40, 40, 3))})
    with pytest.raises(UserError, match=r"scan\.png cannot be read \(an image of too many pixels") as error:
        open_dataset("photos")
    assert "bomb" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 1000)
    with pytest.raises(UserError, match="too many pixels"):
        open_dataset("photos")


def test_a_large_image_is_read_without_a_warning(tmp_path: Path):
    """In a process of its own: pytest has filters of its own for warnings."""
    write_folder(tmp_path / "photos", {f"{k}.png": png(8, 8, seed=k) for k in range(3)})
    Image.new("L", (10_000, 9_000), 90).save(tmp_path / "photos" / "scan.png", compress_level=1)
    arguments = [sys.executable, "-m", "onefold", "data", "convert", "photos", "out.zip", "--size", "8", "--quiet"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "4 of 8×8" in done.stdout.replace("images of", "of")


def test_images_of_one_row_or_column_are_read(tmp_path: Path):
    write_folder(tmp_path / "long", {"a.png": encode(noise(1, 30_000, 3)), "b.png": encode(noise(9_000, 1, 3))})
    assert command(["data", "inspect", "long", "--sheet", "sheet.png"]) == 0
    assert command(["data", "convert", "long", "long.zip", "--size", "8"]) == 0
    assert open_dataset("long.zip").image_shape == (8, 8, 3)
