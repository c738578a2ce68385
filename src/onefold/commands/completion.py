"""Completion of commands and options, as a script for a shell, which asks nobody while it completes."""

import re
from collections.abc import Mapping, Sequence

from onefold.errors import UserError

__all__ = ["check_shell", "options_in", "script"]

SHELLS = ("bash", "zsh", "fish")

BASH = """\
_onefold() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" name="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{first}"
    else
        case "$name" in {groups}) [ "$COMP_CWORD" -gt 2 ] && name="$name ${{COMP_WORDS[2]}}" ;; esac
        case "$name" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _onefold onefold
"""


def check_shell(arguments: Sequence[str]) -> str:
    """The shell that is named.

    Raises:
        UserError: none, or one that there is no script for.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(f"--print-completion: give one of {', '.join(SHELLS)}")
    return arguments[0]


def options_in(help_text: str) -> list[str]:
    """The options that a command's `--help` lists, each at the start of a line, in their order."""
    line = r"^[│|]?\s*(?:-\w(?: [A-Z]+)?, )*(--[a-z][\w.-]*)"
    return list(dict.fromkeys(re.findall(line, help_text, flags=re.MULTILINE)))


def script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """The script for a shell, from the options of each command; a command may be of two words."""
    if shell == "fish":
        return _fish(options)
    start = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    second = _second_words(options)
    words = {name: " ".join(found) for name, found in {**second, **options}.items()}
    cases = "\n".join(f'            "{name}") words="{found}" ;;' for name, found in words.items())
    first = " ".join(dict.fromkeys(name.split()[0] for name in options))
    return start + BASH.format(first=first, groups=" | ".join(second), cases=cases)


def _second_words(options: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Of each command of two words, the second ones by the first."""
    found: dict[str, list[str]] = {}
    for first, *rest in (name.split() for name in options):
        if rest:
            found.setdefault(first, []).extend(rest)
    return found


def _fish(options: Mapping[str, Sequence[str]]) -> str:
    first = " ".join(dict.fromkeys(name.split()[0] for name in options))
    lines = [f"complete -c onefold -n __fish_use_subcommand -f -a '{first}'"]
    for name, second in _second_words(options).items():
        none = f"__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {' '.join(second)}"
        lines.append(f"complete -c onefold -n '{none}' -f -a '{' '.join(second)}'")
    for name, found in options.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        lines += [f"complete -c onefold -n '{seen}' -l {option.removeprefix('--')}" for option in found]
    return "\n".join(lines) + "\n"
