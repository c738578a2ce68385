"""Health: what the loss does not show, measured on a fixed batch of test images throughout a run.

    x → z = E(x) → x̂ = D(z),     z_t = t·z + (1−t)·ε → ẑ = f(z_t, t, y)

with the online network and the same x, t and ε every time. Nothing that training reads is changed, neither weights and
gradients nor random numbers; the network runs uncompiled.

Keys, all of them scalars except for the two per channel, and null where not finite:

    channel_std                  of each channel, the root of its variance over images, averaged over positions
    latent_std                   mean of these over channels
    channel_mean, drift          mean of each channel; RMS distance of these means from the previous ones, in units of
                                 latent_std
    effective_rank(_whole)       of tokens; of whole latents
    image_rank_whole             of the images themselves, or the values per latent if these are fewer: what to expect
    prediction_rank(_whole)      of ẑ, whose target is z
    velocity_rank(_whole)        of v, whose target is z − ε with velocity_target_rank(_whole)
    psnr                         of x̂
    velocity_error, variance_term    the velocity loss, and the part of it that no denoiser can lower (see
                                 `objectives.diagnosis`)
    gradient_reconstruction, …_denoising, …_perceptual, …_variance, gradient_cosine
                                 gradient norms at the trunk of each weighted loss and of the variance term through the
                                 encoder, and the cosine of the first two; not for three networks, which share no trunk
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onefold import metrics
from onefold.alarm import CURE, collapse
from onefold.compute import eager
from onefold.data import Dataset, read_all
from onefold.networks import Network
from onefold.objectives.diagnosis import variance_term, velocity_of
from onefold.objectives.losses import Span, each_tensor
from onefold.objectives.self_distillation import DenoisingDraws, SelfDistillation, draw, self_distillation
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float
from onefold.training.config import Config
from onefold.training.engine import autocast
from onefold.training.monitor import Line, Monitor, Values
from onefold.training.run import Run
from onefold.training.state import TrainingState

__all__ = ["HealthMonitor", "Probe", "gradients", "latent_statistics", "measure", "probe"]

IMAGES = 128
"""Maximum number of test images measured on."""
GRADIENT_IMAGES = 16
"""Number of these that gradients are measured on."""
SEED = 2511_14716
WEIGHTS = {name: f"{name}_weight" for name in ("reconstruction", "denoising", "perceptual")}


class Probe(NamedTuple):
    """The fixed batch: images, labels, times and noise."""

    x: Float[Tensor, "B C H W"]
    y: Int64[Tensor, " B"]
    draws: DenoisingDraws

    def part(self, start: int, stop: int) -> "Probe":
        """Images `start` to `stop`, as a batch of its own."""
        draws = self.draws.part(start, stop)
        alone = Span(0, len(draws.t), len(draws.t))
        return Probe(self.x[start:stop], self.y[start:stop], draws._replace(span=alone))


class HealthMonitor(Monitor):
    """The health of the latents."""

    key = "health"
    alarm = "the latents collapse"
    cure = CURE

    def __init__(self, run: Run, test: Dataset, device: torch.device, *, warmup: int) -> None:
        """`warmup`: images of the run before which no alarm is raised."""
        super().__init__(run)
        self.batch, self.warmup = probe(test, run.config, device), warmup

    def measure(self, state: TrainingState, before: Values | None) -> Values:
        return measure(state.network, state.averages[0], self.batch, self.run.config, before)

    def judge(self, log: Sequence[Line]) -> str | None:
        return collapse(log, warmup=self.warmup)


def probe(test: Dataset, config: Config, device: torch.device) -> Probe:
    """The fixed batch of a run: images spread evenly over the test set, each with one t and ε as in the objective."""
    count = min(len(test), IMAGES)
    x, y = read_all(test, np.linspace(0, len(test) - 1, count).round().astype(np.int64))
    plain = replace(config.objective, draws=1, label_dropout=0.0, decoder_noise=0.0, flip=False, shift=0.0)
    shape = (config.network.tokens, config.network.latent_channels)
    draws = draw(plain, count, shape, torch.Generator().manual_seed(SEED))
    return Probe(to_float(x.to(device)), y.to(device), each_tensor(draws, lambda value: value.to(device)))


def measure(network: Network, target: Network, batch: Probe, config: Config, before: Values | None = None) -> Values:
    """All quantities in the module's docstring.

    Args:
        network: The online network.
        target: The objective's target network.
        batch: The fixed batch.
        config: The run's configuration.
        before: The previous measurement, for the drift.
    """
    training = config.training
    size = training.micro_batch or training.batch
    with eager(), autocast(training, batch.x.device):
        parts = [_roles(network, batch.part(k, k + size)) for k in range(0, len(batch.x), size)]
    z, x_hat, z_hat, z_t = (torch.cat(values).float() for values in zip(*parts, strict=True))
    shared: Values = {}
    if network.shares_codec and network.trunks and _finite(z):
        # A separate context: torch before 2.10 would reuse the weights that it cast without gradients above.
        with eager(), autocast(training, batch.x.device):
            shared = gradients(network, target, batch.part(0, min(GRADIENT_IMAGES, size)), config.objective)
    t = batch.draws.t.flatten()
    v, v_target = velocity_of(z_hat, z_t, t), velocity_of(z, z_t, t)
    values = latent_statistics(z, before)
    values["image_rank_whole"] = _rank(batch.x.flatten(1), at_most=z[0].numel())
    for name, latents in {"effective": z, "prediction": z_hat, "velocity": v, "velocity_target": v_target}.items():
        values[f"{name}_rank"] = _rank(latents.flatten(0, 1))
        values[f"{name}_rank_whole"] = _rank(latents.flatten(1))
    values["psnr"] = metrics.psnr(x_hat, batch.x) if _finite(x_hat) else None
    values["velocity_error"] = (v - v_target).square().mean().item()
    values["variance_term"] = variance_term(z, t).item() if _finite(z) else None
    return {name: _rounded(value) for name, value in {**values, **shared}.items()}


@torch.no_grad()
def _roles(network: Network, batch: Probe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, x̂, ẑ, z_t)."""
    z = network.encode(batch.x)
    t = batch.draws.t.flatten()
    z_t = noised(Linear(), z, batch.draws.eps.flatten(0, 1), per_token(t))
    return z, network.decode(z), network.denoise(z_t, t, batch.y if network.config.classes else None), z_t


