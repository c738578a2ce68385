"""Settings: frozen nested dataclasses, to and from strict JSON.

Strict: an unknown key, a missing one without a default, or a value of the wrong type is refused with one line that
names the key. What is written is complete, so a file read years later does not depend on that day's defaults.
"""

import json
import types
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from onefold.errors import UserError

__all__ = ["from_json", "override", "to_json"]

T = TypeVar("T")


def to_json(value: Any) -> str:
    """A dataclass as indented JSON, all fields written out."""
    return json.dumps(asdict(value), indent=2, ensure_ascii=False) + "\n"


def from_json(kind: type[T], text: str, where: str) -> T:
    """Read a `kind` from JSON text; `where` names the file in errors.

    Raises:
        UserError: text that is no JSON, or does not fit `kind`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not readable as JSON ({error}); restore the file or write it anew") from error
    return _convert(kind, value, where)


def override(config: T, changes: dict[str, Any]) -> T:
    """A copy of a nested dataclass with changed fields, e.g. {"training.seed": 1} or {"training": TrainingConfig()}.

    Raises:
        UserError: a name that does not exist, or a value of the wrong type.
    """
    for path, value in changes.items():
        config = _override_one(config, path.split("."), value, path)
    return config


def _override_one(config: Any, path: list[str], value: Any, full: str) -> Any:
    known = [f.name for f in fields(config)]
    if path[0] not in known:
        raise UserError(f"{full}: no such setting; {type(config).__name__} has {', '.join(known)}")
    if len(path) > 1:
        part = getattr(config, path[0])
        if not is_dataclass(part):
            raise UserError(f"{full}: {path[0]} is a single value and has no part {path[1]!r}")
        return replace(config, **{path[0]: _override_one(part, path[1:], value, full)})
    hint = get_type_hints(type(config))[path[0]]
    return replace(config, **{path[0]: value if is_dataclass(value) else _convert(hint, value, full)})


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
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: {value!r} is not of type {getattr(hint, '__name__', hint)}")


def _convert_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} where a group of settings belongs")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}; {kind.__name__} has {', '.join(known)}")
    for name, field in known.items():
        if name not in value and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{where}: setting {name!r} is missing")
    return kind(**{key: _convert(hints[key], item, f"{where}: {key}") for key, item in value.items()})
