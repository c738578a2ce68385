"""A record of measured numbers, with the protocol that they were measured by and the model that they are of.

A number without its protocol compares with nothing (Parmar et al. 2022, arXiv:2104.11222). A record is a
nested dict of plain values, for example

    {"frechet_distance": 1.7, "kid": 0.002, "kid_error": 0.001, "precision": 0.8, "recall": 0.7,
     "test": {"frechet_distance": 2.1, "floor": 0.9, ...},
     "spaces": {"dinov2": {"frechet_distance": 130.2, "kid": 0.4, ...}},
     "class_accuracy": 0.97, "reconstruction": {"psnr": 31.2, "ssim": 0.98},
     "latent": {"effective_rank": 11.9, "std": 1.0}, "images_per_second": 210.0,
     "protocol": {"data": "digits", "split": "test", ...},
     "subject": {"model_sha256": "3f…", "training_seed": 0, ...}}

Records of two models measured alike agree in "protocol" and differ in "subject".

and a file of it is JSON, written in one piece: a reader finds the old one or the new one, never a half.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from onefold.errors import UserError
from onefold.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the numbers of a record were measured; None is what does not apply."""

    data: str
    """Source of the real images."""
    data_sha256: str
    split: str
    extractor: str
    """Name of the feature extractor; `resize` and `extractor_sha256` are its own too."""
    extractor_sha256: str
    resize: str
    real_images: int
    generated_images: int
    few_images: bool
    """Whether one of both is below twice the number of features, too few for the Fréchet distance."""
    spaces: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of each further feature space, by name: its extractor, hash, resize rule, and whether the images are few."""
    test_images: int | None = None
    test_data_sha256: str | None = None
    kid_subset: int | None = None
    neighbours: int | None = None
    """The k of precision and recall."""
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    ema: float | None = None
    selection: str | None = None
    """How the published weights were chosen among those of the run."""
    precision: str = "float32"
    """Of the matrix products of sampling."""
    compiled: bool = False
    """Whether sampling was compiled, which `images_per_second` then includes."""
    label_mode: str | None = None
    """Where the labels of generated images come from."""
    seed: int = 0
    version: str = ""
    """Of the package."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Which model the numbers of a record are of, and which code measured it; None is what is not known."""

    model_sha256: str
    """Of the published weights."""
    training_seed: int
    images_seen: int
    """Images that the run had seen when these weights were published …"""
    checkpoint: int | None
    """… and that they had: fewer, where the run chose an earlier average."""
    training_commit: str | None
    """Git commit of the code that trained …"""
    commit: str | None
    """… and of the code that measured."""


class Record(dict[str, Any]):
    """Numbers by name, nested; under "protocol" how they were measured and under "subject" of which model."""

    @classmethod
    def of(cls, protocol: Protocol, subject: Subject, **numbers: Any) -> "Record":
        """A record of numbers (or dicts of numbers) of this subject, measured by this protocol."""
        described = asdict(protocol)
        if not protocol.spaces:  # as in records of versions that knew but one
            del described["spaces"]
        return cls(numbers, protocol=described, subject=asdict(subject))

    def numbers(self) -> dict[str, float]:
        """Every number by its dotted name, such as "reconstruction.psnr", without protocol and subject."""
        return dict(_numbers({key: value for key, value in self.items() if key not in ("protocol", "subject")}))

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all; makes the folder.

        Raises `UserError` for NaN, infinity, or values that JSON does not know.
        """
        path = Path(path)
        bad = [name for name, value in self.numbers().items() if not math.isfinite(value)]
        if bad:
            raise UserError(f"{path}: {bad[0]} is not a finite number; leave it out or look for its cause")
        try:
            text = json.dumps(self, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: is not JSON ({error}); use plain numbers and text") from None
        write_whole(path, text + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Read what `write` wrote. Raises `UserError` if the file is missing or no record."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give a record that an evaluation wrote") from None
        except (OSError, ValueError):
            raise UserError(f"{path}: is no JSON; give a record that an evaluation wrote") from None
        if not isinstance(content, dict) or not isinstance(content.get("protocol"), dict):
            raise UserError(f"{path}: holds no protocol; give a record that an evaluation wrote")
        return cls(content)


def protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any], *, free: Collection[str] = ()) -> list[str]:
    """Names of the protocol fields in which two records differ: empty if their numbers may be compared.

    `free` names the fields that the comparison is about, such as "steps". A field that only one record has
    differs. What differs in their subjects is the models, which is what records are compared for.
    """
    p, q = a["protocol"], b["protocol"]
    return [name for name in {**p, **q} if name not in free and p.get(name, ...) != q.get(name, ...)]


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value
