r"""Images that training needs to reach a distance, with one setting changed at a time.

    python benchmarks/images_to_distance.py --data fashion-mnist --features features-fashion.safetensors \
        -c network.patch=4 network.latent_channels=8 --out runs/speed --json-file speed.json
    python benchmarks/images_to_distance.py --budget 19200 --arms plain min-snr     # on the digits

The plain recipe is trained at half, once and twice the budget, every arm once, all with schedules of that length. An
arm is `worth` r if the plain recipe reaches its distance with r times as many images as the arm saw. That is read, for
each seed, between the plain runs, where log distance is taken to be linear in log images; ½ and 2 mean that or beyond.
`worth per operation` is r divided by the arm's arithmetic per image, in units of the plain recipe's. With several
seeds, the plain runs' own spread tells what chance does.

`plain` is the recipe `digits` with the losses of `fashion` and `cifar10`: L1, and noised latents for the decoder. What
the package does not have is made here, from outside it: register tokens, and a representation loss, by which tokens in
the middle of the denoiser come to predict what the average's own trunk makes of the clean image, or of a cleaner
latent, one block from its end. (For the target, the average encodes the image anyway; here it does so twice.)

A finished run is neither trained nor, in the same features, measured again; an interrupted one is continued.

References: registers: Darcet et al., 2024 (arXiv 2309.16588); representation loss: Yu et al., 2025 (arXiv 2410.06940),
and with the network's own features Jiang et al., 2025 (arXiv 2505.02831).
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tyro.conf import arg

import command
import onefold
from onefold import metrics, networks
from onefold.compute import resolve_precision
from onefold.data import open_dataset
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.extractor import extractor_for
from onefold.metrics import Record
from onefold.networks import NetworkConfig, OneFold, RoleFlops, Trunk
from onefold.networks.trunk import Change, trunk_flops
from onefold.objectives.losses import Losses
from onefold.objectives.self_distillation import DenoisingDraws, augmented
from onefold.paths import Linear, noised, per_token
from onefold.training.config import Config
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.phases import register, training_flops

REGISTERS = 4
ALIGNMENT = 0.5
"""Weight of the representation loss, as in Yu et al., 2025."""


# --- register tokens --------------------------------------------------------------------------------------------------


class RegisteredTrunk(Trunk):
    """A trunk with learned tokens without a position before the others, which can read them; they leave at its end."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.registers = nn.Parameter(0.02 * torch.randn(REGISTERS, self.norm.normalized_shape[0]))
        unmoved = torch.tensor([1.0, 0.0])[:, None, None].expand(2, REGISTERS, self.table.shape[2])
        self.table = torch.cat([unmoved, self.table], 1)

    def forward(
        self, h: Float[Tensor, "B N W"], modulation: Float[Tensor, "#B 6 W"], changes: Sequence[Change] = ()
    ) -> Float[Tensor, "B N W"]:
        return super().forward(self._with_registers(h), modulation, changes)[:, REGISTERS:]

    def hidden(self, h: Float[Tensor, "B N W"], modulation: Float[Tensor, "#B 6 W"]) -> list[Float[Tensor, "B N W"]]:
        return [state[:, REGISTERS:] for state in super().hidden(self._with_registers(h), modulation)]

    def _with_registers(self, h: Tensor) -> Tensor:
        return torch.cat([self.registers.expand(len(h), -1, -1), h.float()], 1)


