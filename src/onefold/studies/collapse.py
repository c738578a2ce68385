"""The collapse study: what keeps the latents of one network from collapsing.

A diffusion model whose encoder is trained by the plain denoising loss makes its latents easy to denoise instead of
denoising them well. The arms lead from there to DSD one change at a time, with and without the gradient through z_t
(Wang & Zhang, 2025, arXiv 2511.14716; see `docs/method.md`):

    naive       velocity loss, gradient into the target; with and without the latent norm
    stopped     + no gradient into the target
    clean       + the loss is on the clean latent, not on the velocity
    ema         + the target comes from an average of the weights

Where the loss is on the velocity, the network's exit computes the velocity, as in an ordinary diffusion model. The
baseline has three networks, trained in the two stages of latent diffusion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onefold.errors import UserError
from onefold.studies.study import MEASURED, Arm, Column, Study, check_changes, configured, told

__all__ = ["ARMS", "COLUMNS", "FURTHER_ARMS", "collapse"]

POINTS = 30
"""Log lines per run, and thus points per curve."""

OBJECTIVES = {
    "naive": {"objective.loss": "velocity", "network.output": "velocity", "objective.target": "gradient"},
    "stopped": {"objective.loss": "velocity", "network.output": "velocity", "objective.target": "stopped"},
    "clean": {"objective.loss": "clean", "network.output": "clean", "objective.target": "stopped"},
    "ema": {"objective.loss": "clean", "network.output": "clean", "objective.target": "ema"},
}


def _arm(name: str, title: str, objective: str, *, through: bool = False, variant: str = "", **changes: Any) -> Arm:
    """One network with one of the objectives; further changes have `__` for a dot."""
    switches = {**OBJECTIVES[objective], "objective.through": through}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return Arm(name, title, {**switches, **changes}, objective, variant or ("through z_t" if through else ""))


def _choice(name: str, title: str, family: str, variant: str = "", **changes: Any) -> Arm:
    """The arm with onefold's defaults and one other setting, for choosing defaults."""
    return replace(_arm(name, f"EMA target, {title}", "ema", variant=variant, **changes), family=family)


def _three(name: str, title: str, loss: str, variant: str = "", **changes: Any) -> Arm:
    """Three networks in two stages."""
    switches = {"objective.loss": loss, "network.output": loss, "network.architecture": "three_networks"}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    ignored = ("objective.target", "objective.through")
    return Arm(name, title, {**switches, **changes}, "three networks", variant, ignored)


ARMS = (
    _arm("naive-no-norm", "naive, no norm", "naive", through=True, variant="no norm", network__latent_norm="none"),
    _arm("naive", "naive", "naive", through=True),
    _arm("stopped-through", "stop-gradient, through z_t", "stopped", through=True),
    _arm("clean-through", "clean loss, through z_t", "clean", through=True),
    _arm("ema-through", "EMA target, through z_t", "ema", through=True),
    _arm("stopped", "stop-gradient", "stopped"),
    _arm("clean", "clean loss", "clean"),
    _arm("ema", "EMA target (onefold)", "ema"),
    _three("three-networks", "three networks", "clean"),
)
"""Trained unless arms are named."""

