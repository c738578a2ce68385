"""The tables of the documentation, recomputed from their records.

    python benchmarks/tables.py            # README.md and docs/*.md, in place
    python benchmarks/tables.py docs/results.md

A comment before a table names its records, relative to the page, and where its rows and columns are in them. Everything
else stays the author's: titles, order, emphasis, and the number of digits, to which each number is rounded. A new table
is written with zeros and then filled by this script; a test holds all tables to their records.

    <!-- table: results/digits.json
    rows: frechet.ratio | precision & recall
    columns: mean | std
    -->

    | | mean | standard deviation |
    |---|---|---|
    | distance ÷ that of real halves | 0.88 | 0.08 |
    | precision / recall | 0.78 / 0.88 | 0.01 / 0.01 |

A number's path is that of its row and its column, in the order in which the record nests them, below `under:` if that
is given; columns are all but the first of the table. With several records, a path begins with the name of its file.
`&` separates several numbers of a cell, `-` is a row or column that is not from a record, `.` the path of the row
itself, and `/` begins a path that belongs to no row.

What a path leads to is a list, in most records a value for each seed: `a ± b` shows its mean and standard deviation
(divisor n − 1), `a–b` its least and greatest value, and `a` its mean; or, with a word before the path, its `median`,
`min`, `max`, `first`, `last` or `count`. `a ÷ b` divides by a path or a number, `a * 100` multiplies, and `slope a, b`
is that of the least-squares line through log a against log b.

Tables without a record say so: `<!-- table: no record -->` if they are measured, `<!-- table: not measured -->` if not.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

import command

__all__ = ["recomputed", "unmarked", "values_of"]

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

MARKED = re.compile(r"^<!-- table: ([^>]*?)-->\n\n((?:\|.*\n)+)", re.MULTILINE)
TABLE = re.compile(r"(?<=\n)(?<!-->\n)\n((?:\|.*\n)+)")
NUMBER = r"[−-]?\d+(?:,\d{3})*(?:\.\d+)?"
SHOWN = re.compile(rf"({NUMBER})(?: (±) ({NUMBER})|(–)({NUMBER}))?")
WITHOUT = ("no record", "not measured")
LABELS = ("name", "arm", "d", "network")
"""What tells the members of a record's list apart; those of others are put together."""

Values = dict[str, list[float]]
STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "min": min,
    "max": max,
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "count": len,
}


# --- records ----------------------------------------------------------------------------------------------------------


