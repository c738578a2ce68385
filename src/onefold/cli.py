"""The command `onefold`.

Each command is a function: its parameters are the options, its docstring the help. This file parses, calls and
prints; the work is done elsewhere. Wrong input ends with exit code 2 and one line on stderr, an aborted training
with 3, SIGTERM with 143 and Ctrl-C with 130, both after a checkpoint.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from onefold import __version__, tables
from onefold.arguments import parse
from onefold.data import contact_sheet, convert, describe, inspect, open_dataset, read_all
from onefold.errors import TrainingAborted, UserError, writing
from onefold.recipes import RECIPES, recipe
from onefold.sampling import Sampler
from onefold.training.config import Config

__all__ = ["main", "run"]

console = Console(highlight=False, soft_wrap=True)


# --- commands ---------------------------------------------------------------------------------------------------------


def train(arguments: list[str]) -> None:
    """Train one network, end to end."""
    from onefold.training.loop import train as train_run

    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and not {"--resume", "--help", "-h"} & set(arguments):
        raise UserError(f"train: give a recipe first, one of {', '.join(RECIPES)}; see `onefold train --help`")
    name, options = (arguments[0], arguments[1:]) if named else ("digits", arguments)
    default = recipe(name)

    def train_recipe(
        data: str | None = None,
        test_data: str | None = None,
        unreadable: Literal["refuse", "skip"] = default.data.unreadable,
        architecture: Literal["one-network", "three-networks"] | None = None,
        out: Path | None = None,
        resume: bool = False,
        steps: int | None = None,
        on_collapse: Literal["warn", "stop", "ignore"] | None = None,
        quiet: bool = False,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Train one network, end to end. RECIPE comes first: digits, cifar10, imagenet256-s, -m or -b.

        Example: onefold train cifar10 --data cifar10-train.zip --out runs/cifar10 --training.batch 128

        Args:
            data: Images to train on: digits, a folder, .zip, .npz or .parquet. Default: the recipe's.
            test_data: Images for evaluation alone. Default: a part set apart from the data.
            unreadable: Stop at an image that cannot be read, or leave it out.
            architecture: One network, or the baseline of three, trained in two stages. Default: the recipe's.
            out: The run's folder. Default: runs/RECIPE.
            resume: Continue the run in --out from its newest checkpoint, with its own settings.
            steps: Stop after so many optimiser steps (sets training.images), for a short trial.
            on_collapse: When the latents have collapsed: say so, stop with exit code 3, or log it only. Default: warn.
            quiet: No progress bar, no summary.
            config: All settings of the run; the defaults shown are the recipe's.
        """
        if resume:
            if steps is not None:
                raise UserError("--steps: a resumed run keeps its own length; leave it out, or start a new run")
            finished = train_run(None, out or Path("runs") / name, resume=True, quiet=quiet)
        else:
            config = config.with_changes({"data.unreadable": unreadable})
            if architecture is not None:
                config = config.with_changes({"network.architecture": architecture.replace("-", "_")})
            if on_collapse is not None:
                config = config.with_changes({"training.on_collapse": on_collapse})
            finished = train_run(_worked_in(config, data, test_data, steps), out, quiet=quiet)
        if not quiet:
            tables.show_run(console, finished)

    parse(train_recipe, options, f"onefold train {name if named else 'RECIPE'}")


def _worked_in(config: Config, data: str | None, test_data: str | None, steps: int | None) -> Config:
    """The configuration with --data, --test-data and --steps in it."""
    if data is not None:
        config = config.with_changes({"data.source": data, "data.test": test_data})
    elif test_data is not None:
        config = config.with_changes({"data.test": test_data})
    if steps is not None:
        if steps < 1:
            raise UserError(f"--steps: {steps} is not positive; give at least 1")
        config = config.with_changes({"training.images": steps * config.training.batch})
    return config


def _sampler(run: Path, **wanted: Any) -> Sampler:
    """The run's own sampler (or the default one), with the options that were given."""
    from onefold.training.run import load_run

    own = load_run(run).config.sampler if (run / "checkpoints").is_dir() else Sampler()
    return replace(own, **{name: value for name, value in wanted.items() if value is not None})


