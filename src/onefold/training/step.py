"""The training step: everything that changes weights, for every objective.

A step is a list of parts. Each has one loss for one or several modules, when it is its turn:

    draw → accumulate the gradient over micro-batches and ranks → balance → clip → finite? → optimizers → averages

A step does not make the host wait for the device: the host can prepare the next steps meanwhile, and learns of skipped
steps when it reads their count.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from onefold.objectives.losses import Draws
from onefold.training import ema
from onefold.training.config import Config, TrainingConfig
from onefold.training.engine import autocast, ranks
from onefold.training.optimizer import guarded_step, set_rates, total_norm
from onefold.training.phases import Part, phases_of
from onefold.training.sharding import is_sharded
from onefold.training.state import TrainingState

__all__ = ["Turn", "accumulate", "set_rates_of", "take_turn", "training_step"]

Gradients = list[Tensor | None]

LARGEST_WEIGHT = 100.0
"""Of a balanced loss. What has nearly no gradient has nothing to say: beyond this, it would be rounding."""


def training_step(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
    """One step on images x (B, C, H, W) in [−1, 1] with labels y (B,), by the parts of the current phase.

    With several ranks, x and y are this one's span of the batch; weights and all that is returned are the same in all.
    A module whose gradient is not finite is skipped, and so are the modules after it in the step: neither weights nor
    optimizer state change, and the averages continue towards the unchanged weights. This is decided on the device only.
    Returns the logged terms of the losses and the gradient norms before clipping, still on the device.
    """
    turn = Turn.at(state, config)
    set_rates_of(state, turn)
    rng = state.rng(config.training.seed, x.device)
    values = take_turn(state, turn, x, y, config.training, rng, turn.renewals)
    state.counters.images += turn.batch
    return values


@dataclass(frozen=True)
class Turn:
    """What the host decides of a step: parts and rates, which follow from the images seen."""

    parts: tuple[Part, ...]
    """The phase's parts that take part, in order."""
    whole: bool
    """Whether they train all that has begun to be trained."""
    rates: dict[str, float]
    """Of each trained module: the factor of its learning rates."""
    renewals: tuple[float, ...]
    """Of each average, part by part: the fraction of it that the step renews."""
    batch: int
    """Images of the step, of all ranks."""

    @classmethod
    def at(cls, state: TrainingState, config: Config) -> Self:
        """The step that begins where the state is."""
        phase, batch = phases_of(config)[state.counters.phase], config.training.batch
        images = state.counters.images - phase.start
        begun = [part for part in phase.parts if part.start <= images]
        parts = tuple(part for part in begun if part.has_turn(images, batch))
        rates: dict[str, float] = {}
        renewals: list[float] = []
        for part, trained in [(each, trained) for each in parts for trained in each.trains]:
            rates[trained.name] = trained.schedule.rate_factor(images - trained.start, batch)
            seen = batch * part.updates(images, batch, trained.start)
            renewals += [1 - trained.schedule.survival(half_life, seen, batch) for half_life in trained.half_lives]
        return cls(parts, _trained(parts) == _trained(begun), rates, tuple(renewals), batch)


def set_rates_of(state: TrainingState, turn: Turn) -> None:
    """Set the rates of all that a step trains."""
    for name, factor in turn.rates.items():
        set_rates(state.optimizers[name], factor)


def take_turn(
    state: TrainingState,
    turn: Turn,
    x: Tensor,
    y: Tensor,
    training: TrainingConfig,
    rng: torch.Generator,
    renewals: Sequence[float | Tensor],
) -> dict[str, Tensor]:
    """What a step does on the device, and all of it: no number passes from there to the host, or back."""
    left = iter(renewals)
    values: dict[str, Tensor] = {}
    skipped = torch.zeros((), dtype=torch.bool, device=x.device)
    for part in turn.parts:
        draws = part.draw(turn.batch, rng).part(*ranks().span(turn.batch))
        values |= accumulate(state, part, x, y, draws, training)
        for trained in part.trains:
            module, optimizers = state.modules[trained.name], state.optimizers[trained.name]
            values[trained.norm], skipped = guarded_step(module, optimizers, trained.schedule.clip, skip=skipped)
            for average in state.averages if trained.half_lives else ():
                ema.update(average, module, next(left))
        if part.finish is not None:
            part.finish(state.modules, skipped)
    state.skips.count(skipped, whole=turn.whole)
    return values


def _trained(parts: Sequence[Part]) -> set[str]:
    """Names of the modules that parts train."""
    return {trained.name for part in parts for trained in part.trains}


