"""Feature spaces: what is kept of images that come batch by batch and go, and how two sets compare in a space.

What the yardsticks are, and why `frechet.floor` is half of `frechet.halves`, stands in the docstring of `evaluation`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics import FeatureExtractor, effective_rank, frechet_distance, kernel_distance, precision_recall
from onefold.metrics.reconstruction import image_psnr, image_ssim
from onefold.networks.base import Network
from onefold.pixels import to_float, to_uint8

if TYPE_CHECKING:
    from onefold.training.engine import Ranks

__all__ = ["LEAST_IMAGES", "NEIGHBOURS", "Images", "Reconstructions", "check_spaces", "compare"]

LEAST_IMAGES = 4
"""To measure anything."""
SPLITS = 10
"""Random halvings that the yardsticks are averaged over."""
NEIGHBOURS = 3
REDUCED = 64
"""Height and width that larger images are reduced to before they are compared pixel by pixel."""
LATENTS = 2**26
"""Numbers in the latents that are kept for their rank, 256 MiB; the group `latent` is of as many test images as fit."""


def check_spaces(extractors: Sequence[FeatureExtractor]) -> None:
    """Refuse what a record could not tell apart.

    Raises:
        UserError: two extractors of one name, or one twice.
    """
    for k, one in enumerate(extractors):
        for other in extractors[:k]:
            if one.sha256 == other.sha256:
                raise UserError(f"features: {one.name} is given twice; give each extractor once")
            if one.name == other.name:
                raise UserError(f"features: two are called {one.name!r}; rename one of their files")


class Images:
    """What is kept of images: their features in each space, classes, and their pixels reduced to rows.

    A row takes H·W·C bytes, of images larger than `REDUCED` as many as one of that size: 12 KiB of an RGB image.
    """

    def __init__(
        self,
        extractors: Sequence[FeatureExtractor],
        *,
        classifier: FeatureExtractor | None = None,
        keep: bool = False,
    ) -> None:
        """`classifier`: keep the classes that it finds; `keep`: all pixels, which metrics of the caller's own need."""
        self._extractors, self._classifier, self._keep = extractors, classifier, keep
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, images: UInt8[Tensor, "B C H W"], labels: Int64[Tensor, " B"] | None = None) -> None:
        found = {f"features {k}": each.features(images) for k, each in enumerate(self._extractors)}
        found["rows"] = shrink(images)
        if self._classifier is not None:
            found["classes"] = self._classifier.predict(images)
        if self._keep:
            found["pixels"] = images
        if labels is not None:
            found["labels"] = labels
        for name, part in found.items():
            self._parts.setdefault(name, []).append(part)

    def gather(self, group: "Ranks", total: int) -> None:
        """In the first rank, keep what all ranks have of `total` images."""
        self._parts = {name: [group.gathered(self._all(name), total)] for name in self._parts}

    def _all(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = [torch.cat(parts)]
        return self._parts[name][0]

    @property
    def features(self) -> list[Float[Tensor, "n d"]]:
        """Of each space."""
        return [self._all(f"features {k}") for k in range(len(self._extractors))]

    @property
    def rows(self) -> UInt8[Tensor, "n d"]:
        return self._all("rows")

    @property
    def classes(self) -> Int64[Tensor, " n"]:
        return self._all("classes")

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        return self._all("labels")

    @property
    def pixels(self) -> UInt8[Tensor, "n C H W"]:
        return self._all("pixels")


class Reconstructions:
    """What is kept of images that are encoded and decoded batch by batch: features, errors and latents."""

    def __init__(self, network: Network, extractors: Sequence[FeatureExtractor]) -> None:
        self._network, self._extractors = network, extractors
        self._features: list[list[Tensor]] = [[] for _ in extractors]
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._room = LATENTS
        self._values = 1

    @torch.no_grad()
    def add(self, x: UInt8[Tensor, "B C H W"]) -> None:
        z = self._network.encode(to_float(x.to(self._network.device)))
        x_hat = to_uint8(self._network.decode(z)).cpu()
        for extractor, parts in zip(self._extractors, self._features, strict=True):
            parts.append(extractor.features(x_hat))
        self._psnr.append(image_psnr(x_hat, x))
        self._ssim.append(image_ssim(x_hat, x))
        kept = z[: self._room // z[0].numel()].cpu()
        self._room -= kept.numel()
        self._latents.append(kept)
        self._values = x[0].numel()

    @property
    def features(self) -> list[Float[Tensor, "n d"]]:
        """Of each space."""
        return [torch.cat(parts) for parts in self._features]

    def numbers(self, originals: Sequence[Float[Tensor, "n _"]]) -> list[dict[str, float]]:
        """In each space, the distance to the originals, whose features are given; in the first also PSNR and SSIM."""
        psnr, ssim = (torch.cat(parts).mean().item() for parts in (self._psnr, self._ssim))
        pairs = zip(originals, self.features, strict=True)
        first, *others = ({"frechet_distance": frechet_distance(x, x_hat)} for x, x_hat in pairs)
        return [{"psnr": psnr, "ssim": ssim} | first, *others]

    def latent(self) -> dict[str, float]:
        """Effective rank over tokens and over whole latents, and the standard deviation over images, averaged."""
        z = torch.cat(self._latents)
        found = {
            "effective_rank": effective_rank(z.flatten(0, 1)),
            "effective_rank_whole": effective_rank(z.flatten(1)),
            "std": z.std(0).mean().item(),
            "numbers_per_pixel_value": z[0].numel() / self._values,
        }
        fewer = len(z) < sum(map(len, self._psnr))
        return found | {"images": len(z)} if fewer else found


def compare(
    real: Float[Tensor, "n d"],
    made: Float[Tensor, "n d"],
    test: Float[Tensor, "m d"],
    *,
    seed: int,
    held_out: bool,
) -> dict[str, object]:
    """The numbers of one space: of generated images against the reference and, if `held_out`, against test images."""
    kid, kid_error = kernel_distance(real, made, subset=min(1000, len(real) // 2), seed=seed)
    precision, recall = precision_recall(real, made, NEIGHBOURS)
    halves, matched = yardsticks(real, made, seed)
    numbers: dict[str, object] = {
        "frechet_distance": frechet_distance(real, made),
        "frechet": {
            "halves": halves,
            "matched": matched,
            "ratio": matched / halves if halves else None,
            "floor": halves / 2,
        },
        "kid": kid,
        "kid_error": kid_error,
        "precision": precision,
        "recall": recall,
    }
    return numbers | ({"test": _against_test(real, made, test, seed)} if held_out else {})


def yardsticks(real: Float[Tensor, "n d"], made: Float[Tensor, "n d"], seed: int) -> tuple[float, float]:
    """Mean Fréchet distances over random halvings: half against half, and half against as many generated."""
    rng = torch.Generator().manual_seed(seed)
    half = len(real) // 2
    between, against = [], []
    for _ in range(SPLITS):
        order = torch.randperm(len(real), generator=rng)
        first, second = real[order[:half]], real[order[half : 2 * half]]
        some = made[torch.randperm(len(made), generator=rng)[:half]]
        between.append(frechet_distance(first, second))
        against.append(frechet_distance(first, some))
    return float(np.mean(between)), float(np.mean(against))


def shrink(images: UInt8[Tensor, "n C H W"]) -> UInt8[Tensor, "n d"]:
    """Pixels in rows; where an image is larger than `REDUCED`, means over areas, rounded."""
    height, width = images.shape[2:]
    if max(height, width) <= REDUCED:
        return images.flatten(1)
    size = min(height, REDUCED), min(width, REDUCED)
    return F.adaptive_avg_pool2d(images.float(), size).round().to(torch.uint8).flatten(1)


def _against_test(
    real: Float[Tensor, "n d"], made: Float[Tensor, "n d"], test: Float[Tensor, "m d"], seed: int
) -> dict[str, float]:
    """Generated images against the test images; precision and recall, which need it, of as many as these."""
    fewer = min(len(made), len(test))
    kid, kid_error = kernel_distance(test, made, seed=seed)
    precision, recall = precision_recall(test[:fewer], made[:fewer], NEIGHBOURS)
    return {
        "frechet_distance": frechet_distance(test, made),
        "floor": frechet_distance(test, real),
        "kid": kid,
        "kid_error": kid_error,
        "precision": precision,
        "recall": recall,
    }
