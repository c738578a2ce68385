"""The features that a data set is measured in unless others are given: those of a small classifier of its own."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from onefold import metrics
from onefold.data import Dataset, read_all
from onefold.errors import UserError, printable
from onefold.files import cache_folder

__all__ = ["extractor_for", "known_extractor"]

LARGEST = 2**32
"""Bytes of images that the classifier learns from, at most; of larger sets, images spread evenly over them."""


def known_extractor(data: Dataset, device: torch.device | str = "cpu") -> metrics.FeatureExtractor | None:
    """The default features of a data set, if they need not be trained: of the digits, or of one seen before."""
    if data.source in ("digits", "digits:test"):
        return metrics.digits_classifier(device)
    with contextlib.suppress(UserError):  # not there, or half written by a process that was killed
        return metrics.from_file(_place(data), device=device)
    return None


def extractor_for(
    data: Dataset, say: Callable[[str], None] = lambda line: None, device: torch.device | str = "cpu"
) -> metrics.FeatureExtractor:
    """The default features of a data set: those of a small classifier of its labels, trained on it alone.

    It is trained, and computes, on `device`.

    The embedded digits have theirs in the package. For other data it is trained once, with a fixed seed, and kept in
    `$ONEFOLD_CACHE` (default `~/.cache/onefold`), by the hash of the data.
    """
    if (known := known_extractor(data, device)) is not None:
        return known
    path = _place(data)
    if len(data) < 2:
        raise UserError(f"{data.source}: holds 1 image to train on, too few to learn features from; add some")
    say(printable(f"training a small classifier of {data.source} for the features (once; kept as {path})"))
    count = min(len(data), LARGEST // int(np.prod(data.image_shape)))
    images, labels = read_all(data, np.linspace(0, len(data) - 1, count).round().astype(np.int64))
    classifier = metrics.train_classifier(images, labels, classes=data.classes, device=device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        classifier.save(path)
    except OSError as error:
        say(f"{path}: could not be kept ({error.strerror}); it will be trained again next time")
    return classifier


def _place(data: Dataset) -> Path:
    return cache_folder() / f"classifier-{data.digest()[:16]}.safetensors"
