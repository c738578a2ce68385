"""The cost of a recipe before it is run: parameters, arithmetic, memory and time.

Parameters, arithmetic and state are counted; time and peak memory are measured over a few real training steps with
random images on the current device, in each section of the run in which the same parts of a step have turns. The
largest micro-batch follows from the free memory and from the growth of peak memory between half and all of the measured
micro-batch:

    growth per image = (peak(n) − peak(n / 2)) / (n / 2)
    largest          = n + (9/10 · available memory − peak of the steps) / growth

Of the steps' times the median counts: on a busy machine some take several times as long as the others.

All of it is of usual steps. Recorded as CUDA graphs (`training.graphs`) they are faster, and a recording keeps a step's
activations beside those of other work: pictures, and the first steps of another kind. Each image then counts twice.
"""

import itertools
import math
import re
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onefold.compute import eager, products, require_compiler, resolve_device, resolve_precision
from onefold.data.loader import IN_MEMORY
from onefold.errors import UserError
from onefold.networks.base import Network, build, parameter_shares
from onefold.training.config import Config
from onefold.training.graphs import check_graphs
from onefold.training.log import peak_memory
from onefold.training.optimizer import moments_of
from onefold.training.phases import Phase, length, phases_of, training_flops
from onefold.training.state import TrainingState
from onefold.training.step import accumulate, training_step

__all__ = ["Estimate", "Measurement", "estimate", "largest_micro_batch", "measure"]

BUSY = 1.25
"""Spread of the steps' times from which the machine is said to be busy."""
FILLED = 0.9
"""Fraction of the available memory that the largest micro-batch fills; the rest is for pictures and fragmentation."""


@dataclass(frozen=True)
class Measurement:
    """Measurement of a few training steps on this device."""

    device: str
    precision: str
    compiled: bool
    graphs: bool
    """Whether the run records its steps. The speed is that of usual ones; what a recording keeps is counted below."""
    batch: int
    """Images per optimizer step …"""
    micro_batch: int
    """… and per forward and backward pass within it."""
    images_per_second: float
    """Over all phases."""
    peak_memory: int
    """Bytes on the device, or of the whole process on a CPU."""
    bytes_per_image: float | None
    """Growth of peak memory per image of a pass; None where no growth was measured."""
    largest_micro_batch: int | None
    """Images per pass that fit into free memory; None where growth or free memory is unknown."""
    spread: float = 1.0
    """Of the steps' times, the third quartile over the first, in the section where they differ most."""

    @property
    def busy(self) -> bool:
        """Whether steps differ so much in time that something else must be at work."""
        return self.spread > BUSY


@dataclass(frozen=True)
class Estimate:
    """The cost of a recipe."""

    parameters: int
    share: float
    """Fraction of the parameters that serves all three roles."""
    latent_ratio: float
    """Values in a latent per value in an image."""
    flops_per_image: float
    """Training: forward and backward passes of one image."""
    flops_per_sample: float
    """Sampling one image with the run's sampler, including decoding …"""
    steps: int
    """… and the steps of that sampler."""
    state_bytes: int
    """Weights, gradients, optimizers and averages, in float32, of the phase with most."""
    images: int
    measured: Measurement | None

    @property
    def seconds(self) -> float | None:
        """Expected time of the whole run on the measured device."""
        return self.images / self.measured.images_per_second if self.measured else None


def estimate(config: Config, *, seconds: float = 20.0) -> Estimate:
    """Count the costs, and measure for about `seconds` (0: only count).

    Raises:
        UserError: an invalid length of time.
    """
    if not 0 <= seconds < math.inf:
        raise UserError(f"seconds: {seconds} is not a length of time; give 0 or more")
    with torch.device("meta"):
        network = build(config.network)
        numbers = max(_state_numbers(phase, network) for phase in phases_of(config))
    shares = parameter_shares(network)
    parameters = int(shares["parameters"])
    size = config.network.image_size
    sampler = phases_of(config)[-1].sampler
    return Estimate(
        parameters=parameters,
        share=shares["share"],
        latent_ratio=config.network.tokens
        * config.network.latent_channels
        / (size[0] * size[1] * config.network.channels),
        flops_per_image=training_flops(config),
        flops_per_sample=network.role_flops(config.network).sample(sampler.evaluations),
        steps=sampler.steps,
        state_bytes=4 * numbers,
        images=length(config),
        measured=measure(config, seconds) if seconds > 0 else None,
    )


