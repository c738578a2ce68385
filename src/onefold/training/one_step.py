"""The phase in which a trained network becomes a one-step generator.

    critic  →  after its warm-up: critic and generator  →  average

Both start from the weights of the network that the phase begins with, the teacher, which does not change. With a
`network.jump_rank`, only low-rank changes of it learn to generate (`networks.jump`), and a student is another such
change; encoder, denoiser and decoder stay the teacher's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

from onefold.data import Dataset
from onefold.data.messages import count_text
from onefold.errors import UserError
from onefold.networks import Network, NetworkConfig, RatioNet, build
from onefold.networks.jump import Jump, change_flops
from onefold.objectives.density_ratio import DensityRatio
from onefold.objectives.losses import Losses
from onefold.objectives.one_step import (
    Critic,
    OneStep,
    OneStepDraws,
    Weights,
    critic_loss,
    draw,
    one_step_loss,
)
from onefold.objectives.score_distillation import ScoreDistillation
from onefold.sampling import Sampler, check_guidance
from onefold.schedule import Schedule
from onefold.training import ema
from onefold.training.config import Config
from onefold.training.engine import ranks
from onefold.training.monitor import Monitor
from onefold.training.one_step_monitor import OneStepMonitor
from onefold.training.optimizer import RMSPropW
from onefold.training.phases import Part, Phase, Say, Trained, averaged, register
from onefold.training.run import Run

__all__ = ["OneStepPhase", "changeable", "freeze_matrices", "fresh_critic", "start_from"]

CRITIC_BETA = 0.99
"""Of the second moment; there is no first: the critic's target changes with every update of the generator."""


