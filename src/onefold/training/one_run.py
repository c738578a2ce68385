"""The phase in which one network learns everything at once: encoder, denoiser, decoder and one-step generator."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold.data import Dataset
from onefold.errors import UserError
from onefold.networks import Network
from onefold.networks.jump import Jump
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

RANK = 16
"""Rank of what generator and student change in the trunk's matrices, unless the network specifies it."""
BETA = 0.99
"""Of their second moment; there is no first: the target of each moves with every update of the other."""
UNSETTLED = 0.25
"""Part of the generator's training before its samples are judged: it begins as a denoiser, whose one step is a mean."""


def with_one_step(config: Config) -> Config:
    """The configuration with one-step generation learned in the same run."""
    network = replace(config.network, jump_rank=config.network.jump_rank or RANK)
    return replace(config, network=network, phases=("one_run",))


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
        check_guidance(config.onerun.guidance, config.network.classes)

    @property
    def begin(self) -> int:
        """Images of the phase before generator and student begin to learn."""
        batch = self.config.training.batch
        return batch * round(self.config.onerun.begin * self.schedule.images / batch)

    @cached_property
    def parts(self) -> Sequence[Part]:
        options, schedule, reads = self.config.onerun, self.schedule, ("average-0",)
        network = Trained("network", self.optimizers, schedule, schedule.ema_half_lives)
        own = replace(schedule, warmup=0, decay=options.decay)
        student = Trained("student", self.student_optimizers, own, norm="student_norm")
        generator = Trained("generator", self.generator_optimizers, own, norm="generator_norm")
        beside = Part(
            (student, generator), reads, self.draw_beside, self.loss_beside, start=self.begin, finish=hand_over
        )
        return Part((network,), reads, self.draw, self.loss), *[beside] * options.updates

    def student_optimizers(self, student: nn.Module) -> list[Optimizer]:
        return [RMSPropW(student.parameters(), lr=self.config.onerun.student_rate, beta=BETA, weight_decay=0.0)]

    def generator_optimizers(self, generator: nn.Module) -> list[Optimizer]:
        return [RMSPropW(generator.parameters(), lr=self.config.onerun.generator_rate, beta=BETA, weight_decay=0.0)]

    def modules(self, network: Network) -> dict[str, nn.Module]:
        """Also the generator, which the network receives after each step, and so do its averages; and its student."""
        found = super().modules(network)
        generator = copy.deepcopy(network.jump).requires_grad_(True)
        student = Jump(network.denoising_trunk, self.config.network.jump_rank).to(network.device)
        return {**found, "generator": generator, "student": student}

    def draw_beside(self, batch: int, rng: torch.Generator) -> OneRunDraws:
        network, config = self.config.network, self.config
        shape = network.tokens, network.latent_channels
        return draw(config.onerun, config.objective.label_dropout, batch, shape, rng)

    def loss_beside(
        self, student: Jump, generator: Jump, average: Network, x: Tensor, y: Tensor, draws: OneRunDraws
    ) -> Losses:
        return one_run(student, generator, average, y, draws, self.config.onerun)

    @property
    def sampler(self) -> Sampler:
        """One step, or as many as configured for a one-step generator, from the time that it is trained for."""
        own = self.config.sampler
        return replace(own if own.jumps else Sampler(1, "refine"), start=self.config.onerun.start)

    def monitors(self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Say) -> Sequence[Monitor]:
        options = self.config.onerun
        settled = self.start + self.begin + round(UNSETTLED * (self.schedule.images - self.begin))
        measured, features = options.measured, options.features
        own = GeneratorMonitor(run, data, test, device, say, measured=measured, features=features, warmup=settled)
        return *super().monitors(run, data, test, device, say), own

    def flops(self) -> float:
        """As of self-distillation; of samples and student, each with its gradient, and of the data's score."""
        options, images = self.config.onerun, self.schedule.images
        passes = 6 + (1 if options.guidance == 1 else 2)
        samples = options.updates * options.share * max(0, images - self.begin) / images
        return super().flops() + samples * passes * self._role_flops.denoise


@torch.no_grad()
def hand_over(modules: Mapping[str, nn.Module], skipped: Bool[Tensor, ""]) -> None:
    """Copy the generator into the network, of which the averages are taken."""
    network, generator = modules["network"], modules["generator"]
    assert isinstance(network, Network)
    for own, new in zip(network.jump.parameters(), generator.parameters(), strict=True):
        own.copy_(new)
