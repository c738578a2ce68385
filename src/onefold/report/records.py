"""Evaluation records side by side. Only numbers of the same protocol are ranked; of others it says how they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from onefold.metrics.record import Record, protocol_differences
from onefold.report import html

__all__ = ["best", "groups", "section", "unlike"]

LOWER = (
    *("frechet_distance", "kid", "test.frechet_distance", "test.kid"),
    *("reconstruction.frechet_distance", "frechet_to_reference"),
)
"""Numbers of which the least is the best …"""
HIGHER = (
    *("precision", "recall", "test.precision", "test.recall", "class_accuracy"),
    *("reconstruction.psnr", "reconstruction.ssim"),
)
"""… and the largest. All others have no best."""


def groups(records: Mapping[str, Record]) -> list[list[str]]:
    """The names of records, those of one protocol together."""
    found: list[list[str]] = []
    for name, record in records.items():
        for group in found:
            if not protocol_differences(records[group[0]], record):
                group.append(name)
                break
        else:
            found.append([name])
    return found


def best(records: Mapping[str, Record], metric: str) -> set[str]:
    """The names of the records with the best number, among several of one protocol."""
    found: set[str] = set()
    for group in groups(records):
        numbers = {name: records[name].numbers()[metric] for name in group if metric in records[name].numbers()}
        if len(numbers) > 1 and (_among(metric, LOWER) or _among(metric, HIGHER)):
            top = min(numbers.values()) if _among(metric, LOWER) else max(numbers.values())
            found |= {name for name, value in numbers.items() if value == top}
    return found


def unlike(records: Mapping[str, Record]) -> list[str]:
    """A line for each two protocols: in which fields they differ, and how."""
    first = [group[0] for group in groups(records)]
    lines: list[str] = []
    for k, one in enumerate(first):
        for other in first[k + 1 :]:
            a, b = records[one]["protocol"], records[other]["protocol"]
            names = protocol_differences(records[one], records[other])
            fields = ", ".join(f"{name} ({_short(a.get(name))} and {_short(b.get(name))})" for name in names)
            lines.append(f"{one} and {other} are not ranked: their protocols differ in {fields}.")
    return lines


def section(records: Mapping[str, Record]) -> list[str]:
    """All numbers in a table, a column for each record; what is not comparable; and the protocols."""
    if not records:
        return [html.paragraph("No evaluation yet: `onefold evaluate` measures it.")]
    numbers = {name: record.numbers() for name, record in records.items()}
    metrics = list(dict.fromkeys(metric for each in numbers.values() for metric in each))
    rows: dict[str, Sequence[tuple[str, bool]]] = {}
    for metric in metrics:
        top = best(records, metric)
        cells = [(f"{each[metric]:.4g}" if metric in each else "–", name in top) for name, each in numbers.items()]
        rows[metric.replace("_", " ")] = cells
    parts = [html.grid_table(list(records), rows)]
    if any(len(group) > 1 for group in groups(records)):
        caution = "one training each, so a small difference may be chance"
        parts.append(html.paragraph(f"★ the best of those measured by the same protocol; {caution}.", "faint"))
    parts += [html.paragraph(line) for line in unlike(records)]
    for name, record in records.items():
        for what in ("protocol", "subject"):
            given = {key.replace("_", " "): value for key, value in _flat(record.get(what, {})) if value is not None}
            parts.append(html.details(f"{name}: {what}", [html.table(given)]))
    return parts


def _among(metric: str, names: Sequence[str]) -> bool:
    """Whether a number is one of these, in the first feature space or, by the same name, in another."""
    return metric in names or (metric.startswith("spaces.") and metric.endswith(tuple(f".{name}" for name in names)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """A protocol's fields, those of its further spaces too."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(cast(Mapping[str, Any], value), f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", value


def _short(value: object) -> str:
    """A value of a protocol; of a hash its beginning, of several spaces their names."""
    shown = " + ".join(value) if isinstance(value, Mapping) else str(value)
    return f"{shown[:12]}…" if len(shown) == 64 and " " not in shown else shown
