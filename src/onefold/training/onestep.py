"""One step: the training step of a one-step generator, and how a trained run becomes one.

    data → z = E(x) → critic learns data from samples → after its warm-up: G(ε) follows the critic's gradient → average

The generator is the network evaluated at t = 0: G(ε, y) = f(ε, 0, y). The critic compares its samples with the latents
that the teacher's encoder gives to data, so nothing but data is learned from (method `ratio`). What encodes and decodes
is the same network; a share of every batch keeps it as it was: D(z) at the image, E(x) at the teacher's latents.
"""

import filecmp
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from onefold.errors import UserError
from onefold.files import unfinished
from onefold.networks.base import Network
from onefold.objectives.self_distillation import reconstruction_error
from onefold.paths import Linear, noised, per_token
from onefold.pixels import mirrored
from onefold.sampling import Sampler
from onefold.training import ema
from onefold.training.config import Config, OneStep
from onefold.training.critic import CriticDraws, Duel
from onefold.training.engine import autocast
from onefold.training.optimizer import guarded_step, rate_factor, set_rates
from onefold.training.run import Run, load_run
from onefold.training.state import TrainingState

__all__ = [
    "GeneratorDraws",
    "check_teacher",
    "converted",
    "generator_inputs",
    "is_other_teacher",
    "keep_teacher",
    "onestep_of",
    "onestep_step",
    "teacher_of",
]


LENGTH = 0.75
"""Of a one-step run, as a share of its teacher's training …"""
WARMUP = 1 / 8
"""… and of its critic's warm-up, as a share of that."""
AVERAGED = 70
"""Half-life of the generator's average, in updates."""


class GeneratorDraws(NamedTuple):
    """The randomness of one batch of B samples and of their comparison with data."""

    eps: Float[Tensor, "B N D"]
    s: Float[Tensor, " B"]
    """Times of the generator's inputs: 0, but for those that are noised data."""
    mirrored: Bool[Tensor, " B"]
    unlabelled: Bool[Tensor, " B"]
    critic: CriticDraws


