"""Features by an external network: InceptionV3, DINOv2, CLIP and their kind, from a TorchScript or ONNX file.

    images uint8 (n, C, H, W) → resized to size × size → (x/255 − mean)/std → network → (n, d)

The resize rule is the antialiased bicubic one of Pillow, in float, clamped to 0…255 and not rounded,
whatever the image's proportions; grey images become three equal channels. Another rule gives other numbers
(Parmar et al. 2022, arXiv:2104.11222), so it is in the record, beside the file's SHA-256.

One kind of file brings its own rule: the InceptionV3 of the StyleGAN and EDM family (`inception-2015-12-05.pt`) takes
uint8 images of any size, resizes and normalises them inside, and gives features where it is called with
`return_features=True`. It is known by that argument, and its images go in as they are: so do the FIDs compare that
were measured with it. (Karras et al. 2020, arXiv:2006.06676.)
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.images import check_images, in_batches

Channels = float | Sequence[float]
Run = Callable[[Tensor], Tensor]

INSIDE = "return_features"
"""The argument of a TorchScript network that prepares its images itself."""
TRIED = 32
"""Side of the images that such a network, which takes any size, is tried on."""


@dataclass(frozen=True)
class ExternalExtractor:
    """A feature extractor around `run`, a function of float images (B, 3, size, size) that gives (B, d)."""

    name: str
    sha256: str
    run: Run
    size: int | None
    """None: `run` takes uint8 images (B, 3, H, W) of any size."""
    mean: Tensor
    std: Tensor
    device: torch.device | str = "cpu"
    """Where images are prepared."""
    width: int = 0
    classes: int = 0

    @property
    def resize(self) -> str:
        """The resize rule, and the range where it is not [−1, 1], for a record."""
        if self.size is None:
            return "inside the file"
        rule = f"bicubic, antialiased, to {self.size} × {self.size}"
        mean, std = (" ".join(f"{value:.4g}" for value in each.flatten().tolist()) for each in (self.mean, self.std))
        return rule if (mean, std) == ("0.5", "0.5") else f"{rule}; less {mean}, over {std}"

    def features(self, images: Tensor, batch: int = 64) -> Tensor:
        """Features (n, d) float32 of images (n, C, H, W) uint8, C = 1 or 3; raises `UserError` for others.

        `batch` is a matter of memory only.
        """
        check_images(images)
        grey = images.shape[1] == 1
        check_images(images, (1 if grey else 3, None, None))
        return in_batches(lambda part: self.run(self.prepare(part)), images, batch)

    def predict(self, images: Tensor, batch: int = 64) -> Tensor:
        """Raises `UserError`: it gives features and no classes."""
        raise UserError(f"{self.name}: gives features and no classes; train a classifier for class accuracy")

    def prepare(self, images: Tensor) -> Tensor:
        """Uint8 images (B, C, H, W) as the network takes them, on its device: float32 (B, 3, size, size), or uint8."""
        x = images.to(self.device).expand(-1, 3, -1, -1)
        if self.size is None:
            return x
        x = x.float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return (x / 255 - self.mean) / self.std


def external_extractor(
    path: Path, sha256: str, run: Run, size: int | None, mean: Channels, std: Channels, device: torch.device | str
) -> ExternalExtractor:
    """Wrap `run` and try it on two images, so that a file that does not fit fails now and not hours later.

    Raises `UserError` if it fails or does not give (2, d).
    """
    scale, shift = (torch.tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1) for value in (std, mean))
    network = ExternalExtractor(path.name, sha256, run, size, shift, scale, device)
    side = size or TRIED
    try:
        features = network.features(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    except torch.OutOfMemoryError:  # which is no fault of the file
        raise
    except Exception as error:  # whatever an external program raises
        fault = f"fails on 2 × 3 × {side} × {side} images ({_line(error)})"
        raise UserError(f"{path}: {fault}; give its input size, and export it with any batch size") from None
    if features.ndim != 2 or len(features) != 2:
        shape = tuple(features.shape)
        raise UserError(f"{path}: gives {shape} for 2 images, not (2, d); export the pooled features")
    return replace(network, width=features.shape[1])


def torchscript(path: Path, device: torch.device | str) -> tuple[Run, bool]:
    """The function in a TorchScript file, and whether it prepares its images itself.

    Raises `UserError` if it is no such file.
    """
    try:
        with warnings.catch_warnings():
            # PyTorch advises those who write such files to move on; this one is already written.
            warnings.simplefilter("ignore", DeprecationWarning)
            with path.open("rb") as file:  # opened here: torch takes no names that are not UTF-8
                network = torch.jit.load(file, map_location=device).eval()
    except RuntimeError:
        raise UserError(f"{path}: is no TorchScript file; write it with torch.jit.trace(...).save") from None
    schema: Any = network.forward.schema
    inside = INSIDE in [argument.name for argument in schema.arguments]

    def run(x: Tensor) -> Tensor:
        return network(x, return_features=True) if inside else network(x)

    return run, inside


def onnx(path: Path, device: torch.device | str) -> Run:
    """The function in an ONNX file: one input, and the features as first output.

    Raises `UserError` if onnxruntime is not installed or cannot open the file.
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        raise UserError(f"{path}: needs onnxruntime; pip install 'onefold[onnx]'") from None
    where = torch.device(device)
    gpu = [("CUDAExecutionProvider", {"device_id": where.index or 0})] if where.type == "cuda" else []
    if not {name for name, _ in gpu} <= set(onnxruntime.get_available_providers()):
        gpu = []  # a build for the CPU alone
    try:
        session = onnxruntime.InferenceSession(str(path), providers=[*gpu, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for each way to fail
        raise UserError(f"{path}: onnxruntime cannot open it ({_line(error)}); export it again") from None
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])

    return run


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _line(error: Exception) -> str:
    """The last line of a message: TorchScript puts the cause there, below its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
