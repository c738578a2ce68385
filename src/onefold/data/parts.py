"""Parts of a source: what is to train on, and what training never sees.

Data sets call them by a few words, in capitals or not: train, training; test, testing, eval; val, valid, validation,
dev. Here they are `train`, `test` and `val`; a colon chooses one: photos:test. Without it the part to train on is
read, and those beside it give the test images of a training.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from onefold.errors import UserError

PARTS = ("train", "test", "val")
"""Parts that a source may hold, by the names that choose one: mnist.npz:test."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}

# Such a word, set apart from what stands before and after it: train2017, images_test.
_DECORATED = re.compile(rf"(|.*[^a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(|[^a-z].*)", re.DOTALL)

# As of sets of unpaired images: trainA, testB.
_LETTERED = re.compile(r"(?:train|test|val)[A-Z]")


class Choice(NamedTuple):
    """The part that is read, what is to be said of it, and the parts beside it that may be test images."""

    part: str
    notes: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


def part_of(source: str) -> str | None:
    """Give the part of a source that is named after a colon, such as test in mnist.npz:test."""
    _, colon, word = source.rpartition(":")
    return part_named(word) if colon else None


def part_named(word: str) -> str | None:
    """Give the part that a word stands for; None for other words."""
    return _WORDS.get(word.strip().lower())


def part_in(name: str) -> str | None:
    """Give the part that a name speaks of, such as cifar100-test.parquet; None where it names none, or several."""
    found = {_WORDS[word] for word in re.split("[^a-z]+", name.lower()) if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def choose_part(source: str, there: Iterable[str], found: str = "") -> Choice:
    """Choose the part that is read, of those that are there: the one after the colon, or the one to train on.

    `found` is what a message says of them. Raises UserError when the part is not there, or none to train on.
    """
    there, asked = [part for part in ("train", "test", "val") if part in there], part_of(source)
    if asked is not None:
        if asked not in there:
            found = found and f" (found: {found})"
            raise UserError(f"{source}: has no images of the part {asked}{found}; name another one")
        return Choice(asked)
    if len(there) == 1:
        return Choice(there[0], () if there == ["train"] else (f"it has a part {there[0]} alone, which is read",))
    if "train" not in there:
        raise UserError(
            f"{source}: has parts {' and '.join(there)}, none to train on; name one, as {source}:{there[0]}"
        )
    tests = tuple(there[1:])
    return Choice("train", (f"of its parts ({', '.join(there)}), train is read",), tests)


def choose_shards(source: str, parts: Mapping[str, list[str]]) -> tuple[list[str], Choice]:
    """Choose the files of the part that is read, as `choose_part` does, where several files are a part.

    `parts` are the files of each part, and of other words in their names. Raises UserError when it is not clear which
    are meant.
    """
    known = [part for part in parts if part_named(part) == part]
    if known:
        choice = choose_part(source, known, ", ".join(parts))
        left = [part or "those without a word for it" for part in parts if part not in known]
        if left:
            few = ", ".join(sorted(left)[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            notes = (*choice.notes, f"not read, for they are no part to train or test on: {few}")
            choice = choice._replace(notes=notes)
        return parts[choice.part], choice
    if len(parts) > 1:
        few = ", ".join(sorted(parts)[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
        raise UserError(f"{source}: holds several tables ({few}), and none is named train; give one of them")
    if part_of(source) is not None:
        raise UserError(f"{source}: has no parts; give it without :{source.rpartition(':')[2]}")
    (chosen,) = parts.values()
    return chosen, Choice("")


def parts_of_folders(folders: Sequence[str]) -> dict[str, str] | None:
    """Give the part of each folder where all of them are certainly parts; None where they are not."""
    named = {folder: part_named(folder) for folder in folders}
    parts = {folder: part for folder, part in named.items() if part is not None}
    if len(parts) < len(folders):
        decorated = [(folder, _DECORATED.fullmatch(folder.lower())) for folder in folders]
        alike = {(match[1], match[3]) for _, match in decorated if match}
        if len(folders) < 2 or len(alike) != 1 or not all(match for _, match in decorated):
            return None
        parts = {folder: _WORDS[match[2]] for folder, match in decorated if match}
    return parts if folders and len(set(parts.values())) == len(folders) else None


def looks_like_parts(folders: Sequence[str], *, beside: bool) -> list[str]:
    """Give the folders that may be parts but not certainly: for what lies `beside` them, or for their own names."""
    exact = [folder for folder in folders if part_named(folder)]
    if exact and (beside or parts_of_folders(folders) is None):
        return exact
    like = [f for f in folders if part_named(f) or _DECORATED.fullmatch(f.lower()) or _LETTERED.fullmatch(f)]
    certain = parts_of_folders(folders) is not None and not beside
    return like if len(folders) > 1 and len(like) == len(folders) and not certain else []