def sample(
    run: Positional[Path],
    /,
    n: int = 64,
    out: Path | None = None,
    labels: tuple[int, ...] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Literal["euler", "heun"] | None = None,
    shift: float | None = None,
    seed: int = 0,
    batch: int = 256,
    separate: bool = False,
) -> None:
    """Generate images with a run's network.

    Example: onefold sample runs/digits --n 100 --steps 50 --labels 3 --out threes.png

    Args:
        run: A run's folder, a saved network's folder, or a network on the hub (owner/name).
        n: Number of images.
        out: PNG file of the grid, or folder with --separate. Default: samples.png in the current folder.
        labels: One label for all images, or one for each. Default: (seed + k) mod K.
        steps: Steps of the solver; 1 is one-step generation. Default: the run's, else 50.
        guidance: Weight of classifier-free guidance; 1 is none.
        solver: ODE solver.
        shift: Time shift of the solver's grid.
        seed: Seed of the first image; image k has seed + k.
        batch: Images per call of the network; does not change them.
        separate: Write one PNG per image, named by its seed and label, instead of a grid.
    """
    from onefold import pixels
    from onefold.architecture import Network
    from onefold.sampling import resolve_labels

    network = Network.from_pretrained(run)
    sampler = _sampler(run, steps=steps, guidance=guidance, solver=solver, shift=shift)
    if labels is not None and len(labels) == 1:
        labels = labels * n
    y = resolve_labels(n, labels, seed, network.config.classes)
    images = network.sample(
        n,
        labels=y,
        steps=sampler.steps,
        guidance=sampler.guidance,
        seed=seed,
        solver=sampler.solver,
        shift=sampler.shift,
        guidance_interval=sampler.guidance_interval,
        batch=batch,
    )
    origin = {"network": run, "steps": sampler.steps, "guidance": sampler.guidance, "solver": sampler.solver}
    if separate:
        folder = out or Path("samples")
        for k, image in enumerate(images):
            label = "" if y is None else f"-class{y[k]}"
            seeded = {**origin, "seed": seed + k, "label": "none" if y is None else y[k]}
            pixels.save_png(folder / f"seed{seed + k}{label}.png", image, seeded)
        console.print(f"{n} images in {folder}")
        return
    path = out or Path("samples.png")
    pixels.save_png(path, pixels.grid(images), {**origin, "seeds": f"{seed}…{seed + n - 1}", "labels": y})
    console.print(f"{path}: {n} images, {sampler.steps} steps")


def reconstruct(
    run: Positional[Path],
    images: Positional[tuple[Path, ...]],
    /,
    out: Path = Path("reconstructions.png"),
) -> None:
    """Encode and decode images: above the originals, below what the network makes of them.

    Example: onefold reconstruct runs/digits one.png two.png --out both.png

    Args:
        run: A run's folder or a saved network's folder.
        images: Image files of the network's size, or a data source (folder, .zip, …; its first 30 images).
        out: PNG file to write.
    """
    from onefold.reconstruction import reconstruct_files

    psnr, count = reconstruct_files(run, images, out)
    console.print(f"{out}: {count} images, PSNR {psnr:.2f} dB")


