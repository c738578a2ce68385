"""The phase in which one network learns everything at once: encoder, denoiser, decoder and one-step generator.

Where the generator has an exit to pixels, that learns, too.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold import metrics
from onefold.data import Dataset
from onefold.errors import UserError
from onefold.extractor import known_extractor
from onefold.networks import Network, build
from onefold.networks.jump import RANK, Jump, change_flops, exit_flops
from onefold.objectives.losses import Losses
from onefold.objectives.one_run import OneRunDraws, draw, one_run
from onefold.sampling import Sampler, check_guidance
from onefold.training.config import Config
from onefold.training.generator_monitor import GeneratorMonitor
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.monitor import Monitor
from onefold.training.optimizer import RMSPropW
from onefold.training.phases import Part, Say, Trained, register
from onefold.training.run import Run

__all__ = ["OneRunPhase", "with_one_step"]

BETA = 0.99
"""Of their second moment; there is no first."""
BEGIN = 0.35
"""When generator and student begin, as a fraction of the run, unless `onerun.begin` says it."""
UNSETTLED = 0.25
"""Part of the generator's training before its samples are judged: it begins as a denoiser, whose one step is a mean."""


def with_one_step(config: Config) -> Config:
    """The configuration with one-step generation learned in the same run; `onerun.begin` follows from its length.

    Raises:
        UserError: phases of another kind.
    """
    if config.phases not in ((), ("one_run",)):
        raise UserError(f"--one-step: cannot go with --phases {' '.join(config.phases)}; leave one out")
    rank, paints = config.network.jump_rank or RANK, config.network.kind.paints
    network = replace(config.network, jump_rank=rank, jump_exit=paints)
    begin = _whole(BEGIN * config.training.images, config) if config.onerun.begin is None else config.onerun.begin
    return replace(config, network=network, onerun=replace(config.onerun, begin=begin), phases=("one_run",))


def _whole(images: float, config: Config) -> int:
    """So many images as whole batches."""
    return config.training.batch * round(images / config.training.batch)