@networks.register("one_network_with_registers")
class WithRegisters(OneFold):
    """One network whose trunk has register tokens."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        plain = self.trunk.state_dict()
        self.trunk = RegisteredTrunk(config.width, config.depth, config.heads, *config.grid)
        self.trunk.load_state_dict(plain, strict=False)  # to begin as the other arms do

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        more, without = (trunk_flops(config.tokens + n, config.width, config.depth) for n in (REGISTERS, 0))
        return RoleFlops(*(flops + more - without for flops in super().role_flops(config)))


# --- representation loss ----------------------------------------------------------------------------------------------


@networks.register("one_network_with_projector")
class WithProjector(OneFold):
    """One network that keeps the tokens in the middle of its latest denoising, and a map from them to the target's."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        width = config.width
        self.projector = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.middle: Tensor | None = None

    def decode_and_denoise(
        self, z: Tensor, z_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Float[Tensor, "A C H W"], Float[Tensor, "B N D"]]:
        """As that of one network, to the bit."""
        decoding = self._condition("decode").expand(len(z), -1, -1)
        condition = torch.cat([decoding, self._condition("denoise", t, y)])
        states = self.trunk.hidden(self.latents_in(torch.cat([z, z_t])), condition)
        h = self.trunk.norm(states[-1])
        self.middle = states[len(states) // 2 - 1][len(z) :] if torch.is_grad_enabled() else None
        return self._image(h[: len(z)]), self._clean(self.latents_out(h[len(z) :]), z_t, t)

    def denoising_hidden(self, z_t: Tensor, t: Tensor, y: Tensor | None) -> list[Float[Tensor, "B N W"]]:
        """The denoiser's tokens after each block."""
        return self.trunk.hidden(self.latents_in(z_t), self._condition("denoise", t, y))


class AlignedPhase(SelfDistillationPhase):
    """Self-distillation with a representation loss: 1 − the cosine between projected tokens and the average's."""

    to: ClassVar[Literal["clean image", "cleaner latent"]]
    """What the average sees: the image, as its encoder; or the same latent with half the noise, as its denoiser."""

    def loss(self, network: nn.Module, target: nn.Module, x: Tensor, y: Tensor, draws: DenoisingDraws) -> Losses:
        assert isinstance(network, WithProjector)
        assert isinstance(target, WithProjector)
        found = super().loss(network, target, x, y, draws)
        assert network.middle is not None
        with torch.no_grad():
            wanted = self._wanted(target, augmented(x, draws, self.config.objective), y, draws)
        seen, network.middle = network.projector(network.middle), None
        apart = draws.span.share * (1 - F.cosine_similarity(seen.float(), wanted, dim=-1)).mean()
        return Losses(found.total + ALIGNMENT * apart, found.parts | {"alignment": apart.detach()})

    def _wanted(
        self, target: WithProjector, x: Tensor, y: Int64[Tensor, " B"], draws: DenoisingDraws
    ) -> Float[Tensor, "B N W"]:
        n = draws.t.shape[1]
        if self.to == "clean image":
            return target.features(x)[-2].repeat_interleave(n, 0)
        t = (1 + draws.t.flatten()) / 2
        labels = torch.where(draws.unlabelled, target.config.classes, y[:, None]).flatten()
        z = noised(Linear(), target.encode(x).repeat_interleave(n, 0), draws.eps.flatten(0, 1), per_token(t))
        return target.denoising_hidden(z, t, labels if target.config.classes else None)[-2]

    def flops(self) -> float:
        """Also the average's passes, and the projector with its backward pass."""
        role, network, draws = self._role_flops, self.config.network, self.config.objective.draws
        passes = role.encode if self.to == "clean image" else role.encode + draws * role.denoise
        return super().flops() + passes + 3 * draws * 4 * network.tokens * network.width**2


@register("aligned_to_images")
class AlignedToImages(AlignedPhase):
    to = "clean image"


@register("aligned_to_cleaner_latents")
class AlignedToCleanerLatents(AlignedPhase):
    to = "cleaner latent"


# --- arms -------------------------------------------------------------------------------------------------------------

ALIGNED = {"network.architecture": "one_network_with_projector"}

ARMS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "min-snr": {"objective.weighting": "min_snr", "objective.denoising_weight": 0.47},
    "noisier-t": {"objective.time.shift": 0.5},
    "cleaner-t": {"objective.time.shift": 2.0},
    "logit-normal-t": {"objective.time.kind": "logit_normal"},
    "self-perceptual": {"objective.perceptual_weight": 0.1},
    "no-decoder-noise": {"objective.decoder_noise": 0.0},
    "l2": {"objective.reconstruction": "l2"},
    "1-draw": {"objective.draws": 1},
    "8-draws": {"objective.draws": 8},
    "adamw": {"training.optimizer": "adamw"},
    "muon-half": {"training.muon_rate": 0.01},
    "muon-double": {"training.muon_rate": 0.04},
    "ema-short": {"training.ema_ramp": 0.03},
    "ema-long": {"training.ema_ramp": 0.3},
    "registers": {"network.architecture": "one_network_with_registers"},
    "aligned-images": {**ALIGNED, "phases": ("aligned_to_images",)},
    "aligned-latents": {**ALIGNED, "phases": ("aligned_to_cleaner_latents",)},
    "half-channels": {"network.latent_channels": 0.5},
    "double-channels": {"network.latent_channels": 2},
    "half-depth": {"network.depth": 0.5},
    "coarser-patch": {"network.patch": "coarser"},
}
"""Settings that differ from the plain recipe's; of the network's channels and depth, by which factor.

Rates and weights are otherwise the recipe's: AdamW and L2 might do better with their own. Min-SNR weights of uniform
times have a mean of 2.12, which the denoising weight makes up for.
"""