def onestep_step(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> dict[str, Tensor]:
    """One update of the critic on images x (B, C, H, W) with labels y (B,), and of the generator when it is its turn.

    An update whose gradient is not finite is skipped, and with the critic's that of the generator: neither weights nor
    the optimisers' state change, and the averages go on towards weights that stood still. The device alone decides
    that; the host does not wait for it. Returns the parts of the losses and the norms of the gradients before clipping,
    still on the device.
    """
    options, duel = _of(state, config)
    training, counters = config.training, state.counters
    moves = generator_moves(counters.images, len(x), options)
    _set_rates(state, config, options)
    random = state.generator(training.seed, x.device)
    parts = _critic_gradient(state, x, y, _draw(state, x, config, random), config)
    parts["critic_norm"], skipped = guarded_step(duel.critic, [duel.optimizer], training.clip)
    if moves:
        levels, before = duel.critic.levels.means, duel.critic.levels.means.clone()
        parts |= _generator_gradient(state, x, y, _draw(state, x, config, random), config)
        parts["gradient_norm"], skipped = guarded_step(state.network, state.optimizers, training.clip, skip=skipped)
        levels.copy_(torch.where(skipped, before, levels))
        counters.generator_updates += 1
        seen = counters.generator_updates * training.batch
        for average, half_life in zip(state.averages, training.ema_half_lives, strict=True):
            ema.update(average, state.network, ema.decay(half_life, training.ema_ramp, seen, training.batch))
    state.skips.count(skipped, whole=moves or counters.images < options.critic_warmup)
    counters.images += len(x)
    return parts


def generator_moves(images: int, batch: int, options: OneStep) -> bool:
    """Whether the step that begins after `images` images updates the generator too."""
    return images >= options.critic_warmup and (images // batch + 1) % options.critic_updates == 0


def _of(state: TrainingState, config: Config) -> tuple[OneStep, Duel]:
    """What a one-step run has, and others have not."""
    assert config.onestep is not None, "not a one-step run"
    assert state.duel is not None, "a state without its teacher"
    return config.onestep, state.duel


def _set_rates(state: TrainingState, config: Config, options: OneStep) -> None:
    """The critic's rate follows the run's schedule, the generator's begins when it moves."""
    images, training = state.counters.images, config.training
    moving = replace(training, images=max(1, training.images - options.critic_warmup))
    set_rates(state.optimizers, max(0, images - options.critic_warmup), moving)
    assert state.duel is not None
    for group in state.duel.optimizer.param_groups:
        group["lr"] = options.critic_rate * rate_factor(images, training)


# --- losses -----------------------------------------------------------------------------------------------------------


def _draw(state: TrainingState, x: Tensor, config: Config, random: torch.Generator) -> GeneratorDraws:
    options, duel = _of(state, config)
    network, batch = config.network, len(x)
    shape = (batch, network.tokens, network.latent_channels)

    def uniform() -> Tensor:
        return torch.rand(batch, generator=random, device=random.device)

    return GeneratorDraws(
        eps=torch.randn(shape, generator=random, device=random.device),
        s=torch.where(uniform() < options.renoised, uniform(), 0.0),
        mirrored=(uniform() < 0.5) & config.objective.flip,
        unlabelled=uniform() < config.objective.label_dropout,
        critic=duel.critic.draw(shape, random),
    )


def generator_inputs(z: Float[Tensor, "B N D"], draws: GeneratorDraws) -> Float[Tensor, "B N D"]:
    """Noise, or where s > 0 noised data z."""
    return noised(Linear(), z, draws.eps, per_token(draws.s))


def _labels(y: Tensor, draws: GeneratorDraws, config: Config) -> Int64[Tensor, " B"] | None:
    """Labels, a share of them "no class"; the same for data and samples."""
    classes = config.network.classes
    return y.masked_fill(draws.unlabelled, classes) if classes else None


def _micro_batches(batch: int, config: Config) -> list[slice]:
    size = config.training.micro_batch or batch
    return [slice(k, min(k + size, batch)) for k in range(0, batch, size)]


def _part(draws: GeneratorDraws, part: slice) -> GeneratorDraws:
    """The draws of some of the batch's images."""
    critic = CriticDraws(*(type(noise)(*(value[part] for value in noise)) for noise in draws.critic))
    return GeneratorDraws(*(value[part] for value in draws[:-1]), critic)  # type: ignore[arg-type]


def _critic_gradient(
    state: TrainingState, x: Tensor, y: Tensor, draws: GeneratorDraws, config: Config
) -> dict[str, Tensor]:
    """Add the gradient of the critic's mean loss, micro-batch by micro-batch; returns its parts."""
    _, duel = _of(state, config)
    means: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=x.device))
    for part in _micro_batches(len(x), config):
        own, share = _part(draws, part), len(x[part]) / len(x)
        labels = _labels(y[part], own, config)
        with autocast(config.training, x.device):
            with torch.no_grad():
                z = duel.teacher.encode(mirrored(x[part], own.mirrored))
                fake = state.network.denoise(generator_inputs(z, own), own.s, labels)
            loss, parts = duel.critic.loss(z, fake, labels, own.critic)
        (share * loss).backward()
        for name, value in parts.items():
            means[name] = means[name] + share * value
    return dict(means)


def _generator_gradient(
    state: TrainingState, x: Tensor, y: Tensor, draws: GeneratorDraws, config: Config
) -> dict[str, Tensor]:
    """Add the gradient of the generator's mean loss, micro-batch by micro-batch; returns norms and errors.

    The critic gives a gradient g at each sample; Σ g·G(ε) then has the wanted gradient in the weights. It is taken per
    number, as all losses are.
    """
    (options, duel), network = _of(state, config), state.network
    count = _kept_in_all(len(x), options.codec_share) if network.shares_codec else 0
    means: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=x.device))
    for part in _micro_batches(len(x), config):
        own, share = _part(draws, part), len(x[part]) / len(x)
        labels = _labels(y[part], own, config)
        image = mirrored(x[part], own.mirrored)
        kept = _kept(count, len(x), part, x.device)
        with autocast(config.training, x.device):
            with torch.no_grad():
                z = duel.teacher.encode(image) if len(kept) or options.renoised else torch.zeros_like(own.eps)
            inputs = generator_inputs(z, own)
            if len(kept):
                x_hat, fake = network.decode_and_denoise(z[kept], inputs, own.s, labels)
            else:
                x_hat, fake = None, network.denoise(inputs, own.s, labels)
            slope = duel.critic.gradient(duel.teacher, fake.detach(), labels, own.critic)
            loss = share * (slope * fake).mean()
            parts = {"slope": share * slope.square().mean().sqrt()}
            if x_hat is not None:
                own_share = len(kept) / count
                error = reconstruction_error(x_hat, image[kept], config.objective.reconstruction)
                parts["decoding"] = own_share * error
                parts["encoding"] = own_share * (network.encode(image[kept]) - z[kept]).square().mean()
                loss = loss + options.codec_weight * (parts["decoding"] + parts["encoding"])
        loss.backward()
        for name, value in parts.items():
            means[name] = means[name] + value.detach()
    return dict(means)


