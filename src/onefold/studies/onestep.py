"""The one-step study: methods, divergences, and the make-up of the ratio network.

    diffusion          the teacher, in many steps
    ratio              by a density ratio: Jensen–Shannon divergence, a ratio network as deep as the teacher
    <divergence>       the others of the family
    half, norms        a ratio network with the first half of the blocks; one whose matrices stay the teacher's
    no-penalty, strong-penalty, uncalibrated, two-updates, renoised, level-normalised
                       one option changed each
    start-0, start-0-1, …
                       the generator starts at t₀ = 0, that is from noise, at 0.1, …
    score, dmd, dmd-adversarial
                       by the difference of two scores, on the same backbone
    low-rank           by scores, as a low-rank change of the teacher, the default of `onefold onestep`

For each seed, all arms start from the same teacher and see the same number of images. All weights learn, but for
`low-rank`. `onestep_study` creates such studies.

Reference: Zhang, Chen, He et al., 2025 (arXiv 2502.08005).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onefold.errors import UserError
from onefold.networks.jump import RANK
from onefold.studies.study import MEASURED, Arm, Column, Study, check_changes, configured, told

__all__ = ["ARMS", "onestep", "onestep_study"]

POINTS = 20
"""Measurements per run, and thus points per curve."""
WARMUP = 8
"""The critic's warm-up takes one in this many images of a one-step run."""

COLUMNS = (
    Column("frechet_distance", "Fréchet distance", 2),
    Column("class_accuracy", "class accuracy", 3),
    Column("precision", "precision", 3),
    Column("recall", "recall", 3),
    Column("reconstruction.psnr", "PSNR (dB)", 1),
    Column("training.images_per_second", "images/s", 0),
)


def _arm(name: str, title: str, family: str, variant: str = "", **changes: Any) -> Arm:
    """A one-step generator with changes to `config.onestep`, with `__` for a dot."""
    named = {"onestep.method": "ratio"} | {f"onestep.{key.replace('__', '.')}": value for key, value in changes.items()}
    return Arm(name, title, named, family, variant, teacher="diffusion")


def _low_rank(name: str, title: str, variant: str) -> Arm:
    """The default of `onefold onestep`: by scores, as a change of a teacher that stays as it is."""
    arm = _arm(name, title, "scores", variant, method="score")
    return replace(arm, changes={**arm.changes, "network.jump_rank": RANK})


ARMS = (
    Arm("diffusion", "diffusion, 50 steps", {}, "diffusion"),
    _arm("ratio", "Jensen–Shannon (default)", "ratio"),
    _arm("reverse-kl", "reverse KL", "divergence", ratio__divergence="reverse_kl"),
    _arm("non-saturating", "non-saturating", "divergence", "1", ratio__divergence="non_saturating"),
    _arm("forward-kl", "forward KL", "divergence", "2", ratio__divergence="forward_kl"),
    _arm("hellinger", "squared Hellinger", "divergence", "3", ratio__divergence="squared_hellinger"),
    _arm("skew", "skewed JS, α = 0.1", "divergence", "4", ratio__divergence="skew_jensen_shannon"),
    _arm("half", "ratio of half the depth", "network", critic_blocks=2),
    _arm("norms", "ratio with frozen matrices", "network", "1", critic_trains="norms"),
    _arm("no-penalty", "no penalty", "options", ratio__penalty=0.0),
    _arm("strong-penalty", "penalty 0.1", "options", "6", ratio__penalty=0.1),
    _arm("uncalibrated", "ratio not calibrated", "options", "1", ratio__calibrated=False),
    _arm("two-updates", "two ratio updates", "options", "2", critic_updates=2),
    _arm("renoised", "a quarter of inputs renoised", "options", "3", renoised=0.25),
    _arm("level-normalised", "weights normalised by level", "options", "4", ratio__level_normalised=True),
    *(
        _arm(f"start-{start:g}".replace(".", "-"), f"from t₀ = {start:g}", "start", str(k), start=start)
        for k, start in enumerate((0.0, 0.1, 0.2, 0.4, 0.5))
    ),
    _arm("score", "scores (Diff-Instruct)", "scores", method="score"),
    _arm("dmd", "scores, normalised (DMD)", "scores", "1", method="dmd"),
    _low_rank("low-rank", "scores, low-rank changes", "2"),
    _arm("dmd-adversarial", "DMD, adversarial", "scores", "3", method="dmd", score__adversarial=0.1),
)


