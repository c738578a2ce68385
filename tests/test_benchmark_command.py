"""How a benchmark is called from the command line."""

import sys
from pathlib import Path

import pytest

import command
import digits_seeds
import one_run
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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], r"needs --out PATH \(where to write; endings are added\); see `python benchmarks/real_images.py --help`$"),
        (["--out", "x", "--images", "many"], "--images: 'many' is not a whole number; see "),
        (["--out", "x", "--imges", "3"], r"Unrecognized options: --imges, 3 \(perhaps --images INT\?\); see "),
    ],
    ids=str,
)
def test_the_parser_s_complaints_are_one_line_too(monkeypatch: pytest.MonkeyPatch, words: list[str], told: str):
    """As those of `onefold`, which comes with the package."""
    monkeypatch.setattr(sys, "argv", ["benchmarks/real_images.py", "run", *words])
    with pytest.raises(SystemExit, match=rf"^benchmarks/real_images\.py: {told}") as stop:
        command.run(real_images.main)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(("file", "what"), [("study.json", "study"), ("bias.json", "study"), ("config.json", "run")])
def test_runs_go_into_no_folder_of_something_else(file: str, what: str, tmp_path: Path):
    (tmp_path / file).write_text("{}")
    for benchmark in (digits_seeds, one_run):
        with pytest.raises(UserError, match=rf"^{tmp_path}: holds a {what}; choose another --out$"):
            benchmark.main(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_settings_are_json():
    found = command.settings_of(['training.optimizer="adamw"', "network.patch=4"])
    assert found == {"training.optimizer": "adamw", "network.patch": 4}
    with pytest.raises(UserError, match=r"^-c: 'x=no' is not name=value"):
        command.settings_of(["x=no"])
