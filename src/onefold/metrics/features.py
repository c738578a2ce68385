"""Feature extractors: from images to the numbers that Fréchet distance, KID, precision and recall compare.

Four kinds keep one protocol: the classifier of the embedded digits, which the package ships; a classifier
that `train_classifier` made for other data; any network in a TorchScript or ONNX file (InceptionV3), see
`external`; and a DINOv2 or CLIP in a folder of transformers, see `pretrained`. Two distances compare only if
they share the extractor: a record holds its name and SHA-256.

Shapes: images (n, C, H, W) uint8; features (n, d) float32; classes (n,) int64.
"""

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from onefold.errors import UserError
from onefold.files import refuse_placeholder
from onefold.metrics.classifier import Classifier
from onefold.metrics.external import external_extractor, file_sha256, onnx, torchscript
from onefold.metrics.pretrained import preparation, pretrained, weights_of
from onefold.metrics.sources import SOURCES

KINDS = "a .safetensors, .pt, .torchscript or .onnx file, a folder"


class FeatureExtractor(Protocol):
    """Anything that gives features of images, the same whatever the batch size."""

    @property
    def name(self) -> str:
        """What it is, for a record."""
        ...

    @property
    def sha256(self) -> str:
        """SHA-256 of its file."""
        ...

    @property
    def resize(self) -> str:
        """How it resizes images, for a record."""
        ...

    @property
    def width(self) -> int:
        """Number of features, d."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes that `predict` tells apart; 0 if it does not classify."""
        ...

    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features (n, d) float32 of images (n, C, H, W) uint8; `batch` is a matter of memory only."""
        ...

    def predict(self, images: Tensor, batch: int = 256) -> Tensor:
        """Most likely class (n,) int64; raises `UserError` if `classes` is 0."""
        ...


def digits_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The shipped classifier of the embedded 8×8 digits: 64 features, 10 classes.

    `benchmarks/train_digits_classifier.py` trained it on the 1,437 training images and on nothing else.
    """
    with as_file(files("onefold.metrics") / "digits_classifier.safetensors") as path:
        return Classifier.load(path).to(device)


def from_file(
    path: str | Path,
    sha256: str | None = None,
    *,
    size: int = 299,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Open a feature extractor: .safetensors of `Classifier.save`, .pt or .torchscript, .onnx, or a folder.

    A TorchScript or ONNX network takes float images (B, 3, size, size), normalised as (x/255 − mean)/std
    with one number or one for each channel, and gives features (B, d). With mean and std of 0.5 the range is
    [−1, 1], with 0 and 1 it is [0, 1]. A classifier needs none of these, nor does a TorchScript InceptionV3 of
    the StyleGAN family, which prepares its images itself, nor a folder with a DINOv2 or CLIP of transformers,
    which says how. TorchScript and ONNX files are programs: take them only from where you trust. Nothing is
    downloaded or unpickled.

    "inception", "dinov2" and "clip" are what `onefold prefetch` keeps; a file or folder of that name goes first.

    Raises `UserError` if the file is missing, of another kind, not of the given SHA-256, or gives no
    features.
    """
    path = Path(path)
    if not path.exists() and str(path) in SOURCES:
        path = SOURCES[str(path)].kept()
    if not path.exists():
        raise UserError(f"{path}: no such file; give {KINDS}, or one of the names {', '.join(SOURCES)}")
    weights = weights_of(path) if path.is_dir() else path
    refuse_placeholder(weights)
    found = file_sha256(weights)
    if sha256 is not None and sha256.lower() != found:
        raise UserError(f"{weights}: SHA-256 is {found}, not {sha256.lower()}; get the file that was meant")
    if path.is_dir():
        own_size, own_mean, own_std = preparation(path)
        return external_extractor(path, found, pretrained(path, device), own_size, own_mean, own_std, device)
    match path.suffix:
        case ".safetensors":
            return Classifier.load(path).to(device)
        case ".pt" | ".torchscript":
            run, inside = torchscript(path, device)
            return external_extractor(path, found, run, None if inside else size, mean, std, device)
        case ".onnx":
            return external_extractor(path, found, onnx(path, device), size, mean, std, device)
        case _:
            raise UserError(f"{path}: not a known kind; give {KINDS}, or one of the names {', '.join(SOURCES)}")


def class_accuracy(
    extractor: FeatureExtractor, images: Tensor, labels: Tensor | Sequence[int], batch: int = 256
) -> float:
    """Share of images (n, C, H, W) that the extractor takes for their label (n,), in [0, 1].

    On generated images with the labels they were asked for: does the generator obey? Raises `UserError` if
    the extractor does not classify, or the labels do not fit the images.
    """
    found = extractor.predict(images, batch)  # first, for it says what is wrong with the images
    y = torch.as_tensor(labels).cpu()
    if y.shape != found.shape:
        raise UserError(f"labels: {tuple(y.shape)} for {len(images)} images; give one label for each")
    return (found == y).double().mean().item()
