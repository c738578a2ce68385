"""How the code is cut: imports run downwards, and no file is long."""

import ast
import graphlib
from pathlib import Path

import pytest

import onefold

ROOT = Path(onefold.__file__).parent
LONGEST = 500


def rooms() -> dict[str, set[str]]:
    """Each file or folder directly below the package, and the others that it imports when it is imported itself."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT and path.stem.startswith("__"):
            continue
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "onefold":
                names = {alias.name for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("onefold."):
                names = {str(statement.module).split(".")[1]}
            else:
                continue
            found.setdefault(room, set()).update(names - {room, "__version__"})
    return found


def test_imports_run_downwards():
    graphlib.TopologicalSorter(rooms()).prepare()  # raises where they run in a circle


def modules(room: str) -> dict[str, set[str]]:
    """Each file of a folder, and the others of it that it imports, be it inside a function."""
    found: dict[str, set[str]] = {}
    inside = f"onefold.{room}"
    for path in (ROOT / room).glob("*.py"):
        names = found.setdefault(path.stem, set())
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.ImportFrom) and statement.module == inside:
                files = {alias.name for alias in statement.names if (ROOT / room / f"{alias.name}.py").exists()}
                names |= files or {"__init__"}
            elif isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(f"{inside}."):
                names.add(str(statement.module).split(".")[2])
    return found


@pytest.mark.parametrize("room", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_there_is_no_circle_inside_a_folder(room: str):
    graphlib.TopologicalSorter(modules(room)).prepare()


def test_the_networks_are_seen():
    found = modules("networks")
    assert {"base", "one_network", "pixel_network", "three_networks", "ratio"} <= found["__init__"]
    assert found["base"] == {"backbone", "trunk"}
    assert "base" in found["three_networks"]


def test_the_rooms_are_seen():
    assert {"networks", "objectives"} <= rooms()["training"]
    assert "cli" not in set().union(*rooms().values())


def test_no_file_is_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path.name