def latent_statistics(z: Float[Tensor, "B N D"], before: Mapping[str, Any] | None = None) -> Values:
    """Standard deviation over images and mean of each channel, and the drift of the means since `before`.

    The deviation is taken at each position: latents that encode where a token is but not what it shows have none.
    """
    z = z.cpu().double()
    std = (z - z.mean(0)).square().mean((0, 1)).sqrt()
    mean = z.mean((0, 1))
    if len(z) == 1:
        std = torch.full_like(std, torch.nan)
    values: Values = {"latent_std": std.mean().item(), "channel_std": std.tolist(), "channel_mean": mean.tolist()}
    if before and None not in before["channel_mean"]:
        moved = (mean - torch.tensor(before["channel_mean"], dtype=torch.float64)).square().mean().sqrt()
        values["drift"] = (moved / std.mean()).item()
    return values


def gradients(network: Network, target: Network, batch: Probe, objective: SelfDistillation) -> Values:
    """Norms at the trunk of the gradients of each weighted loss and of the variance term, and the losses' cosine."""
    trunk = [p for part in network.trunks for p in part.parameters()]
    none = dict.fromkeys(WEIGHTS.values(), 0.0)

    def gradient(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, trunk, materialize_grads=True))

    found: dict[str, list[Tensor]] = {}
    for name, weight in WEIGHTS.items():
        if getattr(objective, weight):
            alone = replace(objective, **{**none, weight: getattr(objective, weight)})
            loss = self_distillation(network, target, batch.x, batch.y, batch.draws, alone).total
            found[name] = gradient(loss)
    found["variance"] = gradient(variance_term(network.encode(batch.x), batch.draws.t.flatten()))
    values = {f"gradient_{name}": math.sqrt(_dot(own, own)) for name, own in found.items()}
    if "reconstruction" in found and "denoising" in found:
        both = values["gradient_reconstruction"] * values["gradient_denoising"]
        values["gradient_cosine"] = _dot(found["reconstruction"], found["denoising"]) / both if both else math.nan
    return values


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum().item()


def _rank(rows: Float[Tensor, "n d"], at_most: float = math.inf) -> float | None:
    """Effective rank, if it is defined."""
    return min(metrics.effective_rank(rows), at_most) if len(rows) > 1 and _finite(rows) else None


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _rounded(value: float | list[float] | None) -> float | list[float | None] | None:
    """Six significant digits; null where not finite."""
    return [_number(item) for item in value] if isinstance(value, list) else _number(value)


def _number(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
