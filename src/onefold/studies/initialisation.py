"""The initialisation study: what does a one-step generator need from its teacher's weights?

All arms learn only by the density ratio; they differ in the initial weights of generator and ratio network:

    teacher            both from a diffusion model
    random-ratio, random-generator, random
                       one of them, or both, from random weights
    one-level          both from a teacher trained at a single noise level, which is also the one that the generator
                       starts from: it maps noised data to data there, but knows no other level
    trunk, ends        the trunk (and its modulation) from the teacher and entrances and exits random, or the opposite
    norms              both from the teacher; the matrices of the trunk are frozen in both

The teachers are pixel diffusion models, as in the paper: if encoder, denoiser and decoder were one network, random
weights would lose the decoder too, and the arms would differ in more than they should.

Reference: Zhang, Chen, He et al., 2025 (arXiv 2502.08005).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from onefold.studies.onestep import onestep_study
from onefold.studies.study import MEASURED, Arm, Study

__all__ = ["ARMS", "initialisation"]

ONE_LEVEL = {"objective.time.kind": "logit_normal", "objective.time.mean": -0.85, "objective.time.std": 1e-3}
"""All times at t = 0.3 (σ/α = 2.3), the generator's start in all arms."""


def _arm(name: str, title: str, generator: str, critic: str, trains: str = "all", teacher: str = "diffusion") -> Arm:
    """A one-step generator with weights from an earlier arm."""
    changes = {"onestep.method": "ratio", "onestep.generator": generator, "onestep.critic": critic}
    changes |= {"onestep.generator_trains": trains, "onestep.critic_trains": trains, "onestep.start": 0.3}
    changes["onestep.upkeep"] = 0.0  # it would distil the teacher's denoiser into a random generator
    return Arm(name, title, changes, family=name, teacher=teacher)


ARMS = (
    Arm("diffusion", "diffusion, 50 steps", {}, "diffusion"),
    Arm("diffusion-one-level", "diffusion at one level, 50 steps", ONE_LEVEL, "one-level"),
    _arm("teacher", "both from the teacher", "teacher", "teacher"),
    _arm("random-ratio", "ratio random", "teacher", "random"),
    _arm("random-generator", "generator random", "random", "teacher"),
    _arm("random", "both random", "random", "random"),
    _arm("one-level", "both from a teacher of one level", "teacher", "teacher", teacher="diffusion-one-level"),
    _arm("trunk", "trunk alone from the teacher", "trunk", "trunk"),
    _arm("ends", "entrances and exits alone", "ends", "ends"),
    _arm("norms", "frozen matrices, trained norms", "teacher", "teacher", "norms"),
)
"""The first two are the teachers: ordinary diffusion models."""


def initialisation(
    data: str | None = None,
    *,
    teacher_budget: int = 32_000,
    budget: int = 24_000,
    seeds: int = 3,
    arms: Sequence[str] | None = None,
    name: str = "digits",
    images: int = MEASURED,
    features: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """The initialisation study, for `run_study`; arguments as for `onestep.onestep_study`."""
    return onestep_study(
        "initialisation",
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
        pixels=True,
    )
