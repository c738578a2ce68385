"""Before the first step: a configuration fitted to its data and its machine, and the weights to start from."""

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from onefold import compute
from onefold.data import Dataset
from onefold.sampling import check_guidance
from onefold.training.config import Config
from onefold.training.graphs import check_graphs
from onefold.training.phases import length, names_of_phases, phases_of, training_flops

__all__ = ["decide", "fit_to_data", "mirror_note"]

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
    say(f"{device.type}, {precision} ({why}), {about}, {torch.get_num_threads()} threads")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if device.type == "cpu" and load > cores and torch.get_num_threads() > 1:
        say(
            f"the machine is busy (load {load:.1f} on {cores} cores): threads that wait for one another crawl; "
            "OMP_NUM_THREADS=1 may be faster"
        )
    return replace(config, training=replace(training, precision=precision, compile=compiled))
