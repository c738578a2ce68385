"""Settings: frozen nested dataclasses, to and from strict JSON.

Strict: an unknown key, a missing key without a default, or a value of the wrong type is rejected with one line that
names the key. All fields are written, so a file read years later does not depend on that day's defaults.
"""

import json
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from onefold.errors import UserError, placeholder, reason

__all__ = ["Precision", "check", "each", "from_file", "from_json", "override", "to_json", "with_new_defaults"]

T = TypeVar("T")

Precision = Literal["auto", "float32", "tf32", "bfloat16"]
"""Of matrix products; auto: bfloat16 where it is at least twice as fast; tf32 is of NVIDIA GPUs alone."""

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""Types, as messages call them."""


def to_json(value: Any) -> str:
    """A dataclass as indented JSON, all fields written out; lone surrogates of file names are escaped, as JSON can."""
    text = json.dumps(asdict(value), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read a `kind` from JSON text; `where` names the file in errors.

    Raises:
        UserError: text that is not JSON or does not fit `kind`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_number)
    except ValueError as error:
        what = placeholder(text[:512].encode("utf-8", "replace"))
        cure = what or f"not readable as JSON ({error}); restore the file or write it again"
        raise UserError(f"{where}: {cure}") from error
    return _convert(kind, value, where)


def from_file(kind: type[T], path: Path) -> T:
    """Read a `kind` from a JSON file.

    Raises:
        UserError: a file that cannot be read, is not JSON or does not fit `kind`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error
    return from_json(kind, text, str(path))


def check(
    group: str,
    value: Any,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Reject a dataclass with invalid choices or numbers; for use in its `__post_init__`.

    Every `Literal` field must hold one of its choices, `positive` numbers must be above 0, `not_negative` ones 0 or
    more, and `shares` in [0, 1]; in tuples, every number must. NaN and infinity are always rejected.

    Raises:
        UserError: naming "group.field".
    """
    for name, hint in get_type_hints(type(value)).items():
        if get_origin(hint) is Literal and getattr(value, name) not in get_args(hint):
            choices = ", ".join(map(repr, get_args(hint)))
            raise UserError(f"{group}.{name}: {getattr(value, name)!r} is not one of {choices}")

    def numbers(names: Sequence[str]) -> Iterator[tuple[str, float]]:
        for name in names:
            found = getattr(value, name)
            for number in found if isinstance(found, tuple) else (found,):
                yield f"{group}.{name}: {number}", number

    for text, number in numbers(positive):
        if not 0 < number < math.inf:
            cure = "; give at least 1" if isinstance(number, int) else ""
            raise UserError(f"{text} is not positive{cure}")
    for text, number in numbers(not_negative):
        if not 0 <= number < math.inf:
            raise UserError(f"{text} is not 0 or more")
    for text, number in numbers(shares):
        if not 0 <= number <= 1:
            raise UserError(f"{text} is not between 0 and 1")


def override(config: T, changes: dict[str, Any]) -> T:
    """A copy of a nested dataclass with changed fields, e.g. {"training.seed": 1} or {"training": TrainingConfig()}.

    Raises:
        UserError: a name that does not exist, or a value of the wrong type.
    """
    return _overridden(config, changes, "")


def each(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested dataclass, as ("training.seed", 0)."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from each(value, f"{name}.")
        else:
            yield name, value


def with_new_defaults(options: T, defaults: T, new: T) -> T:
    """Options with the `new` default in every field left at its default; fields set to other values keep them."""
    left = (f.name for f in fields(options) if getattr(options, f.name) == getattr(defaults, f.name))  # type: ignore[arg-type]
    return replace(options, **{name: getattr(new, name) for name in left})  # type: ignore[type-var]


def _overridden(config: Any, changes: dict[str, Any], prefix: str) -> Any:
    """Apply all changes to a group at once, since its settings may depend on one another."""
    hints = get_type_hints(type(config))
    known = {f.name: ".…" if is_dataclass(getattr(config, f.name)) else "" for f in fields(config)}
    new: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        full = prefix + path
        if name not in known:
            owner, names = f"{prefix[:-1]} has" if prefix else "there are", (key + dots for key, dots in known.items())
            raise UserError(f"{full}: no such setting; {owner} {', '.join(names)}")
        if not rest:
            new[name] = value if isinstance(value, _class_of(hints[name])) else _convert(hints[name], value, full)
        elif is_dataclass(getattr(config, name)):
            parts.setdefault(name, {})[rest] = value
        else:
            raise UserError(f"{full}: {name} is a single value and has no part {rest!r}")
    for name, inner in parts.items():
        new[name] = _overridden(new.get(name, getattr(config, name)), inner, f"{prefix}{name}.")
    return replace(config, **new)


def _class_of(hint: Any) -> tuple[type, ...]:
    """The dataclass that `hint` is, or allows besides None; if none, the empty tuple, which has no instances."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a setting appears twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` (from JSON) as the annotated type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _convert_dataclass(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            if arguments[-1] is Ellipsis:
                return tuple(_convert(arguments[0], item, where) for item in value)
            if len(value) == len(arguments):
                return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
        raise UserError(f"{where}: {value!r} is not a list of {len(arguments)} values")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a finite number")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    cure = f"; write {value:.0f}" if hint is int and isinstance(value, float) and value.is_integer() else ""
    raise UserError(f"{where}: {value!r} is not {KINDS.get(hint, hint)}{cure}")


def _convert_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is not a group of settings")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}; {kind.__name__} has {', '.join(known)}")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: setting {name!r} is missing")
    found = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()}
    try:
        return kind(**found)
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from None