def _state_numbers(phase: Phase, network: Network) -> int:
    """Weights of all modules, moments of those that learn, and the gradients of the part of a step that has most.

    Parts have their gradients one after another. A generator has none within its network: where it learns while the
    network does, it is a module of its own.
    """
    modules = phase.modules(network)
    learned = {
        name: {id(p): p.numel() for key, p in module.named_parameters() if not key.startswith("jump")}
        for name, module in modules.items()
    }
    trained = {each.name: each for part in phase.parts for each in part.trains}
    weights = sum(p.numel() for module in modules.values() for p in module.parameters())
    moments = sum(
        moments_of(optimizer) * learned[name].get(id(p), 0)
        for name, each in trained.items()
        for optimizer in each.optimizers(modules[name])
        for group in optimizer.param_groups
        for p in group["params"]
    )
    gradients = [sum(sum(learned[each.name].values()) for each in part.trains) for part in phase.parts]
    return weights + moments + max(gradients)


def measure(config: Config, seconds: float) -> Measurement:
    """Train on random images for about `seconds`, at least one step per section, after measuring memory growth.

    A pass processes the run's micro-batch or, without one, as many images of its batch as suit the device. With
    `training.compile` "auto", nothing is compiled here.

    Raises:
        UserError: a device that is not available, or compilation, graphs or TF32 requested where they do not work.
    """
    device = resolve_device(config.training.device)
    check_graphs(config.training, device)
    batch, compiled = config.training.batch, config.training.compile == "yes"
    if compiled:
        require_compiler("training.compile", device)
    micro = config.training.micro_batch or min(batch, _default_micro(config, device))
    precision = resolve_precision(config.training.precision, device)
    config = replace(config, training=replace(config.training, batch=micro, micro_batch=None, precision=precision))
    state = TrainingState.fresh(config, device)
    size, classes = config.network.image_size, config.network.classes
    rng = state.rng(config.training.seed, device)
    x = torch.rand((micro, config.network.channels, *size), generator=rng, device=device) * 2 - 1
    y = torch.arange(micro, device=device) % max(1, classes)
    with products(precision, device):
        with eager():  # other numbers of images would trigger recompilation
            growth = _memory_growth(state, x, y, config)
        sections = [(phase, *section) for phase in phases_of(config) for section in _sections(phase)]
        times = [
            _seconds_per_image(state, x, y, config, phase, batch, seconds / len(sections), begin)
            for phase, begin, _ in sections
        ]
    whole = sum(images * statistics.median(found) for (*_, images), found in zip(sections, times, strict=True))
    speed = sum(images for *_, images in sections) / whole
    peak, memory = peak_memory(device), available_memory(device)
    if memory is not None:
        memory -= _batches_held(config, batch)
    graphs = config.training.graphs == "yes"
    if graphs and growth is not None:  # what the recording keeps of the images measured, and of each further one
        peak, growth = peak + round(micro * growth), 2 * growth
    largest = None if growth is None or memory is None else largest_micro_batch(micro, peak, growth, memory)
    spread = max(map(_spread, times))
    return Measurement(str(device), precision, compiled, graphs, batch, micro, speed, peak, growth, largest, spread)


def _sections(phase: Phase) -> list[tuple[int, int]]:
    """(first image, number of images) of each section of a phase in which the same parts have turns."""
    images = phase.schedule.images
    begins = sorted({0, *(part.start for part in phase.parts if part.start < images)})
    return [(begin, end - begin) for begin, end in itertools.pairwise([*begins, images])]


def _spread(times: Sequence[float]) -> float:
    """Third quartile over first; 1 for a single time, which knows of none."""
    if len(times) < 2:
        return 1.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return third / first