@register("one_run")
class OneRunPhase(SelfDistillationPhase):
    """Self-distillation, with a generator and its student from `onerun.begin` on; see `objectives.one_run`."""

    def __init__(self, config: Config, index: int, start: int) -> None:
        super().__init__(config, index, start)
        kind = config.network.kind
        if kind.learns_codec and not kind.shares_codec:
            raise UserError(
                f"phases: one_run trains codec and denoiser together, and {kind.__name__} has them apart; "
                "leave --architecture out, or convert its run with `onefold onestep`"
            )
        if not config.network.jump_rank:
            raise UserError(
                "network.jump_rank: 0 leaves the generator no weights of its own to learn in one run; "
                f"give a rank, such as {RANK}"
            )
        if not kind.has_jump():
            raise UserError(
                f"phases: one_run needs a network with its own jump, and {kind.__name__} defines no generate_with; "
                "define it, or train without --one-step"
            )
        if self.begin >= self.schedule.images:
            raise UserError(f"onerun.begin: {self.begin:,} images leave none of {self.schedule.images:,}; give fewer")
        check_guidance(config.onerun.guidance, config.network.classes)

    @property
    def begin(self) -> int:
        """Images of the phase before generator and student begin to learn."""
        begin = self.config.onerun.begin
        return _whole(BEGIN * self.schedule.images if begin is None else begin, self.config)

    @cached_property
    def parts(self) -> Sequence[Part]:
        options, schedule, reads = self.config.onerun, self.schedule, ("average-0",)
        network = Trained("network", self.optimizers, schedule, schedule.ema_half_lives)
        own = replace(schedule, warmup=0, decay=options.decay)
        student = Trained("student", partial(without_momentum, options.student_rate), own, norm="student_norm")
        generator = Trained("generator", partial(without_momentum, options.generator_rate), own, norm="generator_norm")
        exit = Trained("exit", partial(without_momentum, options.student_rate), own, norm="exit_norm")
        trains = (student, generator, exit) if self.config.network.jump_exit else (student, generator)
        few = {"onerun.share": max(1, round(options.share * self.config.training.batch))}
        beside = Part(trains, reads, self.draw_beside, self.loss_beside, start=self.begin, finish=hand_over, few=few)
        return Part((network,), reads, self.draw, self.loss), *[beside] * options.updates

    def modules(self, network: Network) -> dict[str, nn.Module]:
        """Also the student; and generator and exit, which the network receives after each step, and so its averages."""
        found = super().modules(network)
        generator = copy.deepcopy(network.jump).requires_grad_(True)
        student = Jump(network.denoising_trunk, self.config.network.jump_rank).to(network.device)
        found |= {"generator": generator, "student": student}
        if self.config.network.jump_exit:
            found["exit"] = copy.deepcopy(network.get_submodule("jump_exit")).requires_grad_(True)
        return found

    def begin_from(self, source: Network) -> Network:
        """The network with the weights of another; generator and student begin anew, as changes of it."""
        network = super().begin_from(source)
        fresh = build(self.config.network).state_dict()
        own = {name: value for name, value in fresh.items() if name.startswith("jump")}
        network.load_state_dict({**network.state_dict(), **own})
        return network

    def draw_beside(self, batch: int, rng: torch.Generator) -> OneRunDraws:
        network, config = self.config.network, self.config
        shape = network.tokens, network.latent_channels
        return draw(config.onerun, config.objective.label_dropout, batch, shape, rng)

    def loss_beside(self, student: Jump, generator: Jump, *others: Any) -> Losses:
        """`others`: the exit, if there is one; average, x, y, draws."""
        *exit, average, _, y, draws = others
        return one_run(student, generator, average, y, draws, self.config.onerun, *exit)

    @property
    def sampler(self) -> Sampler:
        """One step, or as many as configured for a one-step generator, from the time that it is trained for."""
        own = self.config.sampler
        return replace(own if own.jumps else Sampler(1, "refine"), start=self.config.onerun.start)

    def monitors(self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Say) -> Sequence[Monitor]:
        options = self.config.onerun
        settled = self.start + self.begin + round(UNSETTLED * (self.schedule.images - self.begin))
        features = options.features
        extractor = metrics.from_file(features, device=device) if features else known_extractor(data, device)
        if extractor is None:  # to train one may take longer than the first picture
            say(
                "note: no classifier of these images yet, so the log has no distance of one-step samples to them; "
                "`onefold evaluate` makes one, or give --onerun.features"
            )
        own = GeneratorMonitor(run, data, test, device, extractor, measured=options.measured, warmup=settled)
        return *super().monitors(run, data, test, device, say), own

    def flops(self) -> float:
        """As of self-distillation; of samples and student, each with its gradient, of the data's score and the exit."""
        options, training = self.config.onerun, self.config.training
        role, network = self._role_flops, self.config.network
        each = (6 + (1 if options.guidance == 1 else 2)) * role.denoise
        if network.jump_exit:  # only the exit has a gradient, and decoding has none
            each += role.decode + 3 * exit_flops(network.tokens, network.width, network.patch**2 * network.channels)
        changes = (
            6 * change_flops(network.width, network.depth, network.jump_rank) / (training.micro_batch or training.batch)
        )
        images = self.schedule.images
        return (
            super().flops() + options.updates * (options.share * each + changes) * max(0, images - self.begin) / images
        )


def without_momentum(rate: float, module: nn.Module) -> list[Optimizer]:
    """The optimizer of generator or student: the target of each moves with every update of the other."""
    return [RMSPropW(module.parameters(), lr=rate, beta=BETA, weight_decay=0.0)]


@torch.no_grad()
def hand_over(modules: Mapping[str, nn.Module], skipped: Bool[Tensor, ""]) -> None:
    """Copy generator and exit into the network, of which averages are taken: at the next step, so they lag by one."""
    network = modules["network"]
    pairs = [("jump", "generator"), *([("jump_exit", "exit")] if "exit" in modules else [])]
    for place, name in pairs:
        for own, new in zip(network.get_submodule(place).parameters(), modules[name].parameters(), strict=True):
            own.copy_(new)