def accumulate(
    state: TrainingState, part: Part, x: Tensor, y: Tensor, draws: Draws, training: TrainingConfig
) -> dict[str, Tensor]:
    """Accumulate the gradient of a part's loss over micro-batches and ranks; returns the loss's logged terms.

    Only the modules that the part trains receive it: left in another, it would be added to that one's own. Gradients of
    balanced losses are kept apart until the whole batch has been seen.
    """
    modules = [state.modules[name] for name in part.modules]
    trained = [p for module in modules[: len(part.trains)] for p in module.parameters() if p.requires_grad]
    size = training.micro_batch or len(x)
    told: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=x.device))
    gradients: dict[str, Gradients] = {}
    multiples: dict[str, float] = {}
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        with autocast(training, x.device):
            losses = part.loss(*modules, x[start:stop], y[start:stop], draws.part(start, stop))
        for name, (multiple, loss) in losses.balanced.items():
            found = _gradients(loss, trained)
            gradients[name] = [*map(_sum, gradients.get(name, [None] * len(trained)), found)]
            multiples[name] = multiple
        if losses.total.requires_grad:  # not where a part of the batch has none of what the loss is about
            losses.total.backward(inputs=None if ranks().shards else trained)
        for name, value in losses.parts.items():
            told[name] = told[name] + value
    for module in modules[len(part.trains) :] if ranks().shards else ():
        module.zero_grad()
    if ranks().count > 1:
        told = _over_ranks(trained, told, gradients, multiples)
    return {**told, **_add_balanced(trained, gradients, multiples)}


def _gradients(loss: Tensor, trained: Sequence[nn.Parameter]) -> Gradients:
    """The gradient of a loss, apart from what there is already. Of sharded weights, only a whole backward pass finds it
    (see `sharding`).
    """
    if not ranks().shards:
        return [*torch.autograd.grad(loss, trained, allow_unused=True)]
    before = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    loss.backward()
    found = [p.grad for p in trained]
    for p, gradient in zip(trained, before, strict=True):
        p.grad = gradient
    return found


def _over_ranks(
    trained: Sequence[nn.Parameter],
    told: Mapping[str, Tensor],
    balanced: dict[str, Gradients],
    multiples: dict[str, float],
) -> dict[str, Tensor]:
    """Add up over ranks the gradients, in place, and what is told, which is returned. Of sharded weights, the backward
    pass has added them up.

    Ranks first agree on what there is: a loss may be of few images, and some spans have none of them.
    """
    group, gradients = ranks(), {"": [p.grad for p in trained], **balanced}
    places = {
        name: [k for k, each in enumerate(found) if each is not None and not is_sharded(each)]
        for name, found in gradients.items()
    }
    own = {"told": [*told], "places": places, "multiples": multiples}
    every = [json.loads(text) for text in group.texts(json.dumps(own))]
    for name in dict.fromkeys(name for each in every for name in each["places"]):
        there = sorted({k for each in every for k in each["places"].get(name, ())})
        found = gradients.get(name, [None] * len(trained))
        summed = group.sum([torch.zeros_like(trained[k]) if (g := found[k]) is None else g for k in there])
        gradients[name] = [each if is_sharded(each) else None for each in found]
        for k, gradient in zip(there, summed, strict=True):
            gradients[name][k] = gradient
    for p, gradient in zip(trained, gradients.pop(""), strict=True):
        p.grad = gradient
    balanced.update(gradients)
    for each in every:
        multiples.update(each["multiples"])
    names = [*dict.fromkeys(name for each in every for name in each["told"])]
    nothing = torch.zeros((), device=trained[0].device)
    return dict(zip(names, group.sum([told.get(name, nothing) for name in names]), strict=True))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@torch.no_grad()
def _add_balanced(
    trained: Sequence[nn.Parameter], balanced: Mapping[str, Gradients], multiples: Mapping[str, float]
) -> dict[str, Tensor]:
    """Add each balanced loss's gradient, scaled to its multiple of the norm that the total's has in the same weights.

    Returns the norm of each before scaling, `<name>_norm`, and its weight, `<name>_weight`.
    """
    told: dict[str, Tensor] = {}
    for name, gradients in balanced.items():
        own = _norm(gradients)
        total = _norm([p.grad for p, gradient in zip(trained, gradients, strict=True) if gradient is not None])
        weight = multiples[name] * total / own.clamp(min=multiples[name] * total / LARGEST_WEIGHT + 1e-30)
        told |= {f"{name}_norm": own, f"{name}_weight": weight}
    for name, gradients in balanced.items():
        for p, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                scaled = told[f"{name}_weight"] * gradient
                p.grad = scaled if p.grad is None else p.grad + scaled
    return told


def _norm(tensors: Gradients) -> Tensor:
    return total_norm([tensor for tensor in tensors if tensor is not None])
