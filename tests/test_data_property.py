"""Whatever a data set is written as, each of its images is read with its label, or named."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_images import encode, write_folder, write_zip
from onefold.data import open_dataset
from onefold.errors import UserError

# Letters that have a meaning somewhere: in paths, options, numbers, other alphabets. Not numbers like those of chunks.
WORD = st.text("ab09 _-.äß猫'", min_size=1, max_size=6).map(str.strip)
WORD = WORD.filter(lambda word: word.strip(".") == word != "" and not (word.isdigit() and len(word) > 1))
PARTS = {"train": ("train", "Training", "TRAIN"), "test": ("test", "eval", "Testing"), "val": ("val", "valid", "dev")}
SUFFIXES = {".png": {}, ".BMP": {}, ".tiff": {}, ".webp": {"lossless": True}, ".PPM": {}, ".gif": {}, ".jp2": {}}
OTHERS = (".heic", ".txt", ".csv", "")


class Picture(NamedTuple):
    """Image k is grey with level k."""

    number: int
    part: str
    label: str
    suffix: str

    @property
    def file(self) -> bytes:
        kind = {".ppm": "PPM", ".jp2": "JPEG2000"}.get(self.suffix.lower(), self.suffix[1:].upper())
        return encode(np.full((4, 4, 3), self.number, np.uint8), kind, **SUFFIXES[self.suffix])


@st.composite
def pictures(draw: st.DrawFn, suffixes: tuple[str, ...] = tuple(SUFFIXES)) -> list[Picture]:
    parts = draw(st.sampled_from([("",), ("train",), ("train", "test"), ("train", "val"), ("train", "test", "val")]))
    classes = draw(st.lists(WORD, min_size=1, max_size=4, unique_by=str.lower))
    count = draw(st.integers(len(parts), 24))
    made = [
        Picture(k, parts[k % len(parts)], draw(st.sampled_from(classes)), draw(st.sampled_from(suffixes)))
        for k in range(count)
    ]
    return made


def check(source: str, made: list[Picture], label: Callable[[Picture], str | None], **options: Any) -> None:
    """Every part of a source holds its images, each with its label."""
    for part in {picture.part for picture in made}:
        data = open_dataset(f"{source}:{part}" if part else source, **options)
        found = {
            int(x[0, 0, 0]): data.class_names[y] if data.class_names else None
            for x, y in map(data.__getitem__, range(len(data)))
        }
        assert found == {picture.number: label(picture) for picture in made if picture.part == part}
        if part in ("", "train"):
            whole = open_dataset(source, **options)
            assert whole.digest() == data.digest()
            assert len(whole.test_sources) == len({picture.part for picture in made}) - 1


@settings(max_examples=60)
@given(made=pictures(), data=st.data())
def test_folders_and_zips(made: list[Picture], data: st.DataObject):
    kind = data.draw(st.sampled_from(["classes", "flat", "dataset.json", "null"]))
    around = data.draw(st.sampled_from(["", "photos/", "a/b/"]))
    words = {part: data.draw(st.sampled_from(PARTS[part])) + "/" for part in PARTS} | {"": ""}
    files: dict[str, bytes] = {}
    names: dict[str, str] = {}
    for picture in made:
        inside = {"classes": f"{picture.label}/", "flat": ""}.get(kind, f"{picture.number // 5:05d}/")
        name = f"{around}{words[picture.part]}{inside}{picture.number}{picture.suffix}"
        files[name], names[name] = picture.file, picture.label
    if kind in ("dataset.json", "null"):
        pairs = [[name.removeprefix(around), label] for name, label in names.items()]
        files[f"{around}dataset.json"] = json.dumps({"labels": pairs if kind == "dataset.json" else None}).encode()
    strangers = data.draw(st.lists(st.sampled_from(OTHERS), max_size=3))
    first = next(iter(names)).rpartition("/")[0]
    for k, suffix in enumerate(strangers):
        files["/".join(filter(None, [first, f"x{k}{suffix}"]))] = b"?"

    def label(picture: Picture) -> str | None:
        return picture.label if kind in ("classes", "dataset.json") else None

    with TemporaryDirectory() as folder:
        path = Path(folder)
        backslashes = data.draw(st.booleans())
        sources = [write_folder(path / "set", files), write_zip(path / "set.zip", files)]
        if backslashes:
            with zipfile.ZipFile(path / "windows.zip", "w") as archive:
                for name, content in files.items():
                    info = zipfile.ZipInfo()
                    info.filename = name.replace("/", "\\")
                    archive.writestr(info, content)
            sources.append(path / "windows.zip")
        for source in map(str, sources):
            packed, whole = not source.endswith("set"), made[0].part == ""
            if whole and kind == "flat" and around == "a/b/":
                check(source, made, lambda picture: "b")
            elif whole and kind == "flat" and around and not packed:
                check(source, made, lambda picture: "photos")
            elif whole and packed and not around and kind == "classes" and len({p.label for p in made}) == 1:
                check(source, made, lambda picture: None)  # its folder is one around everything
            else:
                check(source, made, label)
            noted = " ".join(open_dataset(source).notes)
            assert all((suffix or "no suffix") in noted for suffix in strangers)


@settings(max_examples=40)
@given(made=pictures((".png",)), data=st.data())
def test_arrays(made: list[Picture], data: st.DataObject):
    form = data.draw(st.sampled_from(["words", "numbers", "column", "floats", "one-hot", "named", "none"]))
    key = data.draw(st.sampled_from(["label", "labels", "targets", "y", "fine_labels"]))
    classes = sorted({picture.label for picture in made})
    arrays: dict[str, np.ndarray] = {}
    for part in {picture.part for picture in made}:
        chosen = [picture for picture in made if picture.part == part]
        numbers = np.array([classes.index(picture.label) for picture in chosen])
        values: dict[str, np.ndarray | None] = {
            "words": np.array([picture.label for picture in chosen]),
            "numbers": numbers,
            "named": numbers,
            "column": numbers[:, None],
            "floats": numbers.astype(np.float32),
            "one-hot": np.eye(max(len(classes), 2))[numbers],
            "none": None,
        }
        images = np.stack([np.full((4, 4), picture.number, np.uint8) for picture in chosen])
        arrays[f"{part}_images" if part else "images"] = images
        if (wanted := values[form]) is not None:
            arrays[f"{part}_{key}" if part else key] = wanted
    if form == "named":
        arrays |= {
            f"{part}_class_names" if part else "class_names": np.array(classes) for part in {p.part for p in made}
        }

    def label(picture: Picture) -> str | None:
        number = str(classes.index(picture.label))
        return {"words": picture.label, "named": picture.label, "none": None}.get(form, number)

    with TemporaryDirectory() as folder:
        np.savez(f"{folder}/set.npz", **arrays)
        check(f"{folder}/set.npz", made, label)
        check(f"{folder}/set.npz", made, lambda picture: None, labels_from="none")


@settings(max_examples=40)
@given(made=pictures(), data=st.data())
def test_tables(made: list[Picture], data: st.DataObject):
    form = data.draw(st.sampled_from(["words", "numbers", "lists", "floats", "hub", "none"]))
    key = data.draw(st.sampled_from(["label", "labels", "class_id", "fine_label", "y"]))
    shards, arrow = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    classes = sorted({picture.label for picture in made})
    features = {key: {"names": classes, "_type": "ClassLabel"}} if form == "hub" else {}
    with TemporaryDirectory() as folder:
        for part in {picture.part for picture in made}:
            chosen = [picture for picture in made if picture.part == part]
            for shard, rows in enumerate(np.array_split(np.arange(len(chosen)), shards)):
                own = [chosen[row] for row in rows]
                numbers = [classes.index(picture.label) for picture in own]
                values: dict[str, list[Any]] = {
                    "words": [picture.label for picture in own],
                    "lists": [[number] for number in numbers],
                    "floats": [float(number) for number in numbers],
                }
                kind = {"words": pa.string(), "lists": pa.list_(pa.int64()), "floats": pa.float64()}
                columns = {"image": pa.array([picture.file for picture in own], pa.binary())}
                if form != "none":
                    columns[key] = pa.array(values.get(form, numbers), kind.get(form, pa.int64()))
                table = pa.table(columns).replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": features}})}
                )
                name = f"{folder}/{part + '-' if part else 'data-'}{shard:05d}-of-{shards:05d}"
                if arrow:
                    with pa.ipc.new_stream(f"{name}.arrow", table.schema) as sink:
                        sink.write_table(table)
                else:
                    pq.write_table(table, f"{name}.parquet")

        def label(picture: Picture) -> str | None:
            number = str(classes.index(picture.label))
            return {"words": picture.label, "hub": picture.label, "none": None}.get(form, number)

        check(folder, made, label)
        check(folder, made, lambda picture: None, labels_from="none")


@settings(max_examples=40)
@given(made=pictures((".png",)), data=st.data())
def test_labels_that_are_missing_are_named(made: list[Picture], data: st.DataObject):
    lost = data.draw(st.sampled_from(made))
    names = {picture: f"{picture.number // 5:05d}/{picture.number}.png" for picture in made}
    pairs = [[names[picture], picture.label] for picture in made if picture != lost]
    content = json.dumps({"labels": pairs or [["other.png", 0]]}).encode()
    with TemporaryDirectory() as folder:
        source = write_zip(Path(folder) / "set.zip", {names[p]: p.file for p in made} | {"dataset.json": content})
        with pytest.raises(UserError, match=re.escape(f"no label for 1 image ({names[lost]})")):
            open_dataset(source)
