"""Before the first step: a configuration fitted to its data and its machine, and the weights to start from.

A run that goes on does so with its own configuration and weights; what else is given or has changed is refused or said.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from onefold import compute, settings
from onefold.data import Dataset
from onefold.data.messages import count_text
from onefold.errors import UserError
from onefold.files import sha256_of
from onefold.networks import Network
from onefold.networks.source import locate
from onefold.sampling import check_guidance
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.datasets import placed
from onefold.training.graphs import check_graphs
from onefold.training.phases import in_batches, length, names_of_phases, phases_of, training_flops
from onefold.training.run import Run
from onefold.training.state import seeded

__all__ = ["IN_MEMORY", "beginning", "check_fit", "check_same", "decide", "difference", "fit_to_data", "mirror_note"]
__all__ += ["start_notes"]

IN_MEMORY = "a network in memory"
"""What a run began with, where that was no file."""
LONG_RUN = 5e12
"""Operations of a whole training from which the half minute of compilation pays."""


def fit_to_data(config: Config, data: Dataset) -> Config:
    """The configuration with the network's image size, channels and classes taken from the data, and its phases named.

    The names of the classes are kept where they are not just their numbers. A network with `classes` = 0 stays
    unconditional. Whether images are mirrored is decided, if it was not.

    Raises:
        UserError: a patch that does not divide the images, a sampler with guidance where there are no classes, or
            settings that make no sense for a phase.
    """
    height, width, channels = data.image_shape
    classes = data.classes if config.network.classes else 0
    numbers = tuple(map(str, range(classes)))
    names = () if not classes or data.class_names == numbers else data.class_names
    kind = {"image_size": (height, width), "channels": channels, "classes": classes, "class_names": names}
    network = replace(config.network, **kind)
    _ = network.grid  # says so if the patch does not divide the images
    check_guidance(config.sampler.guidance, classes)
    flip = config.data.may_be_mirrored if config.objective.flip is None else config.objective.flip
    objective = replace(config.objective, flip=flip)
    config = replace(config, network=network, objective=objective, phases=names_of_phases(config))
    phases_of(config)
    return config


def mirror_note(wanted: Config, fitted: Config) -> str | None:
    """What is said of mirroring, where nobody asked for it or against it; None where there is nothing to say."""
    if wanted.objective.flip is not None or not wanted.data.mirrored:
        return None
    if fitted.objective.flip:
        return "images are mirrored left to right at random; --objective.flip False leaves them as they are"
    own = f"recipe {wanted.recipe} does so with its own data alone"
    return f"images are not mirrored ({own}); --objective.flip True mirrors them, if left and right mean the same"


def decide(config: Config, device: torch.device, say: Callable[[str], None] = lambda line: None) -> Config:
    """The settings with every "auto" decided, by measurement where it takes one; a resumed run has decided already.

    `say` is told, in a line, what was chosen and why.

    Raises:
        UserError: `compile="yes"` where nothing can be compiled, `graphs="yes"` where there are none, or TF32 where
            there is none.
    """
    training = config.training
    compute.check_precision("training.precision", training.precision, device)
    compiled = training.compile
    if compiled == "auto":
        work = length(config) * training_flops(config)
        compiled = "yes" if work >= LONG_RUN and compute.can_compile(device) else "no"
    elif compiled == "yes":
        compute.require_compiler("training.compile", device)
    check_graphs(training, device)
    precision, why = training.precision, "as wanted"
    if precision == "auto":
        times = compute.speed_up(device)
        precision = compute.precision_for_speed_up(times)
        why = f"bfloat16 products are {times:.1f} times as fast here as float32 ones"
    about = "compiled" if compiled == "yes" else "not compiled"
    say(f"{device.type}, {precision} ({why}), {about}, {count_text(torch.get_num_threads(), 'thread')}")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        say(
            f"the machine is busy (load {load:.1f} on {cores} cores): threads that wait for one another crawl; "
            "OMP_NUM_THREADS=1 may be faster"
        )
    return replace(config, training=replace(training, precision=precision, compile=compiled))


# --- the weights to start from ----------------------------------------------------------------------------------------


def beginning(config: Config, source: Network | None = None) -> Network:
    """The network that the first phase makes of a given one, or else of the one that the configuration names.

    What is random about it comes from the run's seed.

    Raises:
        UserError: the network named is gone, has been replaced since, or is not for this phase.
    """
    if source is None:
        source = Network.from_pretrained(config.start)
        path = locate(config.start) / "model.safetensors"
        if config.start_sha256 not in ("", sha256_of(path)):
            cure = "restore it, or start a new run from what is there now"
            raise UserError(f"{path}: is not the network that the run was to begin with (another SHA-256); {cure}")
    with seeded(config.training.seed):
        return phases_of(config)[0].begin_from(source)


def start_notes(run: Run) -> list[str]:
    """What is said of a run that goes on with weights of its own, where those that it began with have been replaced."""
    start, expected = run.config.start, run.config.start_sha256
    if not expected or not Path(start).exists() or not checkpoints(run.folder):
        return []
    if sha256_of(locate(start) / "model.safetensors") in ("", expected):
        return []
    return [f"note: {start}: holds another network than the one that this run began with; it goes on with its own"]


# --- a run that goes on -----------------------------------------------------------------------------------------------


def check_fit(run: Run) -> None:
    """A run goes on with the kind of data that it began with.

    Raises:
        UserError: images of other sizes or classes.
    """
    config, (data, _) = run.config, run.open_data()
    if fit_to_data(config, data) != config:
        network, shape = config.network, data.image_shape
        if network.classes == data.classes and (*network.image_size, network.channels) == shape:
            raise UserError(
                f"{config.data.source}: its classes have other names than when the run began; restore the data or "
                "start a new run"
            )
        classes = count_text(data.classes, "class", "classes")
        raise UserError(
            f"{config.data.source}: now holds {shape} with {classes}, but the run began with "
            f"{(*network.image_size, network.channels)} and {network.classes}; restore the data or start a new run"
        )


def check_same(config: Config, run: Run, images: int | None = None, *, moved: bool = False) -> None:
    """A run goes on with the settings that it began with; see `difference`.

    Raises:
        UserError: naming the first that is given otherwise.
    """
    found = difference(config, run, images, moved=moved)
    if found is not None:
        name, given, own = found
        cure = "config=None goes on with that" + (", images=… makes it longer" if name == "training.images" else "")
        raise UserError(f"{name}: {given!r}, but the run in {run.folder} has {own!r}; {cure}, or start a new run")


def difference(
    config: Config, run: Run, images: int | None = None, *, moved: bool = False
) -> tuple[str, Any, Any] | None:
    """The first setting in which a configuration, fitted to a run's data, is not the run's: its name, and both values.

    What the run has decided for itself is no difference, nor is the length that it had before it was made longer, or
    is to have (`images`), nor the place of data that are given anew (`moved`) or a network that was in memory.
    """
    own = run.config
    decided: dict[str, tuple[Any, Any]] = {
        "objective.flip": (config.objective.flip, own.objective.flip),
        "training.precision": (config.training.precision, own.training.precision),
        "training.compile": (config.training.compile, own.training.compile),
    }
    config = config.with_changes({name: mine for name, (given, mine) in decided.items() if given in (None, "auto")})
    if own.start == IN_MEMORY:
        config = replace(config, network=own.network, start=own.start)
    datasets = run.open_data()
    data = replace(config.data, source=own.data.source, test=own.data.test) if moved else placed(config.data, datasets)
    config = fit_to_data(replace(config, data=data), datasets[0])
    described = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    lengths = [each["from"] for each in described.get("extensions", ())] + ([] if images is None else [images])
    if length(config) in {in_batches(each, config.training.batch) for each in lengths}:
        config = config.with_changes({"training.images": own.training.images})
    pairs = zip(settings.each(config), settings.each(own), strict=True)
    return next(((name, given, mine) for (name, given), (_, mine) in pairs if given != mine), None)
