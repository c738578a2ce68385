"""The commands that the documents show exist and take these options."""

import functools
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onefold.cli import COMMANDS, PARSING, command
from onefold.commands.arguments import parse
from onefold.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Page and words of the shell's lines that call onefold or a benchmark."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["onefold"] or (words[:1] == ["python"] and words[1].startswith("benchmarks/")):
                    yield page, words


def is_open(words: list[str]) -> bool:
    """Whether its options depend on the shell, or on a run or images that a test does not have."""
    return (
        "$" in "".join(words)
        or words[1] == "onestep"
        or (words[1] == "train" and not {"auto", "--resume", "--from"}.isdisjoint(words))
    )


def check(target: Callable[..., Any], arguments: list[str], name: str) -> None:
    """Parse the arguments of a function, which is not called."""

    @functools.wraps(target)
    def nothing(*_: Any, **__: Any) -> None:
        pass

    parse(nothing, arguments, name)


def follow(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command's words as calling it would. Raises `UserError` where it does not exist."""
    first, *arguments = words
    if first == "python":
        return check(importlib.import_module(Path(arguments[0]).stem).main, arguments[1:], " ".join(words[:2]))
    name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in COMMANDS)
    arguments = arguments[len(name.split()) :]
    if name in PARSING:
        monkeypatch.setattr(f"onefold.commands.{name}.parse", check)
        return command(name)(arguments)
    return check(command(name), arguments, f"onefold {name}")


SHOWN = [pytest.param(words, id=f"{page.stem}-{n}") for n, (page, words) in enumerate(commands()) if not is_open(words)]


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_of_the_documents_is_one(words: list[str], monkeypatch: pytest.MonkeyPatch):
    follow(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "onefold sample runs/digits --setps 4",
        "onefold train digits --training.imagse 100",
        "onefold estimate digits --training.imagse 100",
        "onefold study collapse --arm ema",
        "python benchmarks/train_features.py data test out --width 32",
    ],
)
def test_what_is_none_is_found(line: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError):
        follow(line.split(), monkeypatch)


def test_most_commands_are_followed():
    assert len(SHOWN) > 100
