"""`onefold --import FILE.py COMMAND …`: the file is run first, and what it registers is known to the command."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onefold
from helpers_runs import tiny
from onefold import cli
from onefold.objectives import DIVERGENCES
from onefold.sampling import SOLVERS
from onefold.training import loop
from onefold.training.run import load_run

OWN = """
from onefold.objectives.density_ratio import DIVERGENCES, Divergence
from onefold.sampling import SOLVERS, Euler

known = DIVERGENCES["jensen_shannon"]
DIVERGENCES["twice"] = Divergence(lambda v: 2 * known.generator_loss(v), lambda v: 2 * known.weight(v))
SOLVERS["mine"] = Euler()
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder of its own to work in; afterwards modules and registries are as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.curves, "write", lambda *arguments: None)
    held = DIVERGENCES, SOLVERS
    before = [dict(each) for each in held]
    yield
    for each, was in zip(held, before, strict=True):
        for name in set(each) - set(was):
            del each[name]
    for name, module in list(sys.modules.items()):  # those of the test's own files, and not what torch imports late
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def written(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--import: needs a .py file that registers what is your own"),
        (["missing.py", "--version"], "--import: missing.py: no such file"),
        (["folder.py", "--version"], "--import: folder.py: no such file"),
        (["own.txt", "--version"], "own, not own.txt"),
        (["estimate", "digits"], "own, not estimate"),
        (["random.py", "--version"], "random.py has the name of another module; give it a name of its own"),
        (["antigravity.py", "--version"], "antigravity.py has the name of another module"),
        (["onefold.py", "--version"], "onefold.py has the name of another module"),
        (["raises.py", "--version"], "raises.py cannot be run (ValueError: first"),
        (["unwritten.py", "--version"], "unwritten.py cannot be run (SyntaxError: "),
        (["lacks.py", "--version"], "lacks.py cannot be run (ModuleNotFoundError: No module named 'not_there'); mend"),
        (["refuses.py", "--version"], "onefold: in our words\n"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_file_that_cannot_be_run_is_one_line_and_code_2(
    words: list[str], told: str, joined: bool, capsys: pytest.CaptureFixture[str]
):
    for name in ("own.txt", "random.py", "antigravity.py", "onefold.py"):
        written(name, OWN)
    Path("folder.py").mkdir()
    written("raises.py", "raise ValueError('first\\nsecond')")
    written("unwritten.py", "def :")
    written("lacks.py", "import not_there")
    written("refuses.py", "from onefold.errors import UserError\nraise UserError('in our words')")
    given = ["--import", *words] if not joined else [f"--import={words[0] if words else ''}", *words[1:]]
    if joined and not words:
        told = "--import: needs a .py file"
    assert cli.run(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("onefold: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.mark.parametrize("given", [["--import", "own.py"], ["--import=own.py"]], ids=str)
def test_the_rest_is_the_command(given: list[str], capsys: pytest.CaptureFixture[str]):
    written("own.py", "print('run first')")
    assert cli.run([*given, "--version"]) == 0
    assert capsys.readouterr().out == f"run first\nonefold {onefold.__version__}\n"


def test_several_files_are_run_in_turn(capsys: pytest.CaptureFixture[str]):
    for name in ("one", "two"):
        written(f"{name}.py", f"print({name!r})")
    assert cli.run(["--import", "one.py", "--import=two.py", "--version"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["one", "two"]


def test_what_it_registers_is_known_to_the_command(capsys: pytest.CaptureFixture[str]):
    """A divergence, with which a one-step generator is trained, and then a solver; without the file, neither."""
    written("own.py", OWN)
    onefold.train(tiny(training__images=32), "given", quiet=True)
    words = ["onestep", "given", "--method", "ratio", "--onestep.ratio.divergence", "twice", "--images", "48"]
    words += ["--onestep.critic-warmup", "16", "--onestep.measured", "20", "--quiet"]
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert "ratio.divergence: 'twice' is not one of reverse_kl" in said
    assert "`onefold --import FILE.py …`" in said
    assert cli.run(["--import", "own.py", *words]) == 0
    run = load_run("given-ratio")
    assert (run.config.onestep.ratio.divergence, run.images) == ("twice", 48)
    assert cli.run(["sample", "given", "-n", "2", "--solver", "mine"]) == 0


def test_in_a_process_of_its_own():
    """Where nothing has been imported yet."""
    written("own.py", OWN)
    words = [sys.executable, "-m", "onefold", "--import", "own.py", "sample", "missing", "--solver", "mine"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onefold: missing")


def test_a_file_named_as_a_library_that_is_yet_to_be_imported_is_refused():
    """In its place, `import torch` would find the file."""
    Path("mine").mkdir()
    written("mine/torch.py", "x = 1")
    words = [sys.executable, "-m", "onefold", "--import", "mine/torch.py", "estimate", "digits", "--seconds", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has the name of another module" in done.stderr
