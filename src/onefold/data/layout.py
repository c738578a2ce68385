"""What the folders around images mean: parts to train and test on, classes, or mere chunks.

From the outside to the inside, in a folder as in a zip:

    a folder around everything      is passed over, in a zip and wherever there are more folders within
    folders named as parts          train/, test/, val/ …: one is read, see `parts`
    dataset.json                    StyleGAN's and EDM's: labels by file name, or null; folders are then no classes
    sub-folders                     a class each

What is not certain is refused, with the way to say what is meant: parts among other folders, and numbered folders that
look like chunks of a set.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from onefold.data.classes import classes_of, natural_key
from onefold.data.messages import count_text, shortened
from onefold.data.parts import Choice, choose_part, looks_like_parts, part_of, parts_of_folders
from onefold.errors import UserError

LABELS = "dataset.json"
FOLDERS = "folders"

Path = tuple[str, ...]

_SUSPECTS = ("dataset", "label", "class", "annotation", "metadata", "target")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".xml", ".parquet")


class Layout(NamedTuple):
    """The images that are read: their names in order, labels int64 (n,), class names, and what lies beside them."""

    names: list[str]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    rest: list[str]
    notes: tuple[str, ...]
    test_parts: tuple[str, ...]


def lay_out(
    source: str,
    images: Sequence[str],
    rest: Sequence[str],
    read: Callable[[str], bytes],
    *,
    packed: bool = False,
    labels_from: str | None = None,
) -> Layout:
    """Find the part, the order and the classes of images from where they lie.

    `images` and `rest` are relative paths with forward slashes, of images and of all else; `read` gives the content of
    one. `packed` passes over one folder around everything, as archives have it. `labels_from` is "folders",
    "dataset.json", "none" or None.

    Raises UserError when it is not certain what is meant.
    """
    if labels_from not in (None, FOLDERS, LABELS, "none"):
        raise UserError(
            f"--labels-from {labels_from}: images in files have no such column; give folders, {LABELS} or none"
        )
    paths = {name: tuple(name.split("/")) for name in images}
    base, choice = _part(source, list(paths.values()), by_folders=labels_from == FOLDERS)
    used = {path[len(base) - 1] for path in paths.values()} if base else set[str]()
    paths = {name: path for name, path in paths.items() if path[: len(base)] == base}
    notes = list(choice.notes) if choice else []
    if choice:
        beside = _beside_parts(base, rest)
        if empty := sorted(beside - used, key=natural_key):
            notes.append(f"no images that onefold reads in {shortened(empty)}")
        others = {(*base[:-1], name) for name in used} - {base}
        rest = [name for name in rest if tuple(name.split("/"))[: len(base)] not in others or name.endswith(LABELS)]
    tests = choice.tests if choice else ()
    known = None
    if labels_from in (None, LABELS):
        known, said = _listed_labels(source, paths, rest, read)
        notes += said
        if known is None and labels_from == LABELS:
            raise UserError(f"--labels-from {LABELS}: {source} holds no such file with labels; leave it out")
    kept = [name for name in rest if name.rpartition("/")[2] != LABELS]
    notes += _unread_tables(kept)
    if known is not None or labels_from == "none":
        names = sorted(paths, key=natural_key)
        values = [known[name] for name in names] if known else None
        files = [name for name in kept if not name.endswith("/")]
        labels, class_names = classes_of(source, len(names), values)
        return Layout(names, labels, class_names, files, tuple(notes), tests)
    inner = _stripped(paths, len(base), packed=packed and choice is None)
    return _by_folders(source, inner, kept, tuple(notes), tests, certain=labels_from == FOLDERS)


def _part(source: str, paths: Sequence[Path], *, by_folders: bool) -> tuple[Path, Choice | None]:
    """Give the folder of the part that is read, () where there are no parts, and the choice."""
    common = _common(paths)
    found: tuple[Path, dict[str, str]] | None = None
    for depth in range(len(common) + 1):
        tops = sorted({path[depth] for path in paths if len(path) > depth + 1})
        beside = any(len(path) == depth + 1 for path in paths)
        parts = None if beside else parts_of_folders(tops)
        if parts is not None:
            found = common[:depth], parts
        elif not by_folders and found is None and (doubtful := looks_like_parts(tops, beside=beside)):
            others = [top for top in tops if top not in doubtful]
            among = f"among others ({shortened(others, 3)})" if others else "beside images" if beside else ""
            few = shortened(doubtful, 4)
            raise UserError(
                f"{source}: {few} {'look' if len(doubtful) > 1 else 'looks'} like a part to train or test on, "
                f"{among or 'but it is not clear which is which'}; give the folder to train on and one with "
                "--test-data, or say --labels-from folders if each folder is a class"
            )
    if found is None:
        if part_of(source) is not None:
            raise UserError(f"{source}: has no parts; give it without :{source.rpartition(':')[2]}")
        return (), None
    base, parts = found
    choice = choose_part(source, parts.values(), ", ".join(parts))
    folder = next(name for name, part in parts.items() if part == choice.part)
    return (*base, folder), choice


def _beside_parts(base: Path, rest: Sequence[str]) -> set[str]:
    """The folders beside that of a part, and its own, as far as there is something in them that is no image."""
    depth = len(base) - 1
    paths = [tuple(name.split("/")) for name in rest]
    return {path[depth] for path in paths if path[:depth] == base[:-1] and len(path) > depth + 1}


def _stripped(paths: dict[str, Path], depth: int, *, packed: bool) -> dict[str, Path]:
    """Paths without the folders around everything that are no class: one of an archive, and those beyond a class."""
    inner = {name: path[depth:] for name, path in paths.items()}
    common = len(_common(list(inner.values())))
    deepest = max((len(path) for path in inner.values()), default=0)
    strip = min(common, max(int(packed), deepest - 2))
    return {name: path[strip:] for name, path in inner.items()}


def _by_folders(
    source: str,
    paths: dict[str, Path],
    rest: list[str],
    notes: tuple[str, ...],
    tests: tuple[str, ...],
    *,
    certain: bool,
) -> Layout:
    """Classes from sub-folders. Raises UserError when images lie at several depths, or in folders like chunks."""
    # The first name at each depth, whatever the order of the listing.
    example = {len(path): name for name, path in sorted(paths.items(), reverse=True)}
    if example and max(example) > 2:
        raise UserError(
            f"{source}: {example[max(example)]} lies too deep; put the images of a class directly in its "
            "folder, give one of the folders within, or say --labels-from none"
        )
    if len(example) > 1:
        raise UserError(
            f"{source}: holds images both at the top ({example[1]}) and in folders ({example[2]}); a folder "
            "is a class, so move the images at the top into one, or all images to the top"
        )
    if not example or 1 in example:
        names = sorted(paths, key=natural_key)
        return Layout(names, np.zeros(len(names), dtype=np.int64), (), rest, notes, tests)
    counts = Counter(path[0] for path in paths.values())
    class_names = tuple(sorted(counts, key=natural_key))
    if not certain and looks_like_chunks([(name, counts[name]) for name in class_names]):
        raise UserError(
            f"{source}: its {count_text(len(class_names), 'folder')} ({shortened(class_names, 3)}) look like numbered "
            f"chunks, and no {LABELS} holds labels; say --labels-from none if they are no classes, or folders if they "
            "are"
        )
    number = {name: k for k, name in enumerate(class_names)}
    names = sorted(paths, key=lambda name: (number[paths[name][0]], natural_key(paths[name][1]), natural_key(name)))
    labels = np.array([number[paths[name][0]] for name in names], dtype=np.int64)
    return Layout(names, labels, class_names, rest, notes, tests)


def looks_like_chunks(folders: Sequence[tuple[str, int]]) -> bool:
    """Whether folders, given in order with their numbers of images, are more likely pieces of a set than classes.

    They are numbered, all digits of one width, four or more with leading zeros; or fewer, all of one size but for a
    smaller last one; or a word such as chunk or part with a number.
    """
    names, sizes = [name for name, _ in folders], [size for _, size in folders]
    if len(names) < 2:
        return False
    words = [name.lower().rstrip("0123456789").rstrip("_- .") for name in names]
    if set(words) <= {"chunk", "part", "shard", "batch"} and len(set(words)) == 1:
        return True
    if not all(name.isascii() and name.isdigit() for name in names) or len({len(name) for name in names}) > 1:
        return False
    numbers = [int(name) for name in names]
    padded = names[0].startswith("0") and len(names[0]) > 1
    if len(names[0]) >= 4:
        return padded
    in_a_row = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return padded and in_a_row and len(set(sizes[:-1])) == 1 and sizes[-1] < sizes[0] and len(sizes) > 2


def _listed_labels(
    source: str, paths: dict[str, Path], rest: Sequence[str], read: Callable[[str], bytes]
) -> tuple[dict[str, object] | None, list[str]]:
    """Give the label of each image that a dataset.json tells, all None where it says that there are none."""
    common = _common(list(paths.values()))
    places = ["/".join([*common[:depth], LABELS]) for depth in range(len(common), -1, -1)]
    file = next((place for place in places if place in rest), None)
    if file is None:
        return None, [f"{name} is not read, for it lies beside no image" for name in rest if name.endswith(LABELS)][:1]
    try:
        content = json.loads(read(file))
    except Exception as error:
        raise UserError(
            f"{source}: {file} cannot be read as JSON; mend it, or say --labels-from folders or none"
        ) from error
    if not isinstance(content, dict) or "labels" not in content:
        return None, [f"{file} holds no labels and is not used"]
    entries = cast(dict[str, Any], content)["labels"]
    if not entries:
        none = dict.fromkeys(paths, cast(object, None))
        return none, [f"folders are no classes, for the labels of {file} are null"]
    try:
        pairs = list(entries.items()) if isinstance(entries, dict) else [(str(name), label) for name, label in entries]
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: the labels of {file} are no pairs of name and label; mend it") from error
    given: dict[str, object] = {}
    for name, label in pairs:
        name = name.replace("\\", "/").removeprefix("./")
        if given.setdefault(name, label) != label:
            raise UserError(f"{source}: {file} gives {name} two labels, {given[name]} and {label}; mend it")
    known = max(
        ({name: name[cut:] for name in paths} for cut in _cuts(file, common)),
        key=lambda inner: sum(key in given for key in inner.values()),
    )
    missing = [name for name in sorted(paths, key=natural_key) if given.get(known[name]) is None]
    if missing:
        raise UserError(
            f"{source}: {file} has no label for {count_text(len(missing))} ({shortened(missing, 3)}); add them, remove "
            "the images, or say --labels-from none"
        )
    notes = [f"labels are those of {file}"]
    spare = sorted(set(given) - set(known.values()), key=natural_key)
    beside = len(file.split("/")) - 1 < len(common)  # it may speak of other parts too
    if spare and not beside:
        notes.append(f"{count_text(len(spare), 'label')} of {file} name no image ({shortened(spare, 3)})")
    return {name: given[key] for name, key in known.items()}, notes


def _cuts(file: str, common: Path) -> list[int]:
    """Where names in a dataset.json may begin: at its folder, at the top, or at the images' own folder."""
    folder = len(file) - len(LABELS)
    return list(dict.fromkeys([folder, 0, len("/".join([*common, ""]))]))


def _unread_tables(rest: Sequence[str]) -> list[str]:
    """What is said of files that may hold labels, which are not read."""
    files = [name.rpartition("/")[2].lower() for name in rest]
    names = [
        name
        for name, file in zip(rest, files, strict=True)
        if file.endswith(_TABLES) and any(word in file for word in _SUSPECTS)
    ]
    return [f"{shortened(names, 3)} may hold labels, which onefold does not read from such a file"] if names else []


def _common(paths: Sequence[Path]) -> Path:
    """The folders that all paths have in common."""
    folders = [path[:-1] for path in paths]
    if not folders:
        return ()
    first, last = min(folders), max(folders)
    same = [a == b for a, b in zip(first, last, strict=False)]
    return first[: same.index(False) if False in same else len(same)]