def values_of(record: object) -> Values:
    """All numbers of a record by dotted path, those of several seeds or of a list in one list."""
    found: Values = {}
    for path, value in _numbers(record, ""):
        found.setdefault(path, []).append(value)
    return found


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            own = key in ("seeds", "numbers", "values")  # these stand between a name and its numbers
            yield from _numbers(inner, path if own else f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for member in value:
            labels = [str(member[label]) for label in LABELS if label in member] if isinstance(member, dict) else []
            yield from _numbers(member, f"{path}.{' '.join(labels)}".strip("."))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


# --- cells ------------------------------------------------------------------------------------------------------------


def _lookup(values: Values, term: str, row: str, under: str) -> list[float]:
    """What a term such as "median step" stands for in a row."""
    word, _, rest = term.partition(" ")
    if word == "slope":
        x, y = ([math.log(v) for v in _lookup(values, name, row, under)] for name in reversed(rest.split(", ")))
        return [statistics.linear_regression(x, y).slope]
    if word in STATISTICS:
        return [float(STATISTICS[word](_lookup(values, rest, row, under)))]
    if term.startswith("/"):
        paths = [term[1:]]
    elif term == ".":
        paths = [f"{under}.{row}"]
    else:
        paths = [f"{under}.{row}.{term}", f"{under}.{term}.{row}"]
    for path in paths:
        if (found := values.get(path.strip("."))) is not None:
            return found
    raise ValueError(f"no {paths[0].strip('.')!r} in the record")


def _evaluated(values: Values, expression: str, row: str, under: str) -> list[float]:
    expression, _, factor = expression.partition(" * ")
    above, _, below = (part.strip() for part in expression.partition(" ÷ "))
    found = _lookup(values, above, row, under)
    if below:
        divisor = [float(below)] if below.isdecimal() else _lookup(values, below, row, under)
        divisor = divisor * len(found) if len(divisor) == 1 else divisor
        found = [a / b for a, b in zip(found, divisor, strict=True)]
    return [value * float(factor or 1) for value in found]


def _rounded(value: float, like: str) -> str:
    """With as many decimals as the number `like`, and its sign for minus."""
    text = f"{value:,.{len(like.partition('.')[2])}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.strip("-")


def _filled(cell: str, expected: Sequence[list[float]]) -> str:
    """A cell with its numbers replaced, in order; one without numbers stays as it is."""
    remaining = iter(expected)

    def replaced(shown: re.Match[str]) -> str:
        values, (first, spread, std, dash, last) = next(remaining), shown.groups()
        if spread:
            return f"{_rounded(statistics.fmean(values), first)} ± {_rounded(statistics.stdev(values), std)}"
        if dash:
            return f"{_rounded(min(values), first)}–{_rounded(max(values), last)}"
        return _rounded(statistics.fmean(values), first)

    count = len(SHOWN.findall(cell))
    if count not in (0, len(expected)):
        raise ValueError(f"{cell.strip()!r} shows {count} numbers, not {len(expected)}")
    return SHOWN.sub(replaced, cell) if count else cell


# --- tables -----------------------------------------------------------------------------------------------------------


def recomputed(text: str, folder: Path) -> str:
    """A page in `folder` with the numbers of all its marked tables as the records have them.

    Raises ValueError, with the table's first line, where marker, table and record do not fit together.
    """

    def table(found: re.Match[str]) -> str:
        marker, rows = found[1].strip(), found[2].splitlines()
        if marker in WITHOUT:
            return found[0]
        try:
            body = _body(marker, [row.split("|")[1:-1] for row in rows[2:]], folder)
        except (ValueError, OSError) as error:
            raise ValueError(f"{rows[0]}: {error}") from error
        lines = [*rows[:2], *(f"|{'|'.join(cells)}|" for cells in body)]
        return found[0].replace(found[2], "\n".join(lines) + "\n")

    return MARKED.sub(table, text)


def _body(marker: str, cells: list[list[str]], folder: Path) -> list[list[str]]:
    """The rows of a table, cell by cell, recomputed."""
    records, *options = re.split(r"\s*^(rows|columns|under): ", marker, flags=re.MULTILINE)
    found = {Path(name).stem: json.loads((folder / name).read_text(encoding="utf-8")) for name in records.split()}
    values = values_of(found if len(found) > 1 else next(iter(found.values())))
    chosen = {name: " ".join(text.split()) for name, text in zip(options[::2], options[1::2], strict=True)}
    rows, columns = (chosen[name].split(" | ") for name in ("rows", "columns"))
    if len(rows) != len(cells) or any(len(columns) != len(row) - 1 for row in cells):
        raise ValueError(f"its marker names {len(rows)} rows and {len(columns)} columns after the first")

    def filled(cell: str, row: str, column: str) -> str:
        if "-" in (row, column):
            return cell
        terms = [(one, other) for one in row.split(" & ") for other in column.split(" & ")]
        return _filled(cell, [_evaluated(values, other, one, chosen.get("under", "")) for one, other in terms])

    return [
        [title, *(filled(cell, row, column) for cell, column in zip(rest, columns, strict=True))]
        for row, (title, *rest) in zip(rows, cells, strict=True)
    ]


def unmarked(text: str) -> list[str]:
    """First lines of the tables that show decimals but say nothing of a record."""
    return [rows.splitlines()[0] for rows in TABLE.findall(text) if re.search(r"\|.*\|.*\d\.\d", rows)]


def main(pages: Positional[tuple[Path, ...]] = PAGES, /) -> None:
    """Recompute the tables of these pages in place."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new = recomputed(text, page.parent)
        for before, after in zip(text.splitlines(), new.splitlines(), strict=True):
            if before != after:
                print(f"{page}:\n  {before}\n  {after}")
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
