"""How the code is cut: imports run downwards, and no file is long."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onefold

ROOT = Path(onefold.__file__).parent
REPOSITORY = Path(__file__).parent.parent
LONGEST = 500


def imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """What a file imports from the package, be it inside a function: (module, names); not what only the types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    branches = [
        branch for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
    ]
    typed = {statement for branch in branches for statement in ast.walk(branch)}
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import) and statement not in typed:
            yield from ((alias.name, []) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement not in typed:
            assert statement.level == 0, f"{path}: imports are absolute"
            yield str(statement.module), [alias.name for alias in statement.names]


def rooms() -> dict[str, set[str]]:
    """Each file or folder directly below the package, and the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT and path.stem.startswith("__"):
            continue
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for module, names in imported(path):
            others = (
                set(names) if module == "onefold" else {module.split(".")[1]} if module[:8] == "onefold." else set()
            )
            found.setdefault(room, set()).update(others - {room, "__version__"})
    return found


def floors(text: str, start: str, end: str, between: str) -> list[list[str]]:
    """The rooms that a text names in backticks between two marks, floor by floor."""
    part = text[text.index(start) + len(start) :]
    return [re.findall(r"`(\w+)/?`", floor) for floor in part[: part.index(end)].split(between)]


def test_imports_run_down_the_floors_that_contributing_names():
    """Each import leads to a lower floor, so that there is no circle either; every room is on one floor."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    built = floors(text, "within a floor:", ". Inside a folder", "→")
    level = {room: number for number, floor in enumerate(built) for room in floor}
    assert sorted(room for floor in built for room in floor) == sorted(rooms()), "every room, once"
    for room, others in rooms().items():
        for other in others:
            assert level[room] < level[other], f"{room} imports {other}"


def test_the_table_of_rooms_names_them_in_such_an_order():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.findall(r"`(\w+)/?`", row.split("|")[1]) for row in table]
    place = {room: number for number, row in enumerate(rows) for room in row}
    assert sorted(room for row in rows for room in row) == sorted(rooms())
    for room, others in rooms().items():
        assert all(place[room] <= place[other] for other in others), room


def modules(room: str) -> dict[str, set[str]]:
    """Each file of a folder, and the others of it that it imports, be it inside a function."""
    found: dict[str, set[str]] = {}
    inside = f"onefold.{room}"
    for path in (ROOT / room).glob("*.py"):
        names = found.setdefault(path.stem, set())
        for module, wanted in imported(path):
            if module == inside:
                files = {name for name in wanted if (ROOT / room / f"{name}.py").exists()}
                names |= files or {"__init__"}
            elif module.startswith(f"{inside}."):
                names.add(module.split(".")[2])
    return found


@pytest.mark.parametrize("room", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_there_is_no_circle_inside_a_folder(room: str):
    graphlib.TopologicalSorter(modules(room)).prepare()


def test_the_networks_are_seen():
    found = modules("networks")
    assert {"base", "one_network", "pixel_network", "three_networks", "ratio"} <= found["__init__"]
    assert found["base"] == {"backbone", "config", "inputs", "jump", "source", "trunk"}
    assert "base" in found["three_networks"]


def test_the_rooms_are_seen():
    assert {"networks", "objectives"} <= rooms()["training"]
    assert "cli" not in set().union(*rooms().values())


def test_no_file_is_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path.name
