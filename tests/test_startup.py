"""What is loaded when: help without torch, and threads that sleep while they wait."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from onefold import cli
from onefold.commands.completion import options_in, script

HEAVY = {"torch", "numpy", "matplotlib", "PIL", "huggingface_hub"}


def alone(program: str, **environment: str) -> str:
    """What a program prints in an interpreter of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP", "KMP"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**kept, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(program: str) -> set[str]:
    """The packages that a program has loaded at its end."""
    return set(json.loads(alone(f"{program}\nimport json, sys; print(json.dumps(list(sys.modules)))").splitlines()[-1]))


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["data", "--help"], ["bogus"]], ids=str)
def test_the_overview_loads_next_to_nothing(words: list[str]):
    found = loaded_by(f"from onefold.cli import run; run({words})")
    assert not found & (HEAVY | {"tyro", "rich"})


LIGHT = [name for name in cli.COMMANDS if name not in (*cli.PARSING, "demo")]
"""Those whose options are not the settings of a run, which are the dataclasses of torch modules."""


@pytest.mark.parametrize("name", LIGHT)
def test_help_does_without_torch(name: str):
    words = [*name.split(), "--help"]
    call = f"with contextlib.suppress(SystemExit): run({words})"
    program = f"import contextlib\nfrom onefold.cli import run\n{call}"
    assert not loaded_by(program) & HEAVY


def test_the_library_needs_neither_parser_nor_plots():
    assert not loaded_by("import onefold") & (HEAVY | {"tyro", "rich"})
    assert "matplotlib" not in loaded_by("import onefold; onefold.train, onefold.recipe, onefold.OneFold")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "7"}, "PASSIVE")],
    ids=str,
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], found: str):
    program = "import onefold, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    assert alone(program, **given).strip() == found


# --- completion -------------------------------------------------------------------------------------------------------


def test_the_options_are_those_of_the_help():
    shown = ("usage: x [-h]", "│ -h, --help   show", "│ -n INT, --n INT  Number, see --other", "| --a.b-c X", "")
    text = "\n".join(shown)
    assert options_in(text) == ["--help", "--n", "--a.b-c"]


def completed(*words: str) -> set[str]:
    """What bash offers for the last of the words."""
    text = script("bash", {"sample": ["--n", "--steps"], "data inspect": ["--all"], "data stats": ["--out"]})
    line = " ".join(f"'{word}'" for word in words)
    ask = f'\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _onefold; echo "${{COMPREPLY[@]}}"'
    return set(subprocess.run(["bash", "-c", text + ask], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_and_options():
    assert completed("onefold", "") == {"sample", "data"}
    assert completed("onefold", "s") == {"sample"}
    assert completed("onefold", "sample", "--s") == {"--steps"}
    assert completed("onefold", "data", "") == {"inspect", "stats"}
    assert completed("onefold", "data", "stats", "--") == {"--out"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["--print-completion", shell]) == 0
    shown = capsys.readouterr().out
    for word in {word for name in cli.COMMANDS for word in name.split()}:
        assert re.search(rf"\b{word}\b", shown), word
    assert "training.batch" in shown
    assert "guidance" in shown


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]], ids=str)
def test_another_shell_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.run(["--print-completion", *words]) == 2
    assert capsys.readouterr().err == "onefold: --print-completion: give one of bash, zsh, fish\n"