def _seconds_per_image(
    state: TrainingState,
    x: torch.Tensor,
    y: torch.Tensor,
    config: Config,
    phase: Phase,
    batch: int,
    seconds: float,
    begin: int,
) -> list[float]:
    """Seconds per image of the section of a phase that begins after `begin` images, of each step in about `seconds`.

    Steps have `batch` images, in passes of len(x).

    Each round times a step of one pass and, if the batch needs more, a further pass: a batch of k passes takes the time
    of the former plus k − 1 times that of the latter.
    """
    _enter(state, phase)
    if config.training.compile == "yes":
        state.compile(phase)

    def step(count: int = len(x)) -> float:
        state.counters.images = phase.start + _with_all_parts(phase, count, begin)
        start = time.perf_counter()
        training_step(state, x[:count], y[:count], config)["gradient_norm"].item()  # waits for the device
        return time.perf_counter() - start

    def another_pass() -> float:
        start = time.perf_counter()
        _passes(state, phase, x, y, config, begin)
        return time.perf_counter() - start

    with eager():
        step(1)  # the optimizers' first step, which allocates
    if config.training.compile == "yes":
        step()  # compiles
    passes, found = batch / len(x), list[float]()
    start = time.perf_counter()
    while not found or time.perf_counter() - start < seconds:
        spent = step()
        if passes > 1:
            spent += (passes - 1) * another_pass()
        found.append(spent / batch)
    return found


def _enter(state: TrainingState, phase: Phase) -> None:
    if state.counters.phase != phase.index:
        state.enter(phase)


def _with_all_parts(phase: Phase, batch: int, begin: int) -> int:
    """Images of the phase before a step of `batch` images in which the parts begun after `begin` images have turns."""
    every, first = math.lcm(*(part.every for part in phase.parts if part.start <= begin)), -(-begin // batch)
    return batch * (first + -(first + 1) % every)


def _passes(state: TrainingState, phase: Phase, x: torch.Tensor, y: torch.Tensor, config: Config, begin: int) -> None:
    """One forward and backward pass of each part that has a turn then; waits for the device."""
    rng, images = state.rng(config.training.seed, x.device), _with_all_parts(phase, len(x), begin)
    for part in (part for part in phase.parts if part.has_turn(images, len(x))):
        told = accumulate(state, part, x, y, part.draw(len(x), rng), config.training)
        next(iter(told.values())).item()
        for trained in part.trains:
            state.modules[trained.name].zero_grad()


def _batches_held(config: Config, batch: int) -> int:
    """Bytes that training holds besides a pass: the batch as floats, one copy of it, and the bytes read ahead."""
    numbers = config.network.channels * math.prod(config.network.image_size)
    return batch * numbers * (2 * 4 + 1 + 2 * config.data.workers)


def largest_micro_batch(images: int, peak: int, growth: float, memory: int) -> int:
    """Images per pass that fill nine tenths of `memory` bytes, if `images` peak at `peak` and each takes `growth`.

    At least `images`, which are known to fit.
    """
    return max(images, int(images + (FILLED * memory - peak) / growth))


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process holds on the device or could still allocate; None where the system reports nothing."""
    if device.type == "cuda":  # where training also keeps a small data set
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - IN_MEMORY
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return None
    if device.type != "cpu" or found is None:
        return None
    free, in_container = 1024 * int(found[1]), _free_in_container()
    return held + (free if in_container is None else min(free, in_container))


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes left below a container's limit (cgroup 2), counting cached files as free; None without a limit."""
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used) + (int(cached[1]) if cached else 0)


def _memory_growth(state: TrainingState, x: torch.Tensor, y: torch.Tensor, config: Config) -> float | None:
    """Growth of peak memory in bytes per image of a pass, from half of the images to all of them.

    Recorded peaks never fall: if an earlier one was as high as that of half the images, or if there is no growth, the
    result is None. Only passes are compared, since an optimizer step may peak higher than a pass of few images.
    """
    if len(x) < 2:
        return None
    half = len(x) // 2
    peaks = [peak_memory(x.device)]
    for count in (half, len(x)):
        for phase in phases_of(config):
            _enter(state, phase)
            _passes(state, phase, x[:count], y[:count], config, max(part.start for part in phase.parts))
        peaks.append(peak_memory(x.device))
    before, few, many = peaks
    return (many - few) / (len(x) - half) if before < few < many else None


def _default_micro(config: Config, device: torch.device) -> int:
    """A micro-batch for the measurement; on a CPU, the larger the network, the fewer the images."""
    if device.type != "cpu":
        return 32
    return max(2, min(64, int(2e12 / training_flops(config))))
