"""The study of initialisation: what is it in a teacher's weights that a one-step generator needs?

All arms learn by the density ratio alone; they differ in where generator and ratio network start:

    teacher            both from a diffusion model
    random-ratio, random-generator, random
                       one of them, or both, from random weights
    one-level          both from a teacher trained at a single noise level: it maps noised data to data, but knows no
                       other level
    trunk, ends        the trunk (and its modulation) from the teacher and entrances and exits random, or the opposite
    norms              both from the teacher; the matrices of the trunk stay as they are in both

The teachers diffuse pixels, as in the paper: where encoder, denoiser and decoder are one network, random weights would
lose the decoder too, and the arms would differ in more than they should.

Reference: Zhang, Chen, He et al., 2025 (arXiv 2502.08005).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onefold.errors import UserError
from onefold.recipes import recipe
from onefold.studies.study import Arm, Column, Study

__all__ = ["ARMS", "initialisation"]

POINTS = 20
"""Measurements in a run, and so points in a curve."""

ONE_LEVEL = {"objective.time.kind": "logit_normal", "objective.time.mean": -0.85, "objective.time.std": 1e-3}
"""All times at t = 0.3: as noisy as what one-step generators are often begun from (σ/α = 2.3)."""


def _arm(name: str, title: str, generator: str, critic: str, trains: str = "all", after: str = "diffusion") -> Arm:
    """A one-step generator with weights from an arm before it."""
    changes = {"onestep.generator": generator, "onestep.critic": critic}
    changes |= {"onestep.generator_trains": trains, "onestep.critic_trains": trains}
    return Arm(name, title, changes, family=name, after=after)


ARMS = (
    Arm("diffusion", "diffusion, 50 steps", {}, "diffusion"),
    Arm("diffusion-one-level", "diffusion at one level, 50 steps", ONE_LEVEL, "one-level"),
    _arm("teacher", "both from the teacher", "teacher", "teacher"),
    _arm("random-ratio", "ratio random", "teacher", "random"),
    _arm("random-generator", "generator random", "random", "teacher"),
    _arm("random", "both random", "random", "random"),
    _arm("one-level", "both from a teacher of one level", "teacher", "teacher", after="diffusion-one-level"),
    _arm("trunk", "trunk alone from the teacher", "trunk", "trunk"),
    _arm("ends", "entrances and exits alone", "ends", "ends"),
    _arm("norms", "frozen matrices, trained norms", "teacher", "teacher", "norms"),
)
"""The first two are the teachers: ordinary diffusion models."""

COLUMNS = (
    Column("frechet_distance", "Fréchet distance", 2),
    Column("class_accuracy", "class accuracy", 3),
    Column("precision", "precision", 3),
    Column("recall", "recall", 3),
)


def initialisation(
    data: str | None = None,
    *,
    teacher_budget: int = 64_000,
    budget: int = 48_000,
    seeds: int = 3,
    arms: Sequence[str] | None = None,
    name: str = "digits",
    images: int = 5000,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """The study of initialisation, for `run_study`.

    Args:
        data: Images to train on; default: the recipe's.
        teacher_budget: Images that each teacher is trained on.
        budget: Images that each one-step generator is trained on.
        seeds: Each arm is trained with the seeds 0 … seeds − 1, from the teacher of that seed.
        arms: Names of `ARMS`; their teachers are added. Default: all.
        name: The recipe that gives all other settings.
        images: Generated and reference images of an evaluation.
        changes: Further settings of all arms, such as {"network.width": 64}.

    Raises:
        UserError: a name or number that makes no sense.
    """
    for option, value in (("teacher-budget", teacher_budget), ("budget", budget)):
        if value < 1:
            raise UserError(f"--{option}: {value} is not positive; give at least 1")
    known = {arm.name: arm for arm in ARMS}
    for wanted in arms or ():
        if wanted not in known:
            raise UserError(f"--arms: {wanted!r} is not known; choose of {', '.join(known)}")
    wanted = {needed for arm in arms or known for needed in (arm, known[arm].after)}
    config = recipe(name, **{"network.space": "pixels", **(changes or {})})
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
    chosen = [arm for arm in ARMS if arm.name in wanted]
    length = {"training.images": budget, "onestep.critic_warmup": budget // 8}
    final = tuple(replace(arm, changes={**arm.changes, **length}) if arm.after else arm for arm in chosen)
    arguments = {"recipe": name, "data": source, "teacher-budget": teacher_budget, "budget": budget}
    return Study("initialisation", arguments, config.with_changes(settings), final, seeds, images, COLUMNS)