FURTHER_ARMS = (
    _choice("draws-2", "2 draws", "draws", "less", objective__draws=2),
    _choice("draws", "4 draws", "draws", objective__draws=4),
    _choice("draws-8", "8 draws", "draws", "more", objective__draws=8),
    _choice("noisier", "noisier t", "times", "less", objective__time__shift=0.5),
    _choice("cleaner", "cleaner t", "times", "more", objective__time__shift=2.0),
    _choice("logit-normal", "logit-normal t", "times", objective__time__kind="logit_normal"),
    _choice("min-snr", "min-SNR weights", "weights", objective__weighting="min_snr"),
    _choice("l1", "L1", "reconstruction", objective__reconstruction="l1"),
    _choice("charbonnier", "Charbonnier", "reconstruction", "more", objective__reconstruction="charbonnier"),
    _choice("velocity-loss", "velocity loss", "loss", objective__loss="velocity", network__output="velocity"),
    _arm("decoder-noise", "EMA target, decoder noise", "ema", variant="decoder noise", objective__decoder_noise=0.5),
    _arm("perceptual", "EMA target, perceptual", "ema", variant="perceptual", objective__perceptual_weight=0.1),
    _arm("ema-no-norm", "EMA target, no norm", "ema", variant="no norm", network__latent_norm="none"),
    _arm("ema-image-norm", "EMA target, norm per image", "ema", variant="image norm", network__latent_norm="rms_image"),
    _arm("ema-velocity-exit", "EMA target, velocity exit", "ema", variant="other exit", network__output="velocity"),
    _arm("naive-clean-exit", "naive, clean exit", "naive", through=True, variant="other exit", network__output="clean"),
    _arm("stopped-clean-exit", "stop-gradient, clean exit", "stopped", variant="other exit", network__output="clean"),
    _three("three-networks-velocity", "three networks, velocity", "velocity", "other exit"),
    _three("three-networks-compute", "three networks, equal compute", "clean", "compute", network__equal="compute"),
)
"""Trained only if named."""


COLUMNS = (
    Column("reconstruction.psnr", "PSNR (dB)", 2),
    Column("class_accuracy", "class accuracy", 3),
    Column("frechet_distance", "Fréchet distance", 2),
    Column("latent.effective_rank", "effective rank, token", 2),
    Column("latent.effective_rank_whole", "effective rank, whole", 1),
    Column("latent.std", "latent std", 3),
    Column("training.images_per_second", "images/s", 0),
)


def collapse(
    data: str | None = None,
    *,
    budget: int = 19_200,
    seeds: int = 3,
    arms: Sequence[str] | None = None,
    draws: int = 1,
    name: str = "digits",
    images: int = MEASURED,
    features: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """The collapse study, for `run_study`.

    Args:
        data: Images to train on; default: the recipe's.
        budget: Images that each network is trained on.
        seeds: Each arm is trained with the seeds 0 … seeds − 1.
        arms: Names of `ARMS` and `FURTHER_ARMS`; default: all `ARMS`.
        draws: Pairs (t, ε) per encoding, in all arms except those named after their own number of draws.
        name: The recipe that gives all other settings.
        images: Generated and reference images per evaluation.
        features: File of the feature extractor. Default: a small classifier of the data.
        changes: Further settings of all arms, such as {"network.width": 64}.

    Raises:
        UserError: an invalid name or number.
    """
    for option, value in (("budget", budget), ("draws", draws)):
        if value < 1:
            raise UserError(f"--{option}: {value} is not positive; give at least 1")
    known = {arm.name: arm for arm in (*ARMS, *FURTHER_ARMS)}
    unknown = [wanted for wanted in arms or () if wanted not in known]
    if unknown:
        raise UserError(f"--arms: {unknown[0]!r} is not known; choose from {', '.join(known)}")
    config = configured(name, changes or {})
    source, batch = data or config.data.source, config.training.batch
    if source != config.data.source:
        config = config.with_changes({"data.source": source, "data.test": None})
    settings = {
        "objective.draws": draws,
        "objective.reconstruction": "l2",  # as in the paper
        "training.images": budget,
        "training.log_every": max(batch, budget // POINTS),
        "training.health_every": max(batch, budget // POINTS),
        "training.sample_every": budget,
        "training.checkpoint_every": max(batch, budget // 4),
        "training.on_collapse": "ignore",  # it is what the study is about
    }
    selected = ARMS if arms is None else tuple(known[wanted] for wanted in arms)
    check_changes(changes or {}, settings, selected)
    arguments = {"recipe": name, "data": source, "change": told(changes), "features": features}
    arguments |= {} if images == MEASURED else {"images": images}
    arguments |= {"budget": budget, "draws": draws}
    config = config.with_changes(settings)
    return Study("collapse", arguments, config, selected, seeds, images, COLUMNS, features=features)
