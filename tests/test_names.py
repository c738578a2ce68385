"""Names of any kind: printed, written, quoted, and never a traceback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import onefold
from data_images import png, write_folder
from helpers_runs import tiny
from onefold.cli import run as command
from onefold.data import convert, describe, inspect, open_dataset
from onefold.errors import UserError, printable, quoted
from onefold.files import read_tensors, write_whole
from onefold.pictures.grids import save_png
from onefold.training.loop import train
from onefold.training.run import load_run

BYTE = os.fsdecode(b"na\xefve")
"""As Linux gives a name that was written in Latin-1."""
NAMES = [
    BYTE,
    "two\nlines",
    "tab\tand\x1b[31mred",
    'it\'s "quoted" $(x) `y`',
    "[bold]loud[red]",
    "🐱 猫",
    "-rf",
    "back\\slash",
]
NAMES += ["x" * 200, "trailing ", "CON", "\u202eturned", ":colon:smile:", "%s {0}"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_is_one_line_of_utf_8(name: str):
    for text in (printable(name), str(UserError(f"{name}: is wrong; mend it"))):
        text.encode("utf-8")
        assert len(text.splitlines()) == 1
        assert "\x1b" not in text


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="no bash")
@pytest.mark.parametrize("name", [*NAMES, BYTE + "'", "'", "\\\n", ""])
def test_a_shell_reads_a_quoted_name_as_it_is(name: str):
    done = subprocess.run(
        ["/bin/bash", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert os.fsdecode(done.stdout) == (f"./{name}" if name.startswith("-") else name)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A class for each name, in each an image, a broken one and a file that is none."""
    for k, name in enumerate(NAMES):
        files = {f"{name}/{j} {BYTE}.png": png(8, 8, seed=10 * k + j) for j in range(3)}
        write_folder(tmp_path / "odd", {**files, f"{name}/broken\n{BYTE}.png": b"\x89PNG", f"{name}/a.{BYTE}": b"b"})
    return tmp_path / "odd"


def test_classes_of_any_name_are_read_described_and_converted(odd: Path, tmp_path: Path):
    data = open_dataset(odd, unreadable="skip")
    assert set(data.class_names) == set(NAMES)
    assert len(data) == 3 * len(NAMES) == 3 * len(data.skipped)
    text = "\n".join(describe(inspect(odd)))
    text.encode("utf-8")
    assert "na\\xefve (4)" in text
    done = convert(odd, tmp_path / "odd.zip", 8, unreadable="skip")
    "\n".join(done.notes).encode("utf-8")
    packed = open_dataset(done.path)
    assert packed.labels.tolist() == data.labels.tolist()
    assert any("naïve" in name for name in packed.class_names), "a byte of Latin-1 is its letter"
    assert [image.tolist() for image, _ in packed] == [image.tolist() for image, _ in data]  # type: ignore[attr-defined]


def test_a_run_of_any_name_is_trained_read_and_resumed(odd: Path, tmp_path: Path):
    folder = tmp_path / f"{BYTE}\n[/b]"
    config = tiny(data__source=str(odd), data__test=None, data__unreadable="skip", training__images=32)
    run = train(config, folder, quiet=True)
    assert load_run(folder).config == run.config
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["data"]["source"] == str(odd)
    lines = (folder / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(NAMES)
    assert run.network.sample(2).shape == (2, 8, 8, 3)
    again = train(None, folder, resume=True, images=48, quiet=True)
    assert again.images == 48


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_terminal_is_too_simple(
    encoding: str, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with capsys.disabled():
        for arguments, code in (
            (["data", "inspect", str(odd)], 0),
            (
                [
                    "data",
                    "convert",
                    str(odd),
                    str(tmp_path / f"{BYTE}.zip"),
                    "--size",
                    "8",
                    "--unreadable",
                    "skip",
                    "--quiet",
                ],
                0,
            ),
            (["data", "convert", str(odd), str(tmp_path / "b.zip"), "--size", "8", "--quiet"], 2),
            (["train", "digits", "--data", str(odd), "--out", str(tmp_path / "run")], 2),
            (["train", "digits", "--data", "x" * 3000], 2),
            (["train", "digits", "--data", "~nobody-of-this-name/x"], 2),
            (["sample", "x" * 3000], 2),
            (["train", "digits", "--out", "x" * 300, "--steps", "1"], 2),
            ([BYTE], 2),
            (["train", f"{BYTE}[/red]"], 2),
            (["train", "digits", f"--{BYTE}[/red]", "3"], 2),
            (["train", "digits", "--images", f"{BYTE}[/red]\n"], 2),
            (["evaluate", f"{BYTE}\n"], 2),
        ):
            out, error = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", error)
            assert command(arguments) == code, arguments
            error.flush()
            lines = error.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
            assert len(lines) == (1 if code else 0), lines


def test_pictures_and_json_hold_any_name(tmp_path: Path):
    for k, name in enumerate(NAMES):
        path = tmp_path / f"{k}.png"
        save_png(path, onefold.data.open_dataset("digits")[0][0], {"network": Path(name)})
        with Image.open(path) as image:
            assert image.info["network"] == printable(Path(name))
        write_whole(tmp_path / "a.json", json.dumps({"name": name}, ensure_ascii=False))
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": name}


@pytest.mark.parametrize(
    "start", ["version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "<!DOCTYPE html>\n", ""]
)
def test_what_only_stands_for_a_file_is_recognised(start: str, tmp_path: Path):
    words = {"v": "Git LFS.*git lfs pull", "<": "web page.*download it again", "": "empty"}[start[:1]]
    network = train(tiny(training__images=16), tmp_path / "run", quiet=True).network
    network.save_pretrained(tmp_path / "net")
    for name in ("model.safetensors", "config.json"):
        whole = (tmp_path / "net" / name).read_bytes()
        (tmp_path / "net" / name).write_text(start)
        if start or name.startswith("model"):
            with pytest.raises(UserError, match=words):
                onefold.OneFold.from_pretrained(tmp_path / "net")
        (tmp_path / "net" / name).write_bytes(whole)
    for name in ("a.safetensors", "a.pt", "a.zip", "a.npz", "a.parquet"):
        (tmp_path / name).write_text(start)
        if not start and name == "a.zip":
            words = "whole zip|npz|parquet|empty"  # in the words of each reader
        opened = onefold.metrics.from_file if name in ("a.safetensors", "a.pt") else open_dataset
        with pytest.raises(UserError, match=words):
            opened(tmp_path / name)
    write_folder(tmp_path / "photos", {"a.png": start.encode(), "b.png": png()})
    with pytest.raises(UserError, match=words):
        open_dataset(tmp_path / "photos")


def test_weights_that_are_cut_short_are_no_network(tmp_path: Path):
    train(tiny(training__images=16), tmp_path / "run", quiet=True).network.save_pretrained(tmp_path / "net")
    path = tmp_path / "net" / "model.safetensors"
    whole = path.read_bytes()
    assert read_tensors(path)[0]
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: does not hold this network .*whole"):
            onefold.OneFold.from_pretrained(tmp_path / "net")
