"""The monitor of a one-step generator: do its samples approach the data?

Measured on the published average, on samples with seeds that no evaluation uses:

    frechet             distance of `measured` samples to the training images, where there are features to compare
    class_accuracy      of the samples, where there are also classes
    mean_shift          difference of the mean pixel from the data's, in standard deviations of the data's pixels
    contrast            standard deviation of pixels within an image, over the data's
    saturation          spread of a pixel's channels, over the data's; for colour images only
    diversity           standard deviation of latents over images, over the data's; needs two held-out images or more
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from onefold import metrics
from onefold.alarm import ONERUN_CURE, departure
from onefold.compute import eager
from onefold.data import Dataset, read_all
from onefold.networks import Network
from onefold.pixels import to_float, to_uint8
from onefold.training.engine import autocast
from onefold.training.monitor import Line, Monitor, Values
from onefold.training.run import Run
from onefold.training.state import TrainingState

__all__ = ["GeneratorMonitor", "Look"]

SEED = 2**40
"""Seed of the first sample: far from any seeds used in evaluation."""
REFERENCE = 10_000
"""Maximum number of training images that the distance is taken to."""
PROBE = 256
"""Maximum number of held-out images, of training images, and of samples, that other networks are evaluated on."""


class Look(NamedTuple):
    """What one measurement has made of samples and held-out images."""

    samples: Float[Tensor, "n N D"]
    held_out: Float[Tensor, "m N D"]
    moments: metrics.Moments | None
    """Of the samples' features, if there are any."""


class GeneratorMonitor(Monitor):
    """Measures a one-step generator in the latents of the network's own average."""

    key = "onestep"
    alarm = "the generator departs from the data"
    cure = ONERUN_CURE

    def __init__(
        self,
        run: Run,
        data: Dataset,
        test: Dataset,
        device: torch.device,
        extractor: metrics.FeatureExtractor | None,
        *,
        measured: int,
        warmup: int,
    ) -> None:
        """Read the images to compare with.

        Args:
            run: The run.
            data: Its training images.
            test: Its held-out images.
            device: Where the networks are.
            extractor: Of the features; without one, there is neither distance nor accuracy.
            measured: Samples of each measurement.
            warmup: Images of the run up to which no alarm is raised.
        """
        super().__init__(run)
        self.device, self.warmup = device, warmup
        self.count = min(measured, len(data))
        self.extractor = extractor
        chosen = np.linspace(0, len(data) - 1, min(len(data), REFERENCE)).round().astype(np.int64)
        self.real, self.real_labels = read_all(data, chosen)
        if extractor is not None:
            self.features = extractor.features(self.real)
            self.reference = metrics.Moments.from_features(self.features, extractor.sha256)
        self.pixels = _pixel_statistics(self.real)
        self.labels = self.real_labels[np.linspace(0, len(chosen) - 1, self.count).round().astype(np.int64)]
        held_out, self.held_out_labels = read_all(test, np.arange(min(len(test), PROBE)))
        self.held_out = to_float(held_out)

    def measure(self, state: TrainingState, before: Values | None) -> Values:
        """All quantities in the module's docstring."""
        return self.look_at(state.averages[-1], state.averages[-1])[0]

    def judge(self, log: Sequence[Line]) -> str | None:
        return departure(log, warmup=self.warmup)

    def look_at(self, network: Network, encoder: Network) -> tuple[Values, Look]:
        """Measure a generator whose latents are those of an encoder."""
        with torch.no_grad(), eager():
            with autocast(self.run.config.training, self.device):  # only the networks; the metrics run in float32
                z = self._sample(network)
                made = torch.cat([to_uint8(network.decode(part)).cpu() for part in z.split(256)])
                held_out = self.encoded(encoder, self.held_out)
            values, moments, extractor = Values(), None, self.extractor
            if extractor is not None:
                moments = metrics.Moments.from_features(extractor.features(made), extractor.sha256)
                values["frechet"] = metrics.frechet_from_moments(self.reference, moments)
                if extractor.classes == network.config.classes > 0:
                    values["class_accuracy"] = metrics.class_accuracy(extractor, made, self.labels)
            values |= _compared(_pixel_statistics(made), self.pixels)
            if len(held_out) > 1 and (spread := held_out.std(0).mean()) > 0:
                values["diversity"] = (z.std(0).mean() / spread).item()
        return values, Look(z, held_out, moments)

    def encoded(self, encoder: Network, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n N D"]:
        return torch.cat([encoder.encode(part.to(self.device)) for part in images.split(256)])

    def _sample(self, network: Network) -> Float[Tensor, "n N D"]:
        labels = self.labels.tolist() if network.config.classes else None
        return torch.cat(list(network.sample_latents(range(SEED, SEED + self.count), labels, network.sampler)))


def _compared(made: Mapping[str, float], data: Mapping[str, float]) -> dict[str, float]:
    """Pixel statistics of samples relative to the data's, without those that are undefined for the data."""
    found = {name: made[name] / data[name] for name in ("contrast", "saturation") if data.get(name)}
    if data["std"] > 1e-3:
        found["mean_shift"] = (made["mean"] - data["mean"]) / data["std"]
    return found


def _pixel_statistics(images: UInt8[Tensor, "n C H W"]) -> dict[str, float]:
    """Mean pixel, standard deviation of all pixels, its mean within images, and mean spread over channels.

    Images are converted to floats in parts, since as floats they are large.
    """
    numbers: list[tuple[Tensor, ...]] = []
    for part in images.split(256):
        x = to_float(part)
        spread = (x.amax(1) - x.amin(1)).flatten(1).mean(1)
        numbers.append((x.flatten(1).mean(1), x.square().flatten(1).mean(1), x.flatten(1).std(1), spread))
    columns = zip(*numbers, strict=True)
    mean, square, contrast, saturation = (torch.cat(column).double().mean().item() for column in columns)
    found = {"mean": mean, "std": max(0.0, square - mean**2) ** 0.5, "contrast": contrast}
    return found | ({"saturation": saturation} if images.shape[1] > 1 else {})
