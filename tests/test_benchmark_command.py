"""How a benchmark is called from the command line."""

import sys
from pathlib import Path

import pytest

import command
import real_images
from onefold.errors import UserError


def test_what_its_user_can_mend_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def main(images: int = 1) -> None:
        raise UserError(f"--images: {images} are too few")

    monkeypatch.setattr(sys, "argv", ["benchmark", "--images", "3"])
    with pytest.raises(SystemExit, match=r"^--images: 3 are too few$"):
        command.run(main)
    monkeypatch.setattr(sys, "argv", ["real_images.py", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="nowhere"):
        command.run(real_images.main)
