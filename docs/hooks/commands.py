"""Fills the page of commands with what each command's `--help` prints when the documentation is built."""

import contextlib
import io
import os
from typing import Any

from onefold import cli


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if page.file.src_uri != "commands.md":
        return markdown
    sections = [f"## onefold {name}\n\n{line}\n\n```text\n{shown(name)}\n```\n" for name, line in cli.COMMANDS.items()]
    return markdown + "\n" + "\n".join(sections)


def shown(name: str) -> str:
    """The help of a command, without its frames."""
    os.environ["COLUMNS"] = "92"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.run([*name.split(), "--help"])
    lines = [line for line in text.getvalue().splitlines() if not line.startswith("╰")]
    lines = [line.removeprefix("│ ").removesuffix("│").rstrip() for line in lines]
    lines = [f"\n{line.strip('╭╮─ ')}" if line.startswith("╭") else line for line in lines]
    if not any("-h, --help" in line for line in lines):
        raise RuntimeError(f"onefold {name} --help shows no options")
    return "\n".join(lines).strip()