def coarser(network: NetworkConfig) -> dict[str, int]:
    """The next larger patch that fits the images, and channels for about as many latent values of an image."""
    side, old = math.gcd(*network.image_size), network.patch
    patch = next((p for p in range(old + 1, side + 1) if side % p == 0), None)
    if patch is None:
        raise SystemExit(f"--arms: coarser-patch needs a larger patch than {old} that fits {side} pixels; leave it out")
    return {"network.patch": patch, "network.latent_channels": round(network.latent_channels * (patch / old) ** 2)}


def configured(arm: str, seed: int, images: int, shared: Mapping[str, Any]) -> Config:
    """An arm's training of so many images; warm-up, log and pictures are in proportion."""
    plain = onefold.recipe("digits").with_changes(
        {"objective.reconstruction": "l1", "objective.decoder_noise": 0.5, **shared}
    )
    sizes, changes = plain.network, dict(ARMS[arm])
    for name in ("latent_channels", "depth"):
        if f"network.{name}" in changes:
            changes[f"network.{name}"] = round(changes[f"network.{name}"] * getattr(sizes, name))
    if "network.patch" in changes:
        changes |= coarser(sizes)
    length = {
        "training.images": images,
        "training.warmup": images // 20,
        "training.log_every": max(plain.training.batch, images // 20),
        "training.health_every": images // 4,
        "training.sample_every": images,
        "training.checkpoint_every": images // 2,
        "training.seed": seed,
        "training.compile": "no",  # which "auto" would decide by a run's length
    }
    return plain.with_changes(length | changes)


def worth(distance: float, plain: Mapping[int, float]) -> float:
    """Images with which the plain recipe reaches a distance, by its distances at several numbers of images.

    Between two of them, log distance is linear in log images; beyond all, the answer is the last.
    """
    points = sorted((math.log(images), math.log(found)) for images, found in plain.items())
    at = math.log(distance)
    for (n0, d0), (n1, d1) in pairwise(points):
        if d1 >= d0:
            fewer, more = (round(math.exp(n)) for n in (n0, n1))
            raise SystemExit(f"plain: {more:,} images come no nearer than {fewer:,}; give a larger --budget")
        if at >= d1:
            return math.exp(max(n0, n0 + (n1 - n0) * (at - d0) / (d1 - d0)))
    return math.exp(points[-1][0])


def measured(config: Config, folder: Path, images: int, features: Path | None) -> Record:
    """The record of a run, which is trained and measured if need be."""
    try:
        run = onefold.train(config, folder, resume=(folder / "config.json").exists())
    except UserError as error:
        other, cure, _ = str(error).partition("; config=None")
        if cure:  # the run has other settings
            raise UserError(f"{other}; choose another --out") from None
        raise
    extractor = extractor_for(run.open_data()[0]) if features is None else metrics.from_file(features)
    path = folder / "evaluation" / f"{extractor.sha256[:8]}-{images}.json"
    if not path.exists():
        evaluate(run, images=images, extractor=extractor).write(path)
    return Record.read(path)


def row_of(records: Sequence[Record], gains: Sequence[float], arithmetic: float) -> dict[str, Any]:
    """An arm's numbers by name, each with a value for every seed, and the records' protocols and subjects."""
    found = [record.numbers() for record in records]
    row: dict[str, Any] = {"worth": list(gains), "arithmetic": [arithmetic]}
    row["worth per operation"] = [gain / arithmetic for gain in gains]
    row |= {key: [numbers[key] for numbers in found] for key in found[0]}
    row["records"] = [{name: record[name] for name in ("protocol", "subject")} for record in records]
    return row


def main(
    data: str = "digits",
    features: Path | None = None,
    budget: int = 9_600,
    seeds: int = 1,
    images: int = 1_000,
    arms: tuple[str, ...] = tuple(ARMS),
    change: Annotated[tuple[str, ...], arg(aliases=["-c"])] = (),
    out: Path = Path("runs/images-to-distance"),
    json_file: Path | None = None,
) -> None:
    """Train, evaluate and compare.

    Args:
        data: Images to train on.
        features: File of the feature extractor. Default: a small classifier, as in `onefold evaluate`.
        budget: Images that each arm is trained on, at most 13,333, or the recipe's half-lives cut the longer averages.
        seeds: Each with the training seeds 0 … seeds − 1.
        images: Generated and real images of each evaluation.
        arms: Which to train; plain always is.
        change: Settings of all arms, as name=value.
        out: Folder of the runs.
        json_file: Where the record goes.
    """
    command.check_out(out)
    shared = command.settings_of(change)
    if data != "digits":
        source = open_dataset(data)
        *size, channels = source.image_shape
        fitted = {"network.image_size": tuple(size), "network.channels": channels, "network.classes": source.classes}
        shared = {"data.source": data, "data.test": None, **fitted, **shared}
    if seeds < 1:
        raise SystemExit(f"--seeds: {seeds} is not positive; give at least 1")
    if features is not None:
        metrics.from_file(features)  # before the first training
    if budget < 2:
        raise SystemExit(f"--budget: {budget} is too small to be halved; give at least 2")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--arms: {unknown[0]!r} is not one of {', '.join(ARMS)}")
    shared.setdefault("training.precision", resolve_precision("auto", torch.device("cpu")))  # once, for all arms alike
    budgets = (budget, budget // 2, 2 * budget)
    plain: list[dict[int, float]] = []
    records: dict[str, list[Record]] = {arm: [] for arm in ("plain", *arms)}
    for seed in range(seeds):
        plain.append({})
        trials = [("plain", count) for count in budgets] + [(arm, budget) for arm in records if arm != "plain"]
        for arm, count in trials:
            config = configured(arm, seed, count, shared)
            record = measured(config, out / f"{arm}-{count}-{seed}", images, features)
            distance = record.numbers()["frechet_distance"]
            print(f"{arm}, {count:,} images, seed {seed}: {distance:.2f}", flush=True)
            if arm == "plain":
                plain[-1][count] = distance
            if count == budget:
                records[arm].append(record)
    rows: dict[str, dict[str, Any]] = {}
    for arm, found in records.items():
        distances = [record.numbers()["frechet_distance"] for record in found]
        gains = [worth(at, reached) / budget for at, reached in zip(distances, plain, strict=True)]
        flops = [training_flops(configured(name, 0, budget, shared)) for name in (arm, "plain")]
        rows[arm] = row_of(found, gains, flops[0] / flops[1])
    keys = ("worth", "worth per operation", "arithmetic", "frechet_distance", "class_accuracy", "reconstruction.psnr")
    print(f"\n| {seeds} seed{'s' * (seeds > 1)} | {' | '.join(keys)} |\n|---|{'---:|' * len(keys)}")
    for arm, row in rows.items():
        means = [*map(geometric_mean, (row[key] for key in keys[:2])), *(mean(row[key]) for key in keys[2:])]
        print(f"| {arm} | {' | '.join(f'{value:.3g}' for value in means)} |")
    if json_file is not None:
        about = {"onefold": onefold.__version__, "data": data, "changes": list(change), "budget": budget}
        about |= {"plain": {str(count): [reached[count] for reached in plain] for count in budgets}, "arms": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main)