def _kept_in_all(batch: int, share: float) -> int:
    """So many images are a share of a batch; at least one of any share."""
    return max(1, round(share * batch)) if share else 0


def _kept(count: int, batch: int, part: slice, device: torch.device) -> Int64[Tensor, " k"]:
    """Of `count` images, evenly spread over a batch, those in a micro-batch, by their places there.

    Computed on the device, since the host would wait for it while copying a list there.
    """
    first, last = (-(-place * count // batch) for place in (part.start, part.stop))
    return torch.arange(first, last, device=device) * batch // max(1, count) - part.start


# --- from a run to a one-step run -------------------------------------------------------------------------------------


def converted(folder: Path, *, images: int | None = None, batch: int | None = None) -> Config:
    """The configuration that makes a one-step generator of a trained run, on whatever device there is now.

    Args:
        folder: The trained run, the teacher.
        images: Length of the training.
        batch: Images of a step; default: the teacher's.

    Raises:
        UserError: not a run, or one whose diffusion model is not finished, or that is a one-step generator already.
    """
    run = load_run(folder)
    check_teacher(run)
    config = onestep_of(run.config, images=images, batch=batch)
    anew = {"training.precision": "auto", "training.compile": "auto"}  # the teacher's were decided on its device
    return config.with_changes({"onestep.teacher": str(folder), **anew})


def onestep_of(config: Config, *, images: int | None = None, batch: int | None = None) -> Config:
    """The same for a configuration: what stays, what follows from being a one-step run.

    Adam without momentum and without weight decay, at a constant rate that falls at the end, from weights that are
    good already; the average has a half-life of `AVERAGED` updates of the generator. All lengths follow from the
    teacher's, or from `images`, and are whole batches.
    """
    batch = batch or config.training.batch
    images = images or batch * max(2, round(LENGTH * config.training.images / batch))
    options = OneStep(critic_warmup=batch * max(1, round(WARMUP * images / batch)))
    training = replace(
        config.training,
        optimizer="adamw",
        images=images,
        batch=batch,
        learning_rate=2e-4,
        betas=(0.0, 0.99),
        weight_decay=0.0,
        warmup=0,
        decay=0.3,
        ema_half_lives=(AVERAGED * batch,),
        ema_ramp=1.0,
        health_every=50 * batch,
    )
    return replace(config, training=training, onestep=options, sampler=Sampler(steps=1, solver="renoise"))


def check_teacher(run: Run) -> Network:
    """The network of a run that can teach.

    Raises:
        UserError: the run is unfinished, or a one-step generator already.
    """
    if run.config.onestep is not None:
        raise UserError(f"{run.folder}: is a one-step generator already; give the run that it came from")
    seen = run.history[-1]["images"] if run.history else 0
    if seen < run.config.training.images:
        raise UserError(
            f"{run.folder}: its diffusion model is not finished ({seen:,} of {run.config.training.images:,} images); "
            f"train it on with `onefold train … --out {run.folder} --resume`"
        )
    return run.network


def teacher_of(config: Config) -> Network:
    """The teacher that a one-step run is to begin from.

    Raises:
        UserError: a run that cannot teach, whose network is another than this run's, or that has fewer blocks than the
            critic wants.
    """
    options = config.onestep
    assert options is not None
    teacher = check_teacher(load_run(options.teacher))
    if teacher.config != config.network:
        kinds = [f"{(*n.image_size, n.channels)}, {n.classes} classes" for n in (teacher.config, config.network)]
        about = f"is for {kinds[0]}, this run's for {kinds[1]}" if kinds[0] != kinds[1] else "is not this run's"
        raise UserError(f"{options.teacher}: its network {about}; restore its data, or train a new one")
    if options.method == "ratio" or options.score.adversarial:
        try:
            teacher.backbone(options.critic_blocks)
        except UserError as error:
            raise UserError(f"onestep.critic_{error}") from None
    return teacher


def is_other_teacher(run: Run, folder: Path) -> bool:
    """Whether a folder holds a trained network other than the teacher that a one-step run has kept."""
    kept, given = (path / "model.safetensors" for path in (run.folder / "teacher", folder / "model"))
    return kept.is_file() and given.is_file() and not filecmp.cmp(kept, given, shallow=False)


def keep_teacher(run: Run) -> Network:
    """The teacher of a one-step run, whose model is copied into the run's folder when it is first needed."""
    kept = run.folder / "teacher"
    if not (kept / "config.json").is_file():
        temporary = unfinished(run.folder / "teacher")
        teacher_of(run.config).save_pretrained(temporary)
        shutil.rmtree(kept, ignore_errors=True)
        temporary.replace(kept)
    return Network.from_pretrained(kept).requires_grad_(False)
