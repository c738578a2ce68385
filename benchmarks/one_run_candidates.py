"""What else the generator of one run could learn from: its alternatives, at equal images and at equal arithmetic.

    python benchmarks/one_run_candidates.py --candidate energy --seeds 3 --json-file energy.json
    python benchmarks/one_run_candidates.py --candidate ratio --equal --brief --json-file ratio.json
    python benchmarks/one_run_candidates.py --seconds 20    # arithmetic, and seconds of a step where all take turns

    score      the difference of two scores, as `onefold train --one-step` has it: the student's and the average's
    energy     2 E‖φ(x) − φ(z)‖ − E‖φ(x) − φ(x′)‖ − E‖φ(z) − φ(z′)‖ between samples x and encoded images z of a class
               (Székely & Rizzo, 2013), φ in turn the latents and, noised, the average's hidden tokens; no student
    ratio      a density ratio (`objectives.density_ratio`) of low-rank changes on the average's trunk, and a head
    both       score, and 0.1 times energy at the same samples

Each is a phase of its own, registered from outside the package. In all of them the generator is a low-rank change of
the average and nothing that it learns from reaches the shared weights, so that encoder, denoiser and decoder are those
of plain training to the bit: only one step differs. None has the exit to pixels, which would change nothing else.

`--equal` shortens or lengthens a run until its training has as many operations as that of `score` with `--images`. Runs
and their rows are those of `one_run.py`: a finished one is neither trained nor measured again, an interrupted one is
continued. `-c` changes a setting: those of the ratio are `onestep.ratio.…`, `onestep.critic_rate`, `.scale_rate` and
`.critic_warmup`; the others share what `onerun.…` says of rates, updates, samples and noise levels.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer
from tyro.conf import arg

import command
import onefold
import timing
from one_run import rows_of
from onefold.data import open_dataset, read_all
from onefold.networks import Network
from onefold.networks.jump import Jump, change_flops
from onefold.networks.ratio import AttentionPool, Scale
from onefold.networks.trunk import conditioning
from onefold.objectives.density_ratio import NoiseDraws, ratio_loss
from onefold.objectives.losses import Losses
from onefold.objectives.one_run import OneRunDraws
from onefold.objectives.score_distillation import distillation
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float
from onefold.training.config import Config
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.one_run import BETA, OneRunPhase, with_one_step
from onefold.training.optimizer import RMSPropW
from onefold.training.phases import Part, Trained, register, training_flops
from onefold.training.state import TrainingState
from onefold.training.step import training_step
from onestep_digits import Measured, summarised

Candidate = Literal["score", "energy", "ratio", "both"]

CANDIDATES: dict[Candidate, tuple[str, dict[str, Any]]] = {
    "score": ("one_run", {}),
    "energy": ("one_run_energy", {"onerun.updates": 1, "onerun.share": 1.0}),
    "ratio": (
        "one_run_ratio",
        {
            "onerun.t_max": 0.98,
            "onerun.generator_rate": 1e-3,
            "onestep.critic_rate": 2e-3,
            "onestep.critic_warmup": 1_600,
        },
    ),
    "both": ("one_run_both", {}),
}
"""The phase of each, and its settings where they are not those of `score`."""
WEIGHT = 0.1
"""Of the energy beside the score, whose gradient is of about its size."""


# --- what they share --------------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """What the generator makes of a part of a batch."""

    kept: Int64[Tensor, " k"]
    """Positions of the images whose labels the samples have."""
    labels: Int64[Tensor, " k"]
    x: Float[Tensor, "k N D"]
    noise: NoiseDraws
    share: float
    """Of these in the samples of the whole batch."""


def samples(generator: Jump, average: Network, y: Tensor, draws: OneRunDraws, config: Config) -> Samples:
    """One-step samples with the labels of a share of the batch, or without."""
    options = config.onerun
    count = max(1, round(options.share * draws.span.batch))
    kept = draws.span.spread(count, y.device)
    labels = y.masked_fill(draws.unlabelled, average.config.classes)[kept]
    start = torch.full((len(kept),), options.start, device=y.device)
    x = average.generate_with(generator, (1 - options.start) * draws.eps[kept], start, labels)
    return Samples(kept, labels, x, NoiseDraws(*(value[kept] for value in draws.score)), len(kept) / count)


class CandidatePhase(OneRunPhase):
    """One run with another signal for the generator."""

    learns: ClassVar[tuple[str, ...]] = ("generator",)
    """Which of the modules beside the network there are."""
    each: ClassVar[float]
    """Arithmetic for a sample, in passes of the trunk."""

    @cached_property
    def parts(self) -> Sequence[Part]:
        network, beside, *_ = super().parts
        trains = tuple(trained for trained in beside.trains if trained.name in self.learns)
        return network, *[replace(beside, trains=trains, loss=self.loss_beside)] * self.config.onerun.updates

    def modules(self, network: Network) -> dict[str, nn.Module]:
        found = super().modules(network)
        return {name: module for name, module in found.items() if name != "student" or name in self.learns}

    def flops(self) -> float:
        """As of `OneRunPhase`: a pass with its gradient in weights and inputs counts three times one without."""
        options, training, network = self.config.onerun, self.config.training, self.config.network
        changes = len(self.learns) * 3 * change_flops(network.width, network.depth, network.jump_rank) / training.batch
        beside = options.updates * (options.share * self.each * self._role_flops.denoise + changes)
        return (
            SelfDistillationPhase.flops(self)
            + beside * max(0, self.schedule.images - self.begin) / self.schedule.images
        )


# --- energy -----------------------------------------------------------------------------------------------------------


def energy_distance(
    fake: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    of_fake: Int64[Tensor, " n"],
    of_real: Int64[Tensor, " m"],
    null: int,
) -> Float[Tensor, ""]:
    """The energy distance between samples and data of a class, as U-statistics, averaged over the samples.

    Distances are in units of the data's standard deviation, √(E‖z − Ez‖²). Samples of no class (`null`) are compared
    with all data; those without another of their class, or without data of it, are left out.
    """
    real = real.float()
    unit = (real - real.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-6)
    fake, real = fake.float() / unit, real / unit
    near = (of_fake[:, None] == of_real) | (of_fake == null)[:, None]
    alike, twins = of_fake[:, None] == of_fake, of_real[:, None] == of_real
    alike, twins = (same & ~torch.eye(len(same), dtype=torch.bool, device=real.device) for same in (alike, twins))
    known = near.any(1) & alike.any(1)
    of_samples = 2 * _mean(fake, real, near) - _mean(fake, fake, alike)
    of_data = (near * _mean(real, real, twins)).sum(1) / near.sum(1).clamp(min=1)
    return ((of_samples - of_data) * known).sum() / known.sum().clamp(min=1)


def _mean(a: Tensor, b: Tensor, chosen: Tensor) -> Float[Tensor, " n"]:
    """Mean distance of each row of a to the chosen ones of b."""
    far = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (far * chosen).sum(1) / chosen.sum(1).clamp(min=1)


def hidden_of(average: Network, z: Tensor, eps: Tensor, t: Tensor) -> list[Float[Tensor, "B N W"]]:
    """The denoiser's tokens after each block, of noised latents; asked for no class, so that all can be compared."""
    parts: dict[str, Any] = average.denoising_parts()
    z_t = noised(Linear(), z, eps, per_token(t))
    modulation = parts["modulation"](conditioning(parts["time"], parts["labels"], t))
    return parts["trunk"].hidden(parts["entrance"](z_t), modulation)


