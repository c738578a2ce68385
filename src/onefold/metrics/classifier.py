"""A small convolutional classifier, whose last hidden layer is the default feature space.

    image → stem → stages of (convolution that halves the side, residual convolutions) → mean over positions = features
          → linear → logits

Trained on the data set itself it needs no download, fits any number of channels and any size, and knows
what matters in these images. The stem strides by up to 4, each stage halves the side and by default doubles
the channels, the last is about 4×4; so the cost grows slowly with the image. A side is halved by the stride of
the convolution or, where `pooled`, by max pooling (2×2) after it, at four times the convolution's work.
Batch normalisation uses the statistics of the training data, whatever mode the module is in when features are
taken: images never mix, and brightness and contrast, which normalisation within an image would hide, remain
visible.

Shapes: images (n, C, H, W) uint8; features (n, width) float32 ≥ 0; logits (n, K).
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.files import read_tensors
from onefold.metrics.images import check_images, in_batches

KEY = "onefold.classifier"
LATER = ("pooled", "mirrored")
"""Options that a file leaves out if they are off: one from before them keeps its hash."""
PRETEXTS = {"": 0, "rotations": 4, "flips": 4}  # name -> number of pretext classes


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier is made of; stored as JSON beside its weights."""

    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    classes: int
    """K, or 0 for a classifier of a pretext task."""
    pretext: str
    """"" or the pretext task: "rotations" or "flips"."""
    stride: int
    """Stride of the stem."""
    widths: tuple[int, ...]
    """Channels after the stem and after each stage; the last is the width of the features."""
    residuals: int = 1
    """Residual convolutions of each stage; the stem is followed by one fewer."""
    pooled: bool = False
    """Whether stages halve the side by max pooling rather than by a stride."""
    mirrored: bool = False
    """Whether `features`, `logits` and `predict` take the mean of an image and its mirror image, at twice the work.
    They then cannot tell one from the other."""

    @classmethod
    def of(cls, shape: tuple[int, int, int], classes: int, pretext: str = "") -> "ClassifierConfig":
        """The network for images of this (C, H, W)."""
        side = min(shape[1:])
        stride = min(4, max(1, side // 16))
        stages = max(1, (side // stride).bit_length() - 3)  # down to 4…7 positions a side
        width = 64 if side <= 8 else 192
        return cls(shape, classes, pretext, stride, tuple(max(16, width >> s) for s in range(stages, -1, -1)))


class Classifier(nn.Module):
    """A classifier and feature extractor for images of one (C, H, W); frozen once trained or loaded."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        stride, reach = config.stride, max(1, config.stride // 2)
        layers: list[nn.Module] = [
            nn.Conv2d(config.shape[0], config.widths[0], stride + 2 * reach, stride, reach),
            nn.BatchNorm2d(config.widths[0]),
            nn.ReLU(),
            *[Residual(config.widths[0]) for _ in range(config.residuals - 1)],
        ]
        for before, after in zip(config.widths, config.widths[1:], strict=False):
            halved = {"pool": 2} if config.pooled else {"stride": 2}
            layers += [_convolution(before, after, **halved), *[Residual(after) for _ in range(config.residuals)]]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(config.widths[-1], config.classes or PRETEXTS[config.pretext])

    @property
    def name(self) -> str:
        """What it is, for a record: kind, image shape and task."""
        task = self.config.pretext or f"{self.config.classes} classes"
        mirrored = ", mirrored" if self.config.mirrored else ""
        return f"classifier of {' × '.join(map(str, self.config.shape))}, {task}{mirrored}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that `save` writes."""
        return sha256(self.to_bytes()).hexdigest()

    @property
    def width(self) -> int:
        """Number of features."""
        return self.config.widths[-1]

    @property
    def classes(self) -> int:
        """Number of classes of the data, or 0 where it learned a pretext task."""
        return self.config.classes

    @property
    def resize(self) -> str:
        """How images are resized: not at all."""
        return "none"

    def forward(self, x: Tensor) -> Tensor:
        """Logits of float images in [−1, 1] as they are, with gradient: for training."""
        return self.head(self._mean(x))

    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features (n, width) float32 of images (n, C, H, W) uint8; `batch` is a matter of memory only.

        Raises `UserError` if the images are not uint8 or not of the shape that the classifier was made for.
        """
        check_images(images, self.config.shape)
        self.eval()
        return in_batches(self._features, images, batch)

    def logits(self, images: Tensor, batch: int = 256) -> Tensor:
        """Logits (n, K) float32 of images (n, C, H, W) uint8; errors as `features`."""
        check_images(images, self.config.shape)
        self.eval()
        return in_batches(lambda part: self.head(self._features(part)), images, batch)

    def predict(self, images: Tensor, batch: int = 256) -> Tensor:
        """Most likely class (n,) int64; errors as `features`, and where it learned a pretext task."""
        if not self.classes:
            raise UserError(f"{self.name}: knows no classes of the data; train a classifier with labels")
        return self.logits(images, batch).argmax(1)

    def to_bytes(self) -> bytes:
        """Weights and configuration as safetensors."""
        weights = {name: w.detach().cpu().contiguous() for name, w in self.state_dict().items()}
        about = {name: value for name, value in asdict(self.config).items() if value or name not in LATER}
        return to_safetensors(weights, {KEY: json.dumps(about)})

    def save(self, path: str | Path) -> None:
        """Write weights and configuration as one safetensors file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """Read what `save` wrote. Raises `UserError` if the file is missing or something else."""
        try:
            weights, described = read_tensors(Path(path))
            about = json.loads(described[KEY])
            about |= {"shape": tuple(about["shape"]), "widths": tuple(about["widths"])}
            classifier = cls(ClassifierConfig(**about))
            classifier.load_state_dict(weights)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give a classifier that Classifier.save wrote") from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):  # which knows what it is instead
                raise
            raise UserError(f"{path}: holds no classifier; write one with Classifier.save") from None
        return classifier.freeze()

    def freeze(self) -> "Classifier":
        """No gradient, no training mode; returns itself."""
        return self.eval().requires_grad_(False)

    def _features(self, images: Tensor) -> Tensor:
        x = images.to(self.head.weight.device, torch.float32) / 127.5 - 1
        x = x.contiguous(memory_format=torch.channels_last)
        return (self._mean(x) + self._mean(x.flip(3))) / 2 if self.config.mirrored else self._mean(x)

    def _mean(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


class Residual(nn.Module):
    """x + convolution(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = _convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _convolution(before: int, after: int, *, stride: int = 1, pool: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    pooling = [nn.MaxPool2d(pool, ceil_mode=True)] if pool > 1 else []
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(after), nn.ReLU())
