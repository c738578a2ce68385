"""The critic: what a one-step generator learns from, and where the weights of both start.

    ratio    a ratio network
    score    a student denoiser, which learns the generator's score; the teacher's score is that of the data
    dmd      the same, and a ratio network if it has an adversarial term

The critic's losses and the gradient that it gives at samples are here, so that the step needs not know the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from onefold.networks.base import Network, build
from onefold.networks.ratio import RatioNet
from onefold.objectives.density_ratio import Levels, NoiseDraws, draw_noise, ratio_gradient, ratio_loss
from onefold.objectives.score_distillation import score_gradient, student_loss
from onefold.training.config import Config, OneStep, Weights

__all__ = ["Critic", "CriticDraws", "Duel", "freeze_matrices", "start_from"]


class CriticDraws(NamedTuple):
    """The noise that samples are compared at, for each of the two critics."""

    ratio: NoiseDraws
    score: NoiseDraws


class Critic(nn.Module):
    """A ratio network, a student, or both, of the teacher's shape."""

    def __init__(self, options: OneStep, ratio: RatioNet | None, student: Network | None) -> None:
        super().__init__()
        self.options = options
        self.ratio = ratio
        self.student = student
        self.levels = Levels()

    @classmethod
    def fresh(cls, options: OneStep, teacher: Network) -> "Critic":
        """With the weights that `options` says; random ones come from torch's present seed."""
        ratio = student = None
        if options.method == "ratio" or options.score.adversarial:
            ratio = RatioNet.of(teacher, options.critic_blocks, learned=False)
            start_from(ratio, RatioNet.of(teacher, options.critic_blocks), options.critic)
        if options.method != "ratio":
            student = build(teacher.config).to(teacher.device)
            start_from(student, teacher, options.critic)
        return cls(options, ratio, student).to(teacher.device)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> CriticDraws:
        """The noise of one loss or gradient for samples of `shape` (B, N, D)."""
        options = self.options
        return CriticDraws(
            draw_noise(options.ratio.time, options.ratio.latest, shape, generator),
            draw_noise(options.score.time, options.score.latest, shape, generator),
        )

    def loss(
        self, real: Float[Tensor, "B N D"], fake: Float[Tensor, "B N D"], y: Int64[Tensor, " B"] | None, at: CriticDraws
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """What the critic lowers, and its parts without their graph."""
        total, parts = torch.zeros((), device=real.device), dict[str, Tensor]()
        if self.ratio is not None:
            total, parts = ratio_loss(self.ratio, real, fake, y, at.ratio, self.options.ratio)
        if self.student is not None:
            error = student_loss(self.student.denoise, fake, y, at.score)
            total, parts = total + error, {**parts, "student": error.detach()}
        return total, parts

    def gradient(
        self, teacher: Network, fake: Float[Tensor, "B N D"], y: Int64[Tensor, " B"] | None, at: CriticDraws
    ) -> Float[Tensor, "B N D"]:
        """The gradient of the generator's loss at its samples, for each sample of its own loss."""
        options = self.options
        if self.student is None:
            assert self.ratio is not None
            return ratio_gradient(self.ratio, fake, y, at.ratio, options.ratio, self.levels)
        normalised = options.method == "dmd"
        found = score_gradient(teacher.denoise, self.student.denoise, fake, y, at.score, normalised=normalised)
        if self.ratio is not None and options.score.adversarial:
            against = ratio_gradient(self.ratio, fake, y, at.ratio, options.ratio, self.levels)
            found = found + options.score.adversarial * against
        return found


@dataclass
class Duel:
    """What a one-step generator is trained against, and the best that came of it."""

    teacher: Network
    """The network that the generator began as. It does not change and is not in the checkpoints."""
    critic: Critic
    optimizer: Optimizer
    """The critic's. Adam without momentum: what it follows changes with every update of the generator."""
    best: Network | None = None
    """The best average so far, on the CPU. The ratio network that is published with it is the last one all the same: it
    knows the difference between data and samples better (measured in `docs/onestep.md`)."""

    @classmethod
    def fresh(cls, generator: Network, teacher: Network, config: Config) -> "Duel":
        """A critic with the weights that `config.onestep` says; the generator takes over its own from the teacher."""
        options = config.onestep
        assert options is not None
        start_from(generator, teacher, options.generator)
        critic = Critic.fresh(options, teacher)
        for module, trains in ((generator, options.generator_trains), (critic, options.critic_trains)):
            if trains == "norms":
                freeze_matrices(module)
        trained = [p for p in critic.parameters() if p.requires_grad]
        rate = options.critic_rate
        return cls(teacher, critic, AdamW(trained, lr=rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True))


@torch.no_grad()
def start_from(module: nn.Module, teacher: nn.Module, weights: Weights) -> None:
    """Replace weights of a random module by the teacher's, as many as `weights` says."""
    chosen: Mapping[Weights, tuple[bool, ...]] = {
        "teacher": (True, False),
        "random": (),
        "trunk": (True,),
        "ends": (False,),
    }
    own = module.state_dict()
    theirs = {name: value for name, value in teacher.state_dict().items() if _is_inside(name) in chosen[weights]}
    module.load_state_dict({**own, **theirs})


def _is_inside(name: str) -> bool:
    """Whether a parameter belongs to the trunk or its modulation, and not to an entrance or exit."""
    return "trunk." in name or "modulation." in name


def freeze_matrices(module: nn.Module) -> None:
    """Leave of the trunk's blocks only norms and offsets to be trained."""
    for name, p in module.named_parameters():
        if ".blocks." in name and p.ndim == 2 and not name.endswith("offset"):
            p.requires_grad_(False)
