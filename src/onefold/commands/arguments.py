"""Command-line arguments of a function, and the parser's complaints in one line.

tyro reads the options from the function's signature and docstring, and prints its complaints in a box of several
lines; here they become a `UserError`.
"""

import contextlib
import inspect
import io
import re
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from onefold.errors import UserError

__all__ = ["parse"]

T = TypeVar("T")

PLAIN = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is not a whole number",
    r"could not convert string to float: (.*)": r"\1 is not a number",
    r"Could not find valid parse for arguments: \[(.*)\]": r"\1 is not what it takes",
    r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.$": r"\2: \1 is not one of \3",
    r"^Missing value for argument '(.*)'\. Expected 1 values\.$": r"\1: needs a value",
    r"^Missing value for argument '(.*)'\. Expected (\d+) values\.$": r"\1: needs \2 values",
}
"""Complaints of the parser, and of Python, and how they are said here."""
KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "[INT [INT ...]]": "a list of whole numbers",
    "[FLOAT [FLOAT ...]]": "a list of numbers",
}
"""The parser's words for types."""


def parse(target: Callable[..., T], arguments: list[str], name: str) -> T:
    """Call `target` with the options in `arguments`; what the parser refuses becomes one line.

    Raises:
        UserError: options that do not exist, lack a value, have one of the wrong type or, if they take several values,
            are given twice.
    """
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    if twice := next((option for option in _several(target) if options.count(option) > 1), None):
        raise UserError(f"{twice}: is given twice; give it once, with all its values")

    def deferred(*values: Any, **options: Any) -> Callable[[], T]:
        return lambda: target(*values, **options)

    vars(deferred).pop("__wrapped__", None)  # where types are checked, it is decorated, and tyro would look inside
    deferred.__doc__, deferred.__annotations__ = target.__doc__, _annotations(target)
    deferred.__signature__ = inspect.signature(target)  # type: ignore[attr-defined]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call = tyro.cli(deferred, args=arguments, prog=name, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        _, short = name.split(" ", 1)
        raise UserError(f"{short}: {_one_line(complaint.getvalue())}; see `{name} --help`") from None
    return call()


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    """Those of a function; help shows no default where there is no value by default, which its text then explains."""
    hints, found = get_type_hints(target, include_extras=True), inspect.signature(target).parameters
    for name, parameter in found.items():
        kind, repeated = hints[name], tyro.conf.UseAppendAction in get_args(hints[name])
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_ONLY
        if (parameter.default in (None, ()) and not repeated) or needed:
            hints[name] = Annotated[kind, tyro.conf.arg(help_behavior_hint="(required)" if needed else "")]
    return hints


def _several(target: Callable[..., Any]) -> list[str]:
    """The options that take several values at once; those that may be repeated are annotated otherwise."""
    hints = get_type_hints(target, include_extras=True)
    return ["--" + name.replace("_", "-") for name, hint in hints.items() if get_origin(hint) is tuple]


def _one_line(box: str) -> str:
    """The first section of the parser's complaint, and the first suggestion if there is one.

    Frames are drawn in Unicode or, where the terminal knows no better, in ASCII.
    """
    lines = [re.sub(r"^[│╭╰|+]\s?|\s*[│╮╯|+]$", "", line).rstrip() for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines[1:]:
        if line and not line.strip(" ─-"):
            sections.append([])
        elif line:
            sections[-1].append(line)
    sections = [textwrap.dedent("\n".join(section)).splitlines() for section in sections if section]
    if not sections:
        return "the options cannot be read"
    text = _missing(sections[0]) or _plain(" ".join(map(str.strip, sections[0])))
    if len(sections) > 1 and sections[1][:1] == ["Perhaps you meant:"]:
        text += f" (perhaps {sections[1][1].strip().replace('{None}|', '')}?)"
    return text


def _missing(section: list[str]) -> str:
    """What is missing, and in brackets what it is, but for choices; empty if the section tells something else.

    Below their title, names are indented, and their explanations more so.
    """
    if not section[0].startswith("Missing from "):
        return ""
    found: list[list[str]] = []
    for line in section[1:]:
        if re.match(r" {4}\S", line):
            found.append([])
        if found:
            found[-1].append(line.strip())
    what = {name: " ".join(words).removesuffix("(required)").strip(" .") for name, *words in found}
    known = {name: "" if "{" in name else f" ({text[:1].lower()}{text[1:]})" for name, text in what.items()}
    return "needs " + " and ".join(name + text for name, text in known.items())


def _plain(text: str) -> str:
    """A complaint that names the option first and speaks of no types."""
    text = re.sub(r"^Error parsing ((?=-)|[\w.]+: )", "", text)
    for pattern, said in PLAIN.items():
        text = re.sub(pattern, said, text)
    # An option that may be None is a union to the parser, which then reports on each of its members.
    union = r"no type matching \{None\}\|\{?(.*?)\}? could be instantiated from \[(.*?)\]\..*"
    return re.sub(union, lambda found: f"{found[2]} is not {KINDS.get(found[1], found[1])}", text)
