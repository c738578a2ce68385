from pathlib import Path

import pytest
import torch

from helpers_runs import tiny
from onefold import files
from onefold.errors import UserError
from onefold.files import is_unused, locked, unfinished, write_tensors, write_whole
from onefold.training.loop import train


def test_a_file_is_written_whole_with_its_folder(tmp_path: Path):
    write_whole(tmp_path / "new" / "a.txt", "ε\n")
    write_whole(tmp_path / "new" / "a.txt", "ẑ\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "ẑ\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_reader_has_the_old_file_or_the_new_one(tmp_path: Path):
    write_whole(tmp_path / "a.txt", "old")
    with (tmp_path / "a.txt").open() as reader:
        write_whole(tmp_path / "a.txt", "new")
        assert reader.read() == "old"


def test_what_was_there_stays_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "a.txt", "before")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "after")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path):
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process is working in this folder"):
        locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        assert is_unused(tmp_path / "run")


def test_a_run_that_is_being_trained_is_left_alone(tmp_path: Path):
    config = tiny(training__images=32)
    run = train(config, tmp_path / "run", quiet=True)
    with locked(run.folder), pytest.raises(UserError, match="another process is working in this folder"):
        train(None, run.folder, resume=True, quiet=True)
    with locked(tmp_path / "new"), pytest.raises(UserError, match="another process is working in this folder"):
        train(config, tmp_path / "new", quiet=True)
    train(config, tmp_path / "new", quiet=True)


def test_what_a_killed_process_left_is_no_use_of_a_folder(tmp_path: Path):
    assert is_unused(tmp_path / "missing")
    unfinished(tmp_path / "config.json").write_text("{")
    assert is_unused(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    assert not is_unused(tmp_path)
    assert not is_unused(tmp_path / "note.txt")


def test_whoever_may_read_a_run_may_read_its_tensors(tmp_path: Path):
    (tmp_path / "text").write_text("text")
    write_tensors({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "text").stat().st_mode