def onestep(
    data: str | None = None,
    *,
    teacher_budget: int = 64_000,
    budget: int = 24_000,
    seeds: int = 3,
    arms: Sequence[str] | None = None,
    name: str = "digits",
    images: int = MEASURED,
    features: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """The one-step study, for `run_study`; arguments as for `onestep_study`."""
    return onestep_study(
        "onestep",
        ARMS,
        data,
        teacher_budget=teacher_budget,
        budget=budget,
        seeds=seeds,
        arms=arms,
        name=name,
        images=images,
        features=features,
        changes=changes,
    )


def onestep_study(
    study: str,
    known_arms: Sequence[Arm],
    data: str | None,
    *,
    teacher_budget: int,
    budget: int,
    seeds: int,
    arms: Sequence[str] | None,
    name: str,
    images: int,
    features: str | None,
    changes: Mapping[str, Any] | None,
    pixels: bool = False,
) -> Study:
    """A study whose arms turn arms trained before them into one-step generators.

    Args:
        study: Its name on the command line.
        known_arms: All arms; an arm comes after its `teacher`.
        data: Images to train on; default: the recipe's.
        teacher_budget: Images that each teacher is trained on.
        budget: Images that each one-step generator is trained on.
        seeds: Each arm is trained with the seeds 0 … seeds − 1, from the teacher of that seed.
        arms: Names of arms; their teachers are added. Default: all.
        name: The recipe that gives all other settings.
        images: Generated and reference images per evaluation.
        features: File of the feature extractor, also of the log. Default: a small classifier of the data.
        changes: Further settings of all arms, such as {"network.width": 64}.
        pixels: Without a codec, unless `changes` say otherwise.

    Raises:
        UserError: an invalid name or number.
    """
    for option, value in (("teacher-budget", teacher_budget), ("budget", budget)):
        if value < 1:
            raise UserError(f"--{option}: {value} is not positive; give at least 1")
    known = {arm.name: arm for arm in known_arms}
    named = list(known if arms is None else arms)
    if not named:
        raise UserError("--arms: none given; leave the option out for all")
    for wanted in named:
        if wanted not in known:
            raise UserError(f"--arms: {wanted!r} is not known; choose from {', '.join(known)}")
        if named.count(wanted) > 1:
            raise UserError(f"--arms: {wanted} is given twice")
    wanted = {needed for arm in named for needed in (arm, known[arm].teacher)}
    without = {"network.architecture": "pixels"} if pixels else {}
    config = configured(name, {**without, **(changes or {})})
    source, batch = data or config.data.source, config.training.batch
    if source != config.data.source:
        config = config.with_changes({"data.source": source, "data.test": None})
    every = max(batch, budget // POINTS)
    settings = {
        "training.images": teacher_budget,
        "training.log_every": every,
        "training.health_every": every,
        "training.sample_every": max(teacher_budget, budget),
        "training.checkpoint_every": max(batch, budget // 4),
        "training.on_collapse": "ignore",  # what becomes of an arm is what the study is about
    }
    length: dict[str, Any] = {
        "training.images": budget,
        "training.health_every": every,
        "onestep.critic_warmup": budget // WARMUP,
    }
    length |= {} if features is None else {"onestep.features": features}
    selected = tuple(
        replace(arm, changes={**arm.changes, **length}) if arm.teacher else arm
        for arm in known_arms
        if arm.name in wanted
    )
    check_changes(changes or {}, settings, selected)
    arguments = {"recipe": name, "data": source, "change": told(changes), "features": features}
    arguments |= {} if images == MEASURED else {"images": images}
    arguments |= {"teacher-budget": teacher_budget, "budget": budget}
    further: dict[str, Any] = {"features": features, "changes": changes or {}}
    config = config.with_changes(settings)
    return Study(study, arguments, config, selected, seeds, images, COLUMNS, shows_settings=False, **further)
