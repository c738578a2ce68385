from pathlib import Path

import pytest

from onefold import files
from onefold.files import write_whole


def test_a_file_is_written_whole_with_its_folder(tmp_path: Path):
    write_whole(tmp_path / "new" / "a.txt", "ε\n")
    write_whole(tmp_path / "new" / "a.txt", "ẑ\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "ẑ\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_what_was_there_stays_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "a.txt", "before")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.txt", "after")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
