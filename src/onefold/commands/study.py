"""`onefold study`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from onefold.commands.terminal import console, discard
from onefold.errors import UserError

if TYPE_CHECKING:
    from onefold.studies import Study

__all__ = ["bias", "collapse", "initialisation", "onestep"]


def collapse(
    data: str | None = None,
    budget: int = 19_200,
    seeds: int = 3,
    arms: tuple[str, ...] | None = None,
    draws: int = 1,
    recipe: str = "digits",
    change: tuple[str, ...] = (),
    features: str | None = None,
    images: int = 5000,
    out: Path = Path("runs/study-collapse"),
    jobs: int = 1,
    quiet: bool = False,
) -> None:
    """Compare naive joint training, and each step from it to DSD, under one budget; writes table and pictures.

    Example: onefold study collapse --budget 19200 --seeds 3 --jobs 2

    Args:
        data: Images to train on: digits, or the path of a folder or file. Default: the recipe's.
        budget: Images that each network is trained on.
        seeds: Trainings of each arm, with seeds 0, 1, …
        arms: Arms by name; a wrong one lists all. Default: the nine that docs/ablations.md describes.
        draws: Denoising draws for each encoding, in all arms but those named after their own.
        recipe: The recipe that gives all other settings …
        change: … but these, as name=value, such as network.patch=4.
        features: File of the feature extractor (.safetensors, .pt or .onnx). Default: a small classifier of the data.
        images: Generated and reference images per evaluation, at most as many as there are training images.
        out: The study's folder; an interrupted study in it is continued.
        jobs: Trainings at a time.
        quiet: No progress bar, no lines.
    """
    from onefold import studies  # only here, since it loads matplotlib

    shared = _shared(recipe, change, features, images)
    study = studies.collapse(data, budget=budget, seeds=seeds, arms=arms, draws=draws, **shared)
    _run(study, out, jobs=jobs, quiet=quiet)


def initialisation(
    data: str | None = None,
    teacher_budget: int = 32_000,
    budget: int = 24_000,
    seeds: int = 3,
    arms: tuple[str, ...] | None = None,
    recipe: str = "digits",
    change: tuple[str, ...] = (),
    features: str | None = None,
    images: int = 5000,
    out: Path = Path("runs/study-initialisation"),
    jobs: int = 1,
    quiet: bool = False,
) -> None:
    """Compare what a one-step generator and its ratio network start from, in pixels; writes table and pictures.

    Example: onefold study initialisation --seeds 3 --jobs 2

    Args:
        data: Images to train on: digits, or the path of a folder or file. Default: the recipe's.
        teacher_budget: Images that each teacher, a diffusion model, is trained on.
        budget: Images that each one-step generator is trained on.
        seeds: Trainings of each arm, with seeds 0, 1, …
        arms: Arms by name; a wrong one lists all. Default: all.
        recipe: The recipe that gives all other settings …
        change: … but these, as name=value, such as network.patch=4.
        features: File of the feature extractor (.safetensors, .pt or .onnx). Default: a small classifier of the data.
        images: Generated and reference images per evaluation, at most as many as there are training images.
        out: The study's folder; an interrupted study in it is continued.
        jobs: Trainings at a time.
        quiet: No progress bar, no lines.
    """
    from onefold import studies  # only here, since it loads matplotlib

    shared = _shared(recipe, change, features, images)
    study = studies.initialisation(data, teacher_budget=teacher_budget, budget=budget, seeds=seeds, arms=arms, **shared)
    _run(study, out, jobs=jobs, quiet=quiet)


def onestep(
    data: str | None = None,
    teacher_budget: int = 64_000,
    budget: int = 24_000,
    seeds: int = 3,
    arms: tuple[str, ...] | None = None,
    recipe: str = "digits",
    change: tuple[str, ...] = (),
    features: str | None = None,
    images: int = 5000,
    out: Path = Path("runs/study-onestep"),
    jobs: int = 1,
    quiet: bool = False,
) -> None:
    """Compare divergences, ratio networks and score distillation in one-step training; writes table and pictures.

    Example: onefold study onestep --arms ratio reverse-kl dmd --jobs 2

    Args:
        data: Images to train on: digits, or the path of a folder or file. Default: the recipe's.
        teacher_budget: Images that the teacher is trained on.
        budget: Images that each one-step generator is trained on.
        seeds: Trainings of each arm, with seeds 0, 1, …
        arms: Arms by name; a wrong one lists all. Default: all.
        recipe: The recipe that gives all other settings …
        change: … but these, as name=value, such as network.patch=4.
        features: File of the feature extractor (.safetensors, .pt or .onnx). Default: a small classifier of the data.
        images: Generated and reference images per evaluation, at most as many as there are training images.
        out: The study's folder; an interrupted study in it is continued.
        jobs: Trainings at a time.
        quiet: No progress bar, no lines.
    """
    from onefold import studies  # only here, since it loads matplotlib

    shared = _shared(recipe, change, features, images)
    study = studies.onestep(data, teacher_budget=teacher_budget, budget=budget, seeds=seeds, arms=arms, **shared)
    _run(study, out, jobs=jobs, quiet=quiet)


def bias(
    seeds: int = 8,
    steps: int = 1500,
    widths: tuple[int, ...] | None = None,
    samples: tuple[int, ...] | None = None,
    out: Path = Path("runs/study-bias"),
    quiet: bool = False,
) -> None:
    """Measure bias and variance of the generator's gradient from two learned scores against one learned ratio.

    Example: onefold study bias --out runs/study-bias

    Args:
        seeds: Independent trainings, with seeds 0, 1, …
        steps: Updates of each network.
        widths: Of the denoisers' hidden layers, with the most samples. Default: 4 to 64.
        samples: Numbers of samples of each distribution, with the width 32. Default: 100 to 10,000.
        out: The study's folder.
        quiet: Print nothing.
    """
    from onefold.studies.bias import SAMPLES, WIDTHS, run_bias  # only here, since it loads matplotlib

    say = discard if quiet else console.print
    run_bias(out, seeds=seeds, steps=steps, widths=widths or WIDTHS, samples=samples or SAMPLES, say=say)
    say(f"{out}: bias.md, bias.json, bias.csv, bias.png")


class _Shared(TypedDict):
    """Arguments of all studies whose arms are trained."""

    name: str
    changes: dict[str, Any]
    features: str | None
    images: int


def _shared(recipe: str, change: tuple[str, ...], features: str | None, images: int) -> _Shared:
    return {"name": recipe, "changes": _settings(change), "features": features, "images": images}


def _settings(change: tuple[str, ...]) -> dict[str, Any]:
    """Settings by name; a value is JSON, or else a word."""
    found: dict[str, Any] = {}
    for each in change:
        name, equals, value = each.partition("=")
        if not equals:
            raise UserError(f"--change: {each!r} is not name=value, such as network.patch=4")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _run(study: "Study", out: Path, *, jobs: int, quiet: bool) -> None:
    from onefold import studies

    studies.run_study(study, out, jobs=jobs, say=discard if quiet else console.print, quiet=quiet)
    if not quiet:
        console.print(f"{out}: table.md, table.json, table.csv and pictures")
