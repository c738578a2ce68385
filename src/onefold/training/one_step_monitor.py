"""The monitor of one-step training: is the generator getting better, and what does the critic know?

Measured on the published average, on samples with seeds that no evaluation uses, and on held-out images:

    frechet             distance of `measured` samples to the training images
    class_accuracy      of the samples, where there are classes
    mean_shift          difference of the mean pixel from the data's, in standard deviations of the data's pixels
    contrast            standard deviation of pixels within an image, over the data's
    saturation          spread of a pixel's channels, over the data's; for colour images only
    diversity           standard deviation of latents over images, over the data's; needs two held-out images or more
    auc                 how well the ratio tells held-out data from samples, at each of the noise levels `LEVELS`: ½ is
                        chance
    auc_seen            the same for training images: well above `auc`, the ratio network has overfitted them
    calibration         mean distance between σ(ℓ) and the fraction of data among inputs with that σ(ℓ), at each level:
                        0 is exact
    logit_real, _fake   mean ℓ at each level
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from onefold import metrics
from onefold.alarm import ONESTEP_CURE, departure
from onefold.compute import eager
from onefold.data import Dataset, read_all
from onefold.extractor import extractor_for
from onefold.networks import Network, RatioNet
from onefold.objectives.one_step import Critic
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float, to_uint8
from onefold.training.engine import autocast
from onefold.training.monitor import Line, Monitor, Values
from onefold.training.run import Run
from onefold.training.state import TrainingState

__all__ = ["LEVELS", "OneStepMonitor", "auc", "calibration"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 2**40
"""Seed of the first sample: far from any seeds used in evaluation."""
REFERENCE = 10_000
"""Maximum number of training images that the distance is taken to."""
PROBE = 256
"""Maximum number of held-out images, of training images, and of samples, that the critic is evaluated on …"""
NOISES = 2
"""… each with so many noises. Of a few hundred inputs, even exact probabilities seem off by 0.03."""
BINS = 10
SELECTION = 5
"""One in so many training images is the reference that an average is selected by."""


class OneStepMonitor(Monitor):
    """Measures a one-step generator and its critic; with `onestep.selects`, keeps the best average."""

    key = "onestep"
    alarm = "the generator departs from the data"
    cure = ONESTEP_CURE

    def __init__(
        self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Callable[[str], None], *, warmup: int
    ) -> None:
        """`warmup`: images of the run up to which no alarm is raised."""
        super().__init__(run)
        options = run.config.onestep
        self.device, self.warmup = device, warmup
        self.selects = options.selects
        self.count = min(options.measured, len(data))
        self.extractor = metrics.from_file(options.features) if options.features else extractor_for(data, say)
        chosen = np.linspace(0, len(data) - 1, min(len(data), REFERENCE)).round().astype(np.int64)
        real, labels = read_all(data, chosen)
        features = self.extractor.features(real)
        self.reference = metrics.Moments.from_features(features, self.extractor.sha256)
        fifth = features[::SELECTION] if len(features) > SELECTION else features
        self.selection = metrics.Moments.from_features(fifth, self.extractor.sha256)
        if self.selects and self.count < self.extractor.width:
            what = f"{self.count} samples, fewer than the {self.extractor.width} features: chance decides"
            say(f"note: an average is selected by {what}; give more with --onestep.measured, if there are more images")
        self.pixels = _pixel_statistics(real)
        self.labels = labels[np.linspace(0, len(labels) - 1, self.count).round().astype(np.int64)]
        held_out, self.held_out_labels = read_all(test, np.arange(min(len(test), PROBE)))
        self.held_out = to_float(held_out)
        seen = torch.linspace(0, len(real) - 1, min(len(real), PROBE)).round().long()
        self.seen, self.seen_labels = to_float(real[seen]), labels[seen]

    def measure(self, state: TrainingState, before: Values | None) -> Values:
        """All quantities in the module's docstring; keeps the average with the least distance, if one is selected."""
        counters, network = state.counters, state.averages[-1]
        teacher, critic = state.modules["teacher"], state.modules["critic"]
        assert isinstance(teacher, Network)
        assert isinstance(critic, Critic)
        with torch.no_grad(), eager():
            with autocast(self.run.config.training, self.device):  # only the networks; the metrics run in float32
                z = self._sample(network)
                made = torch.cat([to_uint8(network.decode(part)).cpu() for part in z.split(256)])
                real = self._encoded(teacher, self.held_out)
                told: Values = {}
                if critic.ratio is not None:
                    told = self._critic(critic.ratio, real, self._encoded(teacher, self.seen), z)
            made_moments = metrics.Moments.from_features(self.extractor.features(made), self.extractor.sha256)
            values: Values = {"frechet": metrics.frechet_from_moments(self.reference, made_moments)}
            if self.extractor.classes == network.config.classes > 0:
                values["class_accuracy"] = metrics.class_accuracy(self.extractor, made, self.labels)
            values |= _compared(_pixel_statistics(made), self.pixels)
            if len(real) > 1 and (spread := real.std(0).mean()) > 0:
                values["diversity"] = (z.std(0).mean() / spread).item()
            values |= told
        if self.selects:
            distance = metrics.frechet_from_moments(self.selection, made_moments)
            if counters.best is None or distance < counters.best:
                counters.best, counters.best_images = distance, counters.images
                state.modules["best"].load_state_dict(network.state_dict())
        return values

    def judge(self, log: Sequence[Line]) -> str | None:
        return departure(log, warmup=self.warmup)

    def _sample(self, network: Network) -> Float[Tensor, "n N D"]:
        labels = self.labels.tolist() if network.config.classes else None
        return torch.cat(list(network.sample_latents(range(SEED, SEED + self.count), labels, network.sampler)))

    def _encoded(self, teacher: Network, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n N D"]:
        return torch.cat([teacher.encode(part.to(self.device)) for part in images.split(256)])

    def _critic(
        self, ratio: RatioNet, real: Float[Tensor, "m N D"], seen: Float[Tensor, "k N D"], fake: Float[Tensor, "n N D"]
    ) -> Values:
        """What the critic makes of held-out data, of training data and of samples, at each level, equally many."""
        count = min(len(real), len(seen), len(fake))
        pick = torch.linspace(0, len(fake) - 1, count).round().long()
        labelled = bool(self.run.config.network.classes)
        values: Values = {}
        rng = torch.Generator().manual_seed(SEED)
        noises = [torch.randn(real[:count].shape, generator=rng).to(self.device) for _ in range(NOISES)]
        for level in LEVELS:
            t = torch.full((count,), level, device=self.device)

            def logits(z: Tensor, y: Tensor, t: Tensor = t) -> Float[Tensor, " n"]:
                labels = y[:count].to(t.device) if labelled else None
                points = [noised(Linear(), z[:count], noise, per_token(t)) for noise in noises]
                return torch.cat([ratio(point, t, labels).cpu() for point in points])

            on_real, on_seen = logits(real, self.held_out_labels), logits(seen, self.seen_labels)
            on_fake = logits(fake[pick], self.labels[pick])
            found = {
                "auc": auc(on_real, on_fake),
                "auc_seen": auc(on_seen, on_fake),
                "calibration": calibration(on_real, on_fake),
                "logit_real": on_real.mean().item(),
                "logit_fake": on_fake.mean().item(),
            }
            for name, value in found.items():
                values.setdefault(name, []).append(float(f"{value:.5g}"))
        return values


def auc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> float:
    """Fraction of pairs in which the positive is the larger; ties count half."""
    positive, negative = positive.double(), negative.double().sort().values
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def calibration(positive: Float[Tensor, " n"], negative: Float[Tensor, " n"]) -> float:
    """Expected calibration error of σ(ℓ) as the probability of being positive, for equally many of both."""
    said = torch.cat([positive, negative]).double().sigmoid()
    true = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).double()
    bins = (said * BINS).long().clamp(max=BINS - 1)
    error = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, said - true)
    return (error.abs().sum() / len(said)).item()


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
