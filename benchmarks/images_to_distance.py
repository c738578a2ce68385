r"""Images that training needs to reach a distance, with one setting changed at a time.

    python benchmarks/images_to_distance.py --data fashion-mnist --features features-fashion.safetensors \
        -c network.patch=4 network.latent_channels=8 --out runs/speed --json-file speed.json
    python benchmarks/images_to_distance.py --budget 19200 --arms plain min-snr     # on the digits

The plain recipe is trained at half, once and twice the budget, and every arm once, all with schedules of that length.
A line is fitted to log distance against log images of the plain runs. An arm is `worth` r if the plain recipe, on this
line, reaches its distance with r times as many images as the arm saw; per operation, r is divided by the arm's
arithmetic per image in units of the plain recipe's. What the plain recipe itself is worth, not quite 1, and how that
differs from seed to seed, shows what chance does.

`plain` is the recipe `digits` with the losses of `fashion` and `cifar10`: L1, and noised latents for the decoder. What
the package does not have is made here, from outside it: register tokens, and a representation loss, by which tokens in
the middle of the denoiser come to predict what the average's own trunk makes of the clean image, or of a cleaner
latent, one block from its end.

A finished run is neither trained nor measured again; an interrupted one is continued.

References: registers: Darcet et al., 2024 (arXiv 2309.16588); representation loss: Yu et al., 2025 (arXiv 2410.06940),
and with the network's own features Jiang et al., 2025 (arXiv 2505.02831).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int64
from torch import Tensor, nn
from tyro.conf import arg

import onefold
from onefold import metrics, networks
from onefold.data import open_dataset
from onefold.evaluation import evaluate
from onefold.metrics import Record
from onefold.networks import NetworkConfig, OneFold, RoleFlops, Trunk
from onefold.networks.jump import Jump
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
    """A trunk with learned tokens of no place before the others, which can read them; they leave before the exit."""

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
        self.trunk = RegisteredTrunk(config.width, config.depth, config.heads, *config.grid)
        self.jump = Jump(self.trunk, config.jump_rank)

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
        h, self.middle = self.trunk.norm(states[-1]), states[len(states) // 2 - 1][len(z) :]
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
    "min-snr": {"objective.weighting": "min_snr"},
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
"""Settings that differ from the plain recipe's; of the network's channels and depth, by which factor."""


def coarser(network: NetworkConfig) -> dict[str, int]:
    """The next larger patch that fits the images, and channels for about as many latent values of an image."""
    side, old = math.gcd(*network.image_size), network.patch
    patch = next(p for p in range(old + 1, side + 1) if side % p == 0)
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
    }
    return plain.with_changes(length | changes)


def worth(distance: float, plain: Mapping[int, Sequence[float]]) -> float:
    """Images with which the plain recipe reaches a distance, by its distances at several numbers of images.

    On the least-squares line through log distance against log images.
    """
    points = [(math.log(images), math.log(found)) for images, seen in plain.items() for found in seen]
    n, d = (mean(axis) for axis in zip(*points, strict=True))
    slope = sum((x - n) * (y - d) for x, y in points) / sum((x - n) ** 2 for x, _ in points)
    return math.exp(n + (math.log(distance) - d) / slope)


def measured(config: Config, folder: Path, images: int, features: Path | None) -> Record:
    """The record of a run, which is trained if need be."""
    path = folder / "evaluation" / "benchmark.json"
    if path.exists():
        return Record.read(path)
    begun = (folder / "config.json").exists()
    run = onefold.train(None, folder, resume=True) if begun else onefold.train(config, folder)
    extractor = None if features is None else metrics.from_file(features)
    record = evaluate(run, images=images, extractor=extractor)
    record.write(path)
    return record


def row_of(
    arm: str, records: Sequence[Record], budget: int, plain: Mapping[int, Sequence[float]], shared: Mapping[str, Any]
) -> dict[str, Any]:
    """An arm's numbers by name, each with a value for every seed, and the records' protocols and subjects."""
    found = [record.numbers() for record in records]
    arithmetic = training_flops(configured(arm, 0, budget, shared)) / training_flops(
        configured("plain", 0, budget, shared)
    )
    gains = [worth(numbers["frechet_distance"], plain) / budget for numbers in found]
    row: dict[str, Any] = {"worth": gains, "arithmetic": [arithmetic]}
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
        budget: Images that each arm is trained on; the plain recipe also half and twice as many.
        seeds: Each with the training seeds 0 … seeds − 1.
        images: Generated and real images of each evaluation.
        arms: Which to train; plain always is.
        change: Settings of all arms, as name=value.
        out: Folder of the runs.
        json_file: Where the record goes.
    """
    shared: dict[str, Any] = {name: json.loads(value) for name, value in (each.split("=", 1) for each in change)}
    if data != "digits":
        source = open_dataset(data)
        *size, channels = source.image_shape
        fitted = {"network.image_size": tuple(size), "network.channels": channels, "network.classes": source.classes}
        shared = {"data.source": data, "data.test": None, **fitted, **shared}
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--arms: {unknown[0]!r} is not one of {', '.join(ARMS)}")
    budgets = (budget, budget // 2, 2 * budget)
    plain: dict[int, list[float]] = {count: [] for count in budgets}
    records: dict[str, list[Record]] = {arm: [] for arm in ("plain", *arms)}
    for seed in range(seeds):
        trials = [("plain", count) for count in budgets] + [(arm, budget) for arm in records if arm != "plain"]
        for arm, count in trials:
            config = configured(arm, seed, count, shared)
            record = measured(config, out / f"{arm}-{count}-{seed}", images, features)
            distance = record.numbers()["frechet_distance"]
            print(f"{arm}, {count:,} images, seed {seed}: {distance:.2f}", flush=True)
            if arm == "plain":
                plain[count].append(distance)
            if count == budget:
                records[arm].append(record)
    rows = {arm: row_of(arm, found, budget, plain, shared) for arm, found in records.items()}
    keys = ("worth", "arithmetic", "worth per operation", "frechet_distance", "class_accuracy", "reconstruction.psnr")
    print(f"\n| {seeds} seeds | {' | '.join(keys)} |\n|---|{'---:|' * len(keys)}")
    for arm, row in rows.items():
        print(f"| {arm} | {' | '.join(f'{mean(row[key]):.3g}' for key in keys)} |")
    if json_file is not None:
        about = {"onefold": onefold.__version__, "data": data, "changes": list(change), "budget": budget}
        about |= {"plain": {str(count): seen for count, seen in plain.items()}, "arms": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
