"""The training step: everything that changes weights, for every objective.

A step is a list of parts. Each trains one module with one loss, when it is its turn:

    draw → accumulate the gradient over micro-batches → clip → finite? → optimizers → averages

A step does not make the host wait for the device: the host can prepare the next steps meanwhile, and learns of skipped
steps when it reads their count.
"""

from collections import defaultdict

import torch
from torch import Tensor

from onefold.objectives.losses import Draws
from onefold.training import ema
from onefold.training.config import Config, TrainingConfig
from onefold.training.engine import autocast
from onefold.training.optimizer import guarded_step, set_rates
from onefold.training.phases import Part, phases_of
from onefold.training.state import TrainingState

__all__ = ["accumulate", "training_step"]


def training_step(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
    """One step on images x (B, C, H, W) in [−1, 1] with labels y (B,), by the parts of the current phase.

    A part whose gradient is not finite is skipped, and so are the parts after it in the step: neither weights nor
    optimizer state change, and the averages continue towards the unchanged weights. This is decided on the device only.
    Returns the logged terms of the losses and the gradient norms before clipping, still on the device.
    """
    phase = phases_of(config)[state.counters.phase]
    batch, images = len(x), state.counters.images - phase.start
    rng = state.rng(config.training.seed, x.device)
    begun = [part for part in phase.parts if part.start <= images]
    turn = [part for part in begun if part.has_turn(images, batch)]
    values: dict[str, Tensor] = {}
    skipped = torch.zeros((), dtype=torch.bool, device=x.device)
    for part in turn:
        module, optimizers = state.modules[part.name], state.optimizers[part.name]
        set_rates(optimizers, part.schedule.rate_factor(images - part.start, batch))
        values |= accumulate(state, part, x, y, part.draw(batch, rng), config.training)
        values[part.norm], skipped = guarded_step(module, optimizers, part.schedule.clip, skip=skipped)
        if part.finish is not None:
            part.finish(state.modules, skipped)
        seen = batch * part.updates(images, batch)
        for average, half_life in zip(state.averages, part.half_lives, strict=bool(part.half_lives)):
            ema.update(average, module, part.schedule.survival(half_life, seen, batch))
    state.skips.count(skipped, whole=len(turn) == len(begun))
    state.counters.images += batch
    return values


def accumulate(
    state: TrainingState, part: Part, x: Tensor, y: Tensor, draws: Draws, training: TrainingConfig
) -> dict[str, Tensor]:
    """Accumulate the gradient of a part's loss over micro-batches; returns the loss's logged terms.

    Only the module that the part trains receives it: left in another, it would be added to that one's own.
    """
    modules = [state.modules[name] for name in part.modules]
    trained = [p for p in modules[0].parameters() if p.requires_grad]
    size = training.micro_batch or len(x)
    told: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=x.device))
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        with autocast(training, x.device):
            losses = part.loss(*modules, x[start:stop], y[start:stop], draws.part(start, stop))
        losses.total.backward(inputs=trained)
        for name, value in losses.parts.items():
            told[name] = told[name] + value
    return dict(told)
