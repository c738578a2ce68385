"""The numbers in the tables of the documentation are those of their records."""

import json
from pathlib import Path

import pytest

import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_table_shows_what_its_record_has(page: Path):
    """`python benchmarks/tables.py` mends it, where the record is right."""
    text = page.read_text(encoding="utf-8")
    assert tables.recomputed(text, page.parent).splitlines() == text.splitlines()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_table_of_decimals_names_its_record_or_says_that_it_has_none(page: Path):
    assert tables.unmarked(page.read_text(encoding="utf-8")) == []


def test_most_tables_have_a_record():
    """So that the two tests above see them at all."""
    markers = [found[1].strip() for page in tables.PAGES for found in tables.MARKED.finditer(page.read_text())]
    assert sum(marker not in tables.WITHOUT for marker in markers) >= 22
    assert markers.count("no record") <= 5


RECORD = {
    "arms": [
        {"name": "a", "seeds": [{"numbers": {"x": 1.0, "y.z": -0.0104}}, {"numbers": {"x": 2.0, "y.z": -0.0096}}]},
        {"name": "b", "seeds": [{"numbers": {"x": 1500.0, "y.z": 0.5}}]},
    ],
    "times": {"a": {"seconds": [3.0, 1.0, 8.0]}, "b": {"seconds": [4.0]}},
    "need": 2,
    "sizes": [{"size": 1, "step": 2.0}, {"size": 10, "step": 200.0}],
}


def filled(tmp_path: Path, rows: str, columns: str, *lines: str, under: str = "") -> list[str]:
    (tmp_path / "record.json").write_text(json.dumps(RECORD), encoding="utf-8")
    head = "|" + " |" * (1 + len(columns.split(" | ")))
    marker = f"<!-- table: record.json\n{under and f'under: {under}'}\nrows: {rows}\ncolumns: {columns}\n-->"
    page = "\n".join(["Text.", "", marker, "", head, head.replace(" ", "---"), *lines, "", "More 0.0 text.", ""])
    new = tables.recomputed(page, tmp_path).splitlines()
    assert (new[:2], new[-1]) == (["Text.", ""], "More 0.0 text.")
    return new[-2 - len(lines) : -2]


def test_numbers_are_rounded_as_printed_and_all_else_stays(tmp_path: Path):
    new = filled(
        tmp_path, "a | b", "x | y.z | -", "| A 7 | **0.0 ± 0.00** | 0.000 | 9 |", "| B | 0 dB | – | 9.9 |", under="arms"
    )
    assert new == ["| A 7 | **1.5 ± 0.71** | −0.010 | 9 |", "| B | 1,500 dB | – | 9.9 |"]


def test_a_cell_may_hold_several_numbers_ranges_and_what_follows_from_numbers(tmp_path: Path):
    columns = "min seconds & max seconds | count seconds | median seconds ÷ /need | seconds ÷ 4 * 100 | seconds"
    new = filled(tmp_path, "a", columns, "| | 0 / 0.0 | 0 | 0.00 | 0 % | 0.0–0 |", under="times")
    assert new == ["| | 1 / 8.0 | 3 | 1.50 | 100 % | 1.0–8 |"]


def test_a_row_may_be_the_number_and_a_column_the_place(tmp_path: Path):
    new = filled(tmp_path, "x & y.z", "arms.a | arms.b", "| | 0.0 / 0.000 | 0 / 0.0 |")
    assert new == ["| | 1.5 / −0.010 | 1,500 / 0.5 |"]
    assert filled(tmp_path, "times.b.seconds", ". * 10", "| | 0 |") == ["| | 40 |"]


def test_the_slope_is_that_of_logarithms(tmp_path: Path):
    assert filled(tmp_path, "sizes", "slope step, size | last step", "| | 0.00 | 0 |") == ["| | 2.00 | 200 |"]


def test_a_vanishing_number_has_no_sign():
    assert tables._rounded(-0.0001, "0.00") == "0.00"


def test_with_several_records_paths_begin_with_their_names(tmp_path: Path):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"x": value}))
    page = "<!-- table: one.json two.json\nrows: one | two\ncolumns: x\n-->\n\n| | |\n|--|--|\n| | 0 |\n| | 0 |\n"
    assert tables.recomputed(page, tmp_path).splitlines()[-2:] == ["| | 1 |", "| | 2 |"]


@pytest.mark.parametrize(
    ("rows", "columns", "line", "what"),
    [
        ("a", "w", "| | 0 |", "no 'arms.a.w' in the record"),
        ("a | b", "x", "| | 0 |", "names 2 rows and 1 columns"),
        ("a", "x", "| | 0 | 0 |", "names 1 rows and 1 columns"),
        ("a", "x & y.z", "| | 0 |", "'0' shows 1 numbers, not 2"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: str, columns: str, line: str, what: str):
    with pytest.raises(ValueError, match=what):
        filled(tmp_path, rows, columns, line, under="arms")


def test_a_table_of_decimals_without_a_marker_is_found():
    table = "\n| a | b |\n|---|---|\n| 1 | 0.5 |\n"
    assert tables.unmarked(f"Text.\n{table}") == ["| a | b |"]
    assert tables.unmarked(f"<!-- table: no record -->\n{table}") == []
    assert tables.unmarked("Text.\n" + table.replace("0.5", "many")) == []
