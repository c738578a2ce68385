"""The recipe `auto`: a configuration for your own images, derived from the images and from the speed of the machine.

Patch and latents follow from the image size; network and length from the speed measured on the device and the time
available. The network is the largest that can still see `NEEDED` images, since the quality of small networks on the
digits and on CIFAR-10 depended on the number of images seen (`docs/ablations.md`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onefold.compute import can_compile, resolve_device
from onefold.data import Dataset
from onefold.data.messages import count_text
from onefold.errors import UserError
from onefold.estimate import measure
from onefold.networks import NetworkConfig
from onefold.objectives.self_distillation import SelfDistillation
from onefold.pictures.grids import SAMPLES
from onefold.training.config import Config, DataConfig, TrainingConfig
from onefold.training.datasets import open_data, split
from onefold.training.one_run import with_one_step
from onefold.training.phases import training_flops

__all__ = ["SIZES", "Plan", "make_plan", "patch_for", "plan"]

SIZES = ((96, 4, 4), (128, 4, 4), (128, 6, 4), (192, 6, 4), (256, 8, 4), (384, 10, 6), (512, 12, 8), (768, 16, 12))
"""Candidate networks: width, depth, heads."""
NEEDED = 200_000
"""Images that a network must be able to see in the available time to be chosen."""
TOKENS = {"cpu": 64, "cuda": 256}
"""Maximum tokens per image, by device type: the time of a step grows faster than their number."""
BATCH = {"cuda": 256}
"""Images per step, by device type; elsewhere 64."""
FEW = 2_000
"""Number of training images below which they are shifted at random and samples should be checked for copies of them."""
OVERHEAD = 0.9
"""Fraction of the time left for steps; the rest goes into compilation, pictures, health and checkpoints."""
PICTURES = 0.05
"""Fraction of the arithmetic of steps that pictures may take, besides the first and the last."""
LEAST_STEPS = 20
"""Steps of a run, however short the time."""
TRIAL = 4.0
"""Seconds per measurement."""


@dataclass(frozen=True)
class Plan:
    """A configuration, and the reasons for it."""

    config: Config
    reasons: tuple[str, ...]
    """One line each."""
    minutes: float
    """Expected training time."""


def plan(
    data: object,
    *,
    test_data: object = None,
    minutes: float = 30.0,
    one_step: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Plan:
    """A configuration for your own images; `onefold.train(plan.config)` trains with it.

    Args:
        data: Images to train on: the path of a folder or file, or an object as for `onefold.train`.
        test_data: Images used only for evaluation; default: some of `data` are held out.
        minutes: Training time on this device, at least 1.
        one_step: Whether the network also learns to generate in one step, in the same time.
        device: auto, cpu, cuda, …
        say: Called with what is measured and the reasons for each choice, one line each.

    Raises:
        UserError: data that cannot be read or cut into patches, or an invalid number of minutes.
    """
    if isinstance(data, str | Path) and isinstance(test_data, str | Path | None):
        source = DataConfig(str(data), None if test_data is None else str(test_data))
        train, _ = open_data(source)
    else:
        train, test = split(data, test_data, DataConfig())
        source = DataConfig(train.source, None if test_data is None else test.source)
    made = make_plan(train, source, minutes=minutes, one_step=one_step, device=device, say=say)
    for reason in made.reasons:
        say(reason)
    return made


def make_plan(
    data: Dataset,
    source: DataConfig,
    *,
    minutes: float = 30.0,
    one_step: bool = False,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """A configuration for a data set that trains for about `minutes` on the device.

    Args:
        data: The images to train on.
        source: Where they come from, as written into the configuration.
        minutes: Training time, at least 1.
        one_step: Whether the network also learns to generate in one step, in the same time.
        device: auto, cpu, cuda, …
        say: Called with what is being measured, one line each.

    Raises:
        UserError: images that no patch divides, an invalid number of minutes, or a device that is not available.
    """
    if not 1 <= minutes < math.inf:
        wrong = "too short" if minutes < 1 else "not a length of time"
        raise UserError(f"--minutes: {minutes:g} is {wrong}; give at least 1")
    where = resolve_device(device)
    patch = patch_for(data.image_shape[:2], TOKENS.get(where.type, TOKENS["cpu"]))
    smallest = _config(data, source, patch, SIZES[0], device)
    say("measuring this device")
    rate = _images_per_second(smallest) * training_flops(smallest)  # operations per second
    share = training_flops(smallest) / training_flops(with_one_step(smallest)) if one_step else 1.0
    seconds = 60 * minutes * OVERHEAD * share
    fitting = [
        size for size in SIZES if seconds * rate / training_flops(_config(data, source, patch, size, device)) >= NEEDED
    ]
    size = fitting[-1] if fitting else SIZES[0]
    config = _config(data, source, patch, size, device)
    if minutes >= 5 and can_compile(where):
        config = config.with_changes({"training.compile": "yes"})
        say("measuring the compiled network; the first compilation takes half a minute")
    speed = _images_per_second(config)
    config = _with_length(config, speed, seconds)
    expected = config.training.images / speed / 60 / OVERHEAD / share
    reasons = _reasons(config, data, speed, where, minutes=minutes, expected=expected, fits=bool(fitting))
    return Plan(with_one_step(config) if one_step else config, tuple(reasons), expected)


def patch_for(size: tuple[int, int], tokens: int) -> int:
    """The smallest patch, of at least 2 pixels, that cuts images of (H, W) into at most `tokens` tokens.

    Raises:
        UserError: no patch that divides both sides gives so few tokens.
    """
    height, width = size
    common = math.gcd(height, width)
    patches = [p for p in range(2, common + 1) if common % p == 0 and height * width <= tokens * p**2]
    if not patches or patches[0] > 32:
        side = max(8, min(height, width) // 8 * 8)
        raise UserError(
            f"images of {height}×{width} cannot be cut into square patches of a suitable size; convert them: "
            f"onefold data convert SOURCE OUT.zip --size {side}"
        )
    return patches[0]


def _config(data: Dataset, source: DataConfig, patch: int, size: tuple[int, int, int], device: str) -> Config:
    height, width, channels = data.image_shape
    tokens, values = height * width // patch**2, patch**2 * channels
    # A third of the image's values for colour, as in the recipe cifar10; small grey images need more.
    latent_channels = max(4, min(values, 4 * round(values / (12 if channels >= 3 else 8))))
    return Config(
        recipe="auto",
        network=NetworkConfig(
            (height, width), channels, data.classes, patch, latent_channels, width=size[0], depth=size[1], heads=size[2]
        ),
        objective=SelfDistillation(
            reconstruction="l2" if tokens <= 16 else "l1",
            draws=4 if tokens <= 16 else 2,
            shift=0.06 if len(data) < FEW and min(height, width) >= 16 else 0.0,
        ),
        data=source,
        training=TrainingConfig(
            batch=min(BATCH.get(resolve_device(device).type, 64), max(8, len(data))),
            optimizer="muon",
            learning_rate=2e-3 if size[0] <= 128 else 1e-3,
            device=device,
        ),
    )


def _images_per_second(config: Config) -> float:
    return measure(config, TRIAL).images_per_second


def _with_length(config: Config, speed: float, seconds: float) -> Config:
    """As many images as fit into the time, and intervals to match: a picture within two minutes, if that is cheap."""
    batch, role = config.training.batch, config.network.kind.role_flops(config.network)
    picture = SAMPLES * role.sample(config.sampler.evaluations) / training_flops(config)  # in images of training
    images = batch * max(LEAST_STEPS, round(speed * seconds / batch))

    def batches(share: float, most_seconds: float = math.inf) -> int:
        return batch * max(1, round(min(share * images, speed * most_seconds) / batch))

    training = replace(
        config.training,
        images=images,
        warmup=batches(0.05),
        ema_half_lives=(batches(0.06),),
        log_every=batches(0.02, 30),
        health_every=batches(0.05),
        sample_every=max(batches(0.1, 100), batch * math.ceil(picture / PICTURES / batch)),
        checkpoint_every=batches(0.1, 300),
    )
    return replace(config, training=training)


def _reasons(
    config: Config,
    data: Dataset,
    speed: float,
    device: torch.device,
    *,
    minutes: float,
    expected: float,
    fits: bool = True,
) -> list[str]:
    """A line for each choice; `expected` are the minutes that it takes, and no network `fits` that sees too little."""
    network, training = config.network, config.training
    height, width, channels = data.image_shape
    share = network.tokens * network.latent_channels / (height * width * channels)
    epochs = training.images / len(data)
    size = f"the largest network that sees {min(NEEDED, training.images):,} images or more in the given time"
    if not fits:
        size = f"the smallest network, which still sees fewer than {NEEDED:,} images; more --minutes let it see more"
    length = f"each of the {len(data):,} training images {count_text(round(epochs), 'time')}"
    if epochs < 1:
        cure = f"--minutes {math.ceil(expected / epochs):,} would show all"
        length = f"fewer than the {len(data):,} training images, so that some are never seen; {cure}"
    lines = [
        f"patch {network.patch}: images of {height}×{width} become {network.tokens} tokens "
        f"of {count_text(network.latent_channels, 'channel')} each ({share:.2f} of the image's values)",
        f"width {network.width}, depth {network.depth}: {size} ({speed:,.0f} images/s, {device.type})",
        f"{training.images:,} images: {length}",
    ]
    if training.images == LEAST_STEPS * training.batch and expected > minutes:
        lines.append(f"{LEAST_STEPS} steps, the least, take longer than --minutes {minutes:g}")
    if config.objective.shift:
        lines.append(
            "few images: each is shifted by up to 6 % of its size at random (--objective.shift 0 turns this off)"
        )
    if len(data) < FEW:
        lines.append(f"{len(data):,} images can be memorised: check `copies of training images` in `onefold evaluate`")
    return lines