def energy(average: Network, made: Samples, x: Tensor, y: Tensor, draws: OneRunDraws) -> Float[Tensor, ""]:
    """Mean of the energy distances in latents and in hidden tokens, these at one noise level for all samples and data.

    All images of the part count, and each sample's pairs are within it.
    """
    null = average.config.classes
    level = draws.score.t[:1].expand(len(x))
    with torch.no_grad():
        z = average.encode(x)
        seen = hidden_of(average, z, draws.score.direction, level)
    own = hidden_of(average, made.x, made.noise.eps, level[: len(made.x)])
    spaces = [energy_distance(a.flatten(1), b.flatten(1), made.labels, y, null) for a, b in zip(own, seen, strict=True)]
    return (energy_distance(made.x.flatten(1), z.flatten(1), made.labels, y, null) + torch.stack(spaces).mean()) / 2


@register("one_run_energy")
class EnergyPhase(CandidatePhase):
    """Generator by energy distances alone, through hidden tokens with their gradient in the latents."""

    each: ClassVar[float] = 3 + 2

    def loss_beside(self, generator: Jump, average: Network, x: Tensor, y: Tensor, draws: OneRunDraws) -> Losses:
        made = samples(generator, average, y, draws, self.config)
        if not len(made.kept):
            return Losses(torch.zeros((), device=y.device), {})
        loss = made.share * energy(average, made, x, y, draws)
        return Losses(loss, {"energy": loss.detach()})

    def flops(self) -> float:
        """Also encoding and hidden tokens of the whole batch, however many samples there are."""
        data = self.config.onerun.updates * (self._role_flops.encode + self._role_flops.denoise)
        return super().flops() + data * max(0, self.schedule.images - self.begin) / self.schedule.images


