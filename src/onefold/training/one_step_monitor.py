"""The monitor of one-step training: is the generator getting better, and what does the critic know?

Of the generator, in the teacher's latents: everything in `generator_monitor`. Of a ratio network, on held-out images,
training images and samples, at each of the noise levels `LEVELS`:

    auc                 how well the ratio tells held-out data from samples: ½ is chance
    auc_seen            the same for training images: well above `auc`, the ratio network has overfitted them
    calibration         mean distance between σ(ℓ) and the fraction of data among inputs with that σ(ℓ): 0 is exact
    logit_real, _fake   mean ℓ
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from onefold import metrics
from onefold.alarm import ONESTEP_CURE
from onefold.compute import eager
from onefold.data import Dataset
from onefold.extractor import extractor_for
from onefold.networks import Network, RatioNet
from onefold.objectives.one_step import Critic
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float
from onefold.training.engine import autocast
from onefold.training.generator_monitor import PROBE, SEED, GeneratorMonitor
from onefold.training.monitor import Values
from onefold.training.run import Run
from onefold.training.state import TrainingState

__all__ = ["LEVELS", "OneStepMonitor", "auc", "calibration"]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 2
"""Noises of each image that the critic is evaluated on. Of a few hundred inputs, even exact probabilities seem off by
0.03."""
BINS = 10
SELECTION = 5
"""One in so many training images is the reference that an average is selected by."""


class OneStepMonitor(GeneratorMonitor):
    """Measures a one-step generator and its critic; with `onestep.selects`, keeps the best average."""

    cure = ONESTEP_CURE

    def __init__(
        self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Callable[[str], None], *, warmup: int
    ) -> None:
        """`warmup`: images of the run up to which no alarm is raised."""
        options = run.config.onestep
        features = options.features
        extractor = metrics.from_file(features, device=device) if features else extractor_for(data, say, device)
        super().__init__(run, data, test, device, extractor, measured=options.measured, warmup=warmup)
        self.selects = options.selects
        fifth = self.features[::SELECTION] if len(self.features) > SELECTION else self.features
        self.selection = metrics.Moments.from_features(fifth, extractor.sha256)
        if self.selects and self.count < extractor.width:
            what = f"{self.count} samples, fewer than the {extractor.width} features: chance decides"
            say(f"note: an average is selected by {what}; give more with --onestep.measured, if there are more images")
        seen = torch.linspace(0, len(self.real) - 1, min(len(self.real), PROBE)).round().long()
        self.seen, self.seen_labels = to_float(self.real[seen]), self.real_labels[seen]

    def measure(self, state: TrainingState, before: Values | None) -> Values:
        """All quantities in the module's docstring; keeps the average with the least distance, if one is selected."""
        counters, network = state.counters, state.averages[-1]
        teacher, critic = state.modules["teacher"], state.modules["critic"]
        assert isinstance(teacher, Network)
        assert isinstance(critic, Critic)
        values, look = self.look_at(network, teacher)
        if critic.ratio is not None:
            with torch.no_grad(), eager(), autocast(self.run.config.training, self.device):
                seen = self.encoded(teacher, self.seen)
                values |= self._critic(critic.ratio, look.held_out, seen, look.samples)
        if self.selects and look.moments is not None:
            distance = metrics.frechet_from_moments(self.selection, look.moments)
            if counters.best is None or distance < counters.best:
                counters.best, counters.best_images = distance, counters.images
                state.modules["best"].load_state_dict(network.state_dict())
        return values

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
