"""How the code is cut: imports run downwards, and no file is long."""

import ast
import graphlib
from pathlib import Path

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


def test_the_rooms_are_seen():
    assert {"networks", "objectives"} <= rooms()["training"]
    assert "cli" not in set().union(*rooms().values())


def test_no_file_is_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path.name