def evaluate(
    run: Positional[Path],
    /,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Literal["euler", "heun"] | None = None,
    shift: float | None = None,
    images: int = 5000,
    seed: int = 0,
    batch: int = 256,
    features: Path | None = None,
    features_sha256: str | None = None,
    features_size: int = 299,
    reference: Path | None = None,
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Measure a run against real images; writes evaluation/….json into the run.

    Example: onefold evaluate runs/digits --steps 50 --json

    Args:
        run: A run's folder.
        steps: Steps of the solver. Default: the run's.
        guidance: Weight of classifier-free guidance; 1 is none.
        solver: ODE solver.
        shift: Time shift of the solver's grid.
        images: Generated and reference images, at most as many as there are training images.
        seed: Seed of the first generated image.
        batch: Images per call of the networks; does not change the result.
        features: Feature extractor: .safetensors, .pt (TorchScript) or .onnx. Default: a small classifier of the data.
        features_sha256: Refuse the features' file if it has another SHA-256.
        features_size: Side to which images are resized for a foreign extractor.
        reference: Statistics of `onefold data stats` to measure a further Fréchet distance against.
        device: auto, cpu, cuda, …
        json: Print the record as JSON.
        quiet: Print nothing but the record.
    """
    from onefold import evaluation, metrics
    from onefold.training.engine import resolve_device
    from onefold.training.run import load_run

    loaded = load_run(run)
    sampler = _sampler(run, steps=steps, guidance=guidance, solver=solver, shift=shift)
    record = evaluation.evaluate(
        loaded,
        sampler=sampler,
        images=images,
        seed=seed,
        batch=batch,
        extractor=metrics.from_file(features, features_sha256, size=features_size) if features else None,
        reference=metrics.Moments.load(reference) if reference else None,
        device=resolve_device(device),
        say=(lambda line: None) if quiet or json else lambda line: console.print(f"[dim]{line}"),
    )
    name = f"{sampler.solver}-{sampler.steps}-guidance-{sampler.guidance:g}-shift-{sampler.shift:g}-seed-{seed}.json"
    path = run / "evaluation" / name
    with writing(path):
        record.write(path)
    if json:
        print(path.read_text(), end="")
    else:
        tables.show_record(console, record)
        console.print(f"{path}")


def data_inspect(source: Positional[str], /, all: bool = False, sheet: Path | None = None) -> None:
    """Say what is in a data source: shapes, ranges, classes, unreadable files, and what to do about them.

    Example: onefold data inspect photos/ --sheet photos.png

    Args:
        source: digits, digits:test, a folder, .zip, .npz or .parquet.
        all: Decode every image, not a sample of 2,000.
        sheet: Also write a contact sheet of 64 images to this PNG file.
    """
    console.print("\n".join(describe(inspect(source, sample=None if all else 2000))), markup=False)
    if sheet is not None:
        with writing(sheet):
            contact_sheet(open_dataset(source, unreadable="skip")).save(sheet, format="PNG")
        console.print(f"{sheet}: contact sheet")


def data_convert(
    source: Positional[str],
    out: Positional[Path],
    /,
    size: int,
    height: int | None = None,
    unreadable: Literal["refuse", "skip"] = "refuse",
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Write a zip of PNG images of one size: resized with a filter against aliasing, cropped at the centre.

    Example: onefold data convert photos/ photos64.zip --size 64

    Args:
        source: A folder, .zip, .npz or .parquet; sizes may be mixed.
        out: The zip to write.
        size: Side of the square images; the width, if --height is given too.
        height: Height, for images that are not square.
        unreadable: Stop at an image that cannot be read, or leave it out.
        overwrite: Replace an existing zip.
        quiet: No progress bar.
    """
    from onefold.training.log import ImageProgress

    with ImageProgress("converting", 1, quiet=quiet) as bar:
        wanted = size if height is None else (height, size)
        done = convert(source, out, wanted, unreadable=unreadable, overwrite=overwrite, progress=bar.of)
    height, width, channels = done.image_shape
    console.print(f"{done.path}: {done.written:,} images of {height}×{width}×{channels}", markup=False)
    if done.enlarged:
        console.print(f"{done.enlarged:,} of them were smaller and have been enlarged", markup=False)
    if done.skipped:
        console.print(f"{len(done.skipped):,} unreadable images left out: {', '.join(done.skipped)}", markup=False)


def data_stats(source: Positional[str], /, out: Path = Path("stats.safetensors"), features: Path | None = None) -> None:
    """Store the feature statistics of a data source, for `onefold evaluate --reference`.

    Example: onefold data stats photos64.zip --out photos64.stats.safetensors

    Args:
        source: digits, digits:test, a folder, .zip, .npz or .parquet.
        out: File to write.
        features: Feature extractor; default: a small classifier of the source.
    """
    from onefold import evaluation, metrics

    data = open_dataset(source)
    extractor = metrics.from_file(features) if features else evaluation.extractor_for(data, console.print)
    images, _ = read_all(data)
    with writing(out):
        metrics.Moments.from_features(extractor.features(images), extractor.sha256).save(out)
    console.print(f"{out}: mean and covariance of {extractor.width} features of {len(data):,} images")


def estimate(
    name: Positional[str], /, seconds: float = 20.0, device: str = "auto", micro_batch: int | None = None
) -> None:
    """Say what a recipe costs: parameters, arithmetic, memory, and the time by a short measurement.

    Example: onefold estimate imagenet256-b --seconds 0

    Args:
        name: A recipe.
        seconds: Length of the measurement; 0 counts only.
        device: auto, cpu, cuda, …
        micro_batch: Images per pass of the measurement.
    """
    from onefold import estimate as costs

    config = recipe(name, **{"training.device": device, "training.micro_batch": micro_batch})
    tables.show_estimate(console, name, config, costs.estimate(config, seconds=seconds))


def study_collapse(
    data: str | None = None,
    budget: int = 19_200,
    seeds: int = 3,
    arms: tuple[str, ...] | None = None,
    draws: int = 1,
    recipe: str = "digits",
    out: Path = Path("runs/study-collapse"),
    jobs: int = 1,
    quiet: bool = False,
) -> None:
    """Compare naive joint training, and each step from it to DSD, under one budget; writes table and pictures.

    Example: onefold study collapse --budget 19200 --seeds 3 --jobs 2

    Args:
        data: Images to train on: digits, a folder, .zip, .npz or .parquet. Default: the recipe's.
        budget: Images that each network is trained on.
        seeds: Trainings of each arm, with seeds 0, 1, …
        arms: Arms by name; a wrong one lists all. Default: the nine that docs/ablations.md describes.
        draws: Denoising draws for each encoding, in all arms but "draws".
        recipe: The recipe that gives all other settings.
        out: The study's folder; an interrupted study in it is continued.
        jobs: Trainings at a time.
        quiet: No progress bar, no lines.
    """
    from onefold.studies import collapse, run_study

    study = collapse(data, budget=budget, seeds=seeds, arms=arms, draws=draws, name=recipe)
    run_study(study, out, jobs=jobs, say=(lambda line: None) if quiet else _say, quiet=quiet)
    if not quiet:
        console.print(f"{out}: table.md, table.json, table.csv, curves.png, spectrum.png, samples.png, …")


def _say(line: str) -> None:
    console.print(line, markup=False)


def demo(out: Path = Path("demo"), seed: int = 0, quiet: bool = False) -> None:
    """Train on the embedded digits, sample, evaluate, and show where the pictures are.

    Example: onefold demo --out demo

    Args:
        out: Folder of the demo; a finished or interrupted one is continued.
        seed: Seed of the training.
        quiet: No progress bar.
    """
    from onefold.demo import run_demo

    run_demo(out, seed, console, quiet=quiet)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
    "estimate": estimate,
    "study collapse": study_collapse,
    "data inspect": data_inspect,
    "data convert": data_convert,
    "data stats": data_stats,
}


# --- parsing ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    from onefold.training.loop import Interrupted

    try:
        _dispatch(arguments)
    except UserError as error:
        return _fail(error, 2)
    except TrainingAborted as error:
        return _fail(error, 3)
    except Interrupted as error:
        return _fail(error, 128 + error.signal)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        tables.show_commands(console, COMMANDS)
        return
    if arguments[0] == "--version":
        console.print(f"onefold {__version__}")
        return
    for words in (2, 1):
        name, rest = " ".join(arguments[:words]), arguments[words:]
        if name == "train":
            return train(rest)
        if name in COMMANDS:
            return parse(COMMANDS[name], rest, f"onefold {name}")
    group = {name: command for name, command in COMMANDS.items() if name.startswith(arguments[0] + " ")}
    if group and arguments[1:] in (["-h"], ["--help"]):
        tables.show_commands(console, group)
        return
    known = ", ".join(group or COMMANDS)
    raise UserError(f"{' '.join(arguments[:2]) if group else arguments[0]}: no such command; choose one of {known}")


def _fail(error: object, code: int) -> int:
    print(f"onefold: {error}", file=sys.stderr)
    return code