@register("one_step")
class OneStepPhase(Phase):
    """Critic and generator; see `objectives.one_step`."""

    def __init__(self, config: Config, index: int, start: int) -> None:
        super().__init__(config, index, start)
        options, images = config.onestep, self.schedule.images
        if options.critic_warmup >= images:
            raise UserError(
                f"onestep.critic_warmup: {options.critic_warmup:,} images leave none of {images:,} for the generator; "
                "give a shorter warm-up or more --images"
            )
        if not options.has_ratio and options.ratio != DensityRatio():
            raise UserError(f"onestep.ratio: has no effect with --method {options.method}; add --method ratio")
        if options.method == "ratio" and options.score != ScoreDistillation():
            raise UserError("onestep.score: has no effect with --method ratio; add --method score or dmd")
        if options.method != "ratio":
            check_guidance(options.score.guidance, config.network.classes)
        begins = options.generator, options.generator_trains
        if config.network.kind.learns_codec and begins != ("teacher", "all"):
            raise UserError(
                "onestep.generator: with weights other than the teacher's, its decoder would be lost; start from a "
                "run in pixels (onefold train … --architecture pixels), with --rank 0"
            )
        if config.network.jump_rank:
            self._check_rank()
        self._check_effect()

    def _check_rank(self) -> None:
        """Refuse what a generator that is a low-rank change cannot have."""
        options, kind = self.config.onestep, self.config.network.kind
        if not kind.has_jump():
            raise UserError(f"network.jump_rank: {kind.__name__} defines no generate_with; give --rank 0")
        fixed = {"generator": "teacher", "generator_trains": "all"}
        fixed |= {} if options.method == "ratio" else {"critic": "teacher", "critic_trains": "all"}
        for name, only in fixed.items():
            if getattr(options, name) != only:
                raise UserError(
                    f"onestep.{name}: {getattr(options, name)} needs all weights to learn, not only changes of rank "
                    f"{self.config.network.jump_rank}; add --rank 0"
                )

    def _check_effect(self) -> None:
        """Refuse options of what does not learn."""
        options, usual = self.config.onestep, OneStep()
        by_rank = self.config.network.jump_rank > 0
        idle = {"upkeep": by_rank, "upkeep_share": by_rank, "critic_rate": by_rank and not options.has_ratio}
        idle["student_rate"] = not by_rank or options.method == "ratio"
        for name, without in idle.items():
            if without and getattr(options, name) != getattr(usual, name):
                rate = name == "student_rate"
                cure = "it is that of a student of low rank" if rate else "add --rank 0, so that all weights learn"
                raise UserError(f"onestep.{name}: has no effect here; {cure}")

    @classmethod
    def schedule_of(cls, config: Config) -> Schedule:
        return config.onestep.schedule or config.training

    @cached_property
    def parts(self) -> Sequence[Part]:
        options, schedule = self.config.onestep, self.schedule
        kept = options.kept(self.config.training.batch, self.config.network.jump_rank)
        of_generator = replace(schedule, images=max(1, schedule.images - options.critic_warmup))
        critic = Trained("critic", self.critic_optimizers, schedule, norm="critic_norm")
        generator = Trained(
            "network", self.optimizers, of_generator, schedule.ema_half_lives, start=options.critic_warmup
        )
        both = Part(
            (critic, generator),
            ("teacher",),
            self.draw,
            self.loss,
            start=options.critic_warmup,
            every=options.critic_updates,
            finish=move_levels,
            few={"onestep.upkeep_share": kept} if kept else {},
        )
        return Part((critic,), ("network", "teacher"), self.draw, self.critic_loss, unless=both), both

    def draw(self, batch: int, rng: torch.Generator) -> OneStepDraws:
        network = self.config.network
        latent_shape = network.tokens, network.latent_channels
        return draw(self.config.onestep, self.config.objective, batch, latent_shape, rng)

    def critic_loss(
        self, critic: Critic, generator: Network, teacher: Network, x: Tensor, y: Tensor, draws: OneStepDraws
    ) -> Losses:
        return critic_loss(critic, generator, teacher, x, y, draws, self.config.onestep, self.config.objective)

    def loss(
        self, critic: Critic, generator: Network, teacher: Network, x: Tensor, y: Tensor, draws: OneStepDraws
    ) -> Losses:
        return one_step_loss(critic, generator, teacher, x, y, draws, self.config.onestep, self.config.objective)

    def critic_optimizers(self, critic: nn.Module) -> list[Optimizer]:
        assert isinstance(critic, Critic)
        options, scale = self.config.onestep, [] if critic.ratio is None else [*critic.ratio.scale.parameters()]
        change = [*critic.student.parameters()] if isinstance(critic.student, Jump) else []
        apart = {id(p) for p in (*scale, *change)}
        rest = [p for p in critic.parameters() if p.requires_grad and id(p) not in apart]
        groups = [(rest, options.critic_rate), (change, options.student_rate), (scale, options.scale_rate)]
        return [RMSPropW(ps, lr=rate, beta=CRITIC_BETA, weight_decay=0.0) for ps, rate in groups if ps]

    def modules(self, network: Network) -> dict[str, nn.Module]:
        """Teacher, generator with averages, critic; and `best`, if a monitor selects it."""
        options, rank = self.config.onestep, self.config.network.jump_rank
        teacher = ema.average_of(network)
        generator = build(self.config.network).to(network.device)
        start_from(generator, teacher, options.generator)
        found: dict[str, nn.Module] = {"teacher": teacher, "critic": fresh_critic(options, teacher, rank)}
        found |= averaged(generator, self.schedule)
        for name, trains in (("network", options.generator_trains), ("critic", options.critic_trains)):
            if trains == "norms":
                freeze_matrices(found[name])
        if rank:
            found["network"].requires_grad_(False).get_submodule("jump").requires_grad_(True)
        if options.selects:
            found["best"] = ema.average_of(teacher)
        return found

    def published(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The ratio network: always the last one, even if the generator is an earlier one.

        On the digits it was a better judge of samples than the one of that earlier moment.
        """
        critic = modules["critic"]
        assert isinstance(critic, Critic)
        return {} if critic.ratio is None else {"ratio": critic.ratio}

    def begin_from(self, source: Network) -> Network:
        """The teacher, whose network must be that of this run."""
        theirs, own = source.config, self.config.network
        if not theirs.class_names and theirs != own:  # a network from elsewhere knows its classes by number
            source, theirs = copy.copy(source), replace(theirs, class_names=own.class_names)
            source.config = theirs
        if theirs != replace(own, jump_rank=theirs.jump_rank, jump_exit=theirs.jump_exit):
            kinds = [
                f"{(*n.image_size, n.channels)}, {count_text(n.classes, 'class', 'classes')}" for n in (theirs, own)
            ]
            about = f"is for {kinds[0]}, this run's for {kinds[1]}" if kinds[0] != kinds[1] else "is not this run's"
            raise UserError(f"{self.config.start}: its network {about}; restore its data, or train a new one")
        self._check_trunk(source)
        if self.config.onestep.has_ratio:
            fresh_ratio(self.config.onestep, source)
        return changeable(source, own) if own.jump_rank or theirs.jump_rank else source

    def _check_trunk(self, source: Network) -> None:
        """Refuse options that ask for a part of a trunk where there is none."""
        options = self.config.onestep
        given = {
            "generator": options.generator in ("trunk", "ends"),
            "critic": options.critic in ("trunk", "ends"),
            "generator_trains": options.generator_trains == "norms",
            "critic_trains": options.critic_trains == "norms",
        }
        wanted = [name for name, parts in given.items() if parts]
        if wanted and not source.trunks:
            raise UserError(f"onestep.{wanted[0]}: {type(source).__name__} has no trunk; leave it at its default")

    @property
    def sampler(self) -> Sampler:
        """One step, or as many as configured for a one-step generator, from the time that it is trained for."""
        own = self.config.sampler
        return replace(own if own.jumps else Sampler(1, "refine"), start=self.config.onestep.start)

    def monitors(self, run: Run, data: Dataset, test: Dataset, device: torch.device, say: Say) -> Sequence[Monitor]:
        warmup = self.start + self.config.onestep.critic_warmup
        return (OneStepMonitor(run, data, test, device, say, warmup=warmup),)

    def flops(self) -> float:
        """Of a critic update and a generator update, the latter weighted by its share of the steps.

        A pass with its gradient in weights and inputs counts three times a pass without.
        """
        options, network = self.config.onestep, self.config.network
        role = network.kind.role_flops(network)
        ratio = role.denoise * (options.critic_blocks or network.depth) / network.depth * options.has_ratio
        penalised = options.ratio.penalty_share * bool(options.ratio.penalty)
        scores = role.denoise * (options.method != "ratio")
        guided = 1 if options.score.guidance == 1 else 2
        upkept = options.upkeep_share * bool(options.upkeep and not network.jump_rank)
        codec = 3 * (role.encode + role.decode) * network.kind.shares_codec
        upkeep = upkept * (4 * role.denoise + codec)
        encoding = role.encode if options.reads_data or upkept else 0
        critic = encoding + role.denoise + 6 * (1 + penalised) * ratio + 3 * scores
        each = critic + (2 * role.denoise + guided * scores + upkeep) / options.critic_updates
        changed = 1 + 2 / options.critic_updates + 3 * bool(scores)  # the products BA, in every pass
        size = self.config.training.micro_batch or self.config.training.batch
        return each + changed * change_flops(network.width, network.depth, network.jump_rank) / size


def move_levels(modules: Mapping[str, nn.Module], skipped: Bool[Tensor, ""]) -> None:
    """Update the critic's mean weights per level, once per update of the generator, with those of all ranks."""
    critic = modules["critic"]
    assert isinstance(critic, Critic)
    levels = critic.levels
    levels.total, levels.count = ranks().sum([levels.total, levels.count])
    levels.move(skipped)


# --- where weights start ----------------------------------------------------------------------------------------------


def fresh_critic(options: OneStep, teacher: Network, rank: int = 0) -> Critic:
    """A critic with the weights that `options` specifies; random ones come from torch's current seed.

    A student is a copy of the teacher or, for a rank above 0, a change of it.
    """
    ratio = student = None
    if options.has_ratio:
        ratio = fresh_ratio(options, teacher)
        start_from(ratio, RatioNet.of(teacher, options.critic_blocks), options.critic)
    if options.method != "ratio" and rank:
        student = Jump(teacher.denoising_trunk, rank)
    elif options.method != "ratio":
        student = build(teacher.config).to(teacher.device)
        start_from(student, teacher, options.critic)
    return Critic(ratio, student).to(teacher.device)


def fresh_ratio(options: OneStep, teacher: Network) -> RatioNet:
    """A ratio network with random weights. Raises a UserError if the teacher has too few blocks for it."""
    try:
        return RatioNet.of(teacher, options.critic_blocks, learned=False)
    except UserError as error:
        raise UserError(f"onestep.critic_{error}") from None


@torch.no_grad()
def start_from(module: nn.Module, teacher: nn.Module, weights: Weights) -> None:
    """Replace weights of a random module with the teacher's, as `weights` specifies."""
    inside: Mapping[Weights, tuple[bool, ...]] = {
        "teacher": (True, False),
        "random": (),
        "trunk": (True,),
        "ends": (False,),
    }
    own = module.state_dict()
    theirs = {name: value for name, value in teacher.state_dict().items() if _is_inside(name) in inside[weights]}
    module.load_state_dict({**own, **theirs})


def _is_inside(name: str) -> bool:
    """Whether a parameter belongs to the trunk or its modulation, and not to an entrance or exit."""
    return "trunk." in name or "modulation." in name


def changeable(source: Network, config: NetworkConfig) -> Network:
    """A network with the weights of another but for its generator, which begins anew, with the rank of `config`.

    Raises:
        UserError: an architecture whose `jump` has no changes.
    """
    network = build(config).to(source.device)
    if config.jump_rank and getattr(network.get_submodule("jump"), "change", None) is None:
        raise UserError(f"network.jump_rank: the jump of {type(network).__name__} changes no matrix; give --rank 0")
    theirs = {name: value for name, value in source.state_dict().items() if not name.startswith("jump")}
    network.load_state_dict({**network.state_dict(), **theirs})
    return network


def freeze_matrices(module: nn.Module) -> None:
    """Freeze the matrices of the trunk's blocks, so that only norms and offsets are trained there."""
    for name, p in module.named_parameters():
        if ".blocks." in name and p.ndim == 2 and not name.endswith("offset"):
            p.requires_grad_(False)