@register("one_run_both")
class BothPhase(EnergyPhase):
    """Score, and a little energy at the same samples."""

    learns: ClassVar[tuple[str, ...]] = ("student", "generator")
    each: ClassVar[float] = 3 + 3 + 1 + 2

    def loss_beside(
        self, student: Jump, generator: Jump, average: Network, x: Tensor, y: Tensor, draws: OneRunDraws
    ) -> Losses:
        made = samples(generator, average, y, draws, self.config)
        if not len(made.kept):
            return Losses(torch.zeros((), device=y.device), {})
        error, gradient = distillation(
            average.denoise,
            partial(average.generate_with, student),
            made.x,
            made.labels,
            made.noise,
            normalised=self.config.onerun.normalised,
        )
        assert gradient is not None
        distance = energy(average, made, x, y, draws)
        told = {"student": error.detach(), "difference": gradient.square().mean(), "energy": distance.detach()}
        total = error + (gradient * made.x).mean() + WEIGHT * distance
        return Losses(made.share * total, {name: made.share * value for name, value in told.items()})


# --- ratio ------------------------------------------------------------------------------------------------------------


class Ratio(nn.Module):
    """ℓ(x_t, t, y): the average's trunk with low-rank changes, and a head. It follows the average without a copy."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.change = Jump(network.denoising_trunk, network.config.jump_rank)
        self.head = AttentionPool(network.config.width, network.config.heads)
        self.scale = Scale()

    def logit(self, average: Network, x_t: Tensor, t: Tensor, y: Tensor) -> Float[Tensor, " B"]:
        """Before calibration."""
        parts: dict[str, Any] = average.denoising_parts()
        condition = conditioning(parts["time"], parts["labels"], t, y, role=self.change.condition(torch.ones_like(t)))
        return self.head(self.change(parts["trunk"], parts["entrance"](x_t), parts["modulation"](condition)))


@register("one_run_ratio")
class RatioPhase(CandidatePhase):
    """Generator by a density ratio that learns from `onerun.begin` on, and after its warm-up teaches."""

    learns: ClassVar[tuple[str, ...]] = ("ratio", "generator")

    @cached_property
    def parts(self) -> Sequence[Part]:
        network, beside, *_ = super().parts
        (generator,) = beside.trains
        ratio = Trained("ratio", self.ratio_optimizers, generator.schedule, norm="ratio_norm")
        begin = self.begin + self.config.onestep.critic_warmup
        both = replace(beside, trains=(ratio, generator), start=begin)
        alone = replace(
            beside, trains=(ratio,), reads=("generator", *beside.reads), loss=self.ratio_loss, unless=both, finish=None
        )
        return network, *[each for _ in range(self.config.onerun.updates) for each in (alone, both)]

    def modules(self, network: Network) -> dict[str, nn.Module]:
        return super().modules(network) | {"ratio": Ratio(network).to(network.device)}

    def ratio_optimizers(self, ratio: nn.Module) -> list[Optimizer]:
        assert isinstance(ratio, Ratio)
        options = self.config.onestep
        groups = (([*ratio.change.parameters(), *ratio.head.parameters()], options.critic_rate),)
        groups += (([*ratio.scale.parameters()], options.scale_rate),)
        return [RMSPropW(weights, lr=rate, beta=BETA, weight_decay=0.0) for weights, rate in groups]

    def ratio_loss(
        self, ratio: Ratio, generator: Jump, average: Network, x: Tensor, y: Tensor, draws: OneRunDraws
    ) -> Losses:
        with torch.no_grad():
            made = samples(generator, average, y, draws, self.config)
        return self._learned(ratio, average, made, x)

    def loss_beside(
        self, ratio: Ratio, generator: Jump, average: Network, x: Tensor, y: Tensor, draws: OneRunDraws
    ) -> Losses:
        return self._learned(ratio, average, samples(generator, average, y, draws, self.config), x)

    def _learned(self, ratio: Ratio, average: Network, made: Samples, x: Tensor) -> Losses:
        if not len(made.kept):
            return Losses(torch.zeros((), device=x.device), {})
        options = self.config.onestep.ratio
        with torch.no_grad():
            z = average.encode(x[made.kept])
        loss, told = ratio_loss(
            partial(ratio.logit, average),
            z,
            made.x,
            made.labels,
            made.noise,
            options,
            scale=ratio.scale if options.calibrated else None,
        )
        return Losses(made.share * loss, {name: made.share * value for name, value in told.items()})

    @property
    def each(self) -> float:  # type: ignore[override]
        """An encoding, three passes of the generator, and three of the ratio at data, samples and shifted points."""
        network, options = self.config.network, self.config.onestep.ratio
        head = 2 * network.width * (2 * network.width * network.tokens + network.width)
        points = 2 * (1 + options.penalty_share * bool(options.penalty))
        return 1 + 3 + 3 * points * (1 + head / self._role_flops.denoise)

    def flops(self) -> float:
        """Less the gradient of the generator, two passes, while the ratio warms up."""
        options = self.config.onerun
        saved = options.updates * options.share * 2 * self._role_flops.denoise
        return super().flops() - saved * self.config.onestep.critic_warmup / self.schedule.images


# --- runs -------------------------------------------------------------------------------------------------------------


def configured(candidate: Candidate, seed: int = 0, images: int | None = None, **changes: Any) -> Config:
    """One run on the digits in which the generator learns so."""
    phase, own = CANDIDATES[candidate]
    wanted = {"training.seed": seed} | ({"training.images": images} if images else {})
    config = with_one_step(onefold.recipe("digits").with_changes(wanted | own | changes))
    return replace(config, network=replace(config.network, jump_exit=False), phases=(phase,))


def equal_images(candidate: Candidate, images: int | None, **changes: Any) -> int:
    """Images with which training has as many operations as that of `score` with `images`, in whole batches."""
    score, own = configured("score", 0, images), configured(candidate, 0, images, **changes)
    batch = score.training.batch
    return batch * round(score.training.images * training_flops(score) / training_flops(own) / batch)


def steps_in_turns(seconds: float) -> dict[str, dict[str, float]]:
    """Arithmetic per image over a run and, if seconds are given, those of a step in which generators learn, too."""
    configs = {"plain": onefold.recipe("digits"), **{name: configured(name) for name in CANDIDATES}}
    found = {name: {"flops_per_image": training_flops(config)} for name, config in configs.items()}
    if not seconds:
        return found
    x, y = read_all(open_dataset("digits"), range(configs["plain"].training.batch))
    states = {name: TrainingState.fresh(config, torch.device("cpu")) for name, config in configs.items()}

    def step(name: str) -> float:
        config = configs[name]
        states[name].counters.images = config.training.images // 2
        return timing.seconds_of(lambda: training_step(states[name], to_float(x), y, config), torch.device("cpu"))

    once = sum(step(name) for name in configs)
    times = timing.taking_turns({name: partial(step, name) for name in configs}, max(1, round(seconds / once)))
    return {name: {**found[name], "seconds_per_step": median(times[name])} for name in configs}


def main(
    candidate: Candidate | None = None,
    seeds: int = 1,
    first: int = 0,
    images: int | None = None,
    equal: bool = False,
    change: Annotated[tuple[str, ...], arg(aliases=["-c"])] = (),
    brief: bool = False,
    seconds: float = 0.0,
    out: Path = Path("runs/one-run-candidates"),
    json_file: Path | None = None,
) -> None:
    """Train a candidate with the seeds `first`, `first` + 1, …, evaluate and summarise; without one, count all.

    `equal`: as much arithmetic as `score` has with `images`; `change`: settings, as name=value; `brief`: one step only;
    `seconds`: how long to time steps.
    """
    if candidate is None:
        costs = steps_in_turns(seconds)
        rows = [[name, *(f"{value:.4g}" for value in numbers.values())] for name, numbers in costs.items()]
        print(timing.table(["", *costs["plain"]], rows))
        timing.write({**timing.machine(torch.device("cpu")), "candidates": costs}, json_file)
        return
    command.check_out(out)
    changes = command.settings_of(change)
    count = equal_images(candidate, images, **changes) if equal else images
    config = configured(candidate, 0, count, **changes)
    found: list[dict[str, Measured]] = []
    for seed in range(first, first + seeds):
        folder = out / "-".join([candidate, *([str(config.training.images)] if count else []), *change, str(seed)])
        if (folder / "rows.json").exists():
            run = onefold.load_run(folder)
        elif (folder / "config.json").exists():
            run = onefold.train(None, folder, resume=True)
        else:
            run = onefold.train(configured(candidate, seed, count, **changes), folder)
        found.append(rows_of(run, brief=brief))
    summary = summarised(found)
    if json_file is not None:
        about = {"onefold": onefold.__version__, "candidate": candidate, "changes": list(change)}
        about |= {"images": config.training.images, "flops_per_image": training_flops(config)}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, "rows": summary}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main)
