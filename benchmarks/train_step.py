"""Speed of a training step: against the same step written plainly, against the machine's peak, and by part.

    python benchmarks/train_step.py --recipe digits --json-file docs/results/train-step.json
    python benchmarks/train_step.py --recipe imagenet256-s --device cuda --batch 1024 --micro-batch 128

- **Variants** take turns in one process (see `timing.py`). *plain* is the same step as one would write it first:
  float32, one network call for the decoder and one for each draw, optimizers and average one tensor at a time, nothing
  compiled. It yields the same weights up to rounding (`tests/test_benchmarks.py`). The others change one thing each.
- **Peak**: the fastest product of square matrices, in float32 and in bf16. A step's FLOP/s are the operations counted
  by `onefold.training.phases`, divided by its time; torch's own count is next to them.
- **Peak memory**: of a separate process for each variant, which takes two steps; on a CPU including the interpreter.
- **Parts** are run one by one, each on its own, and do not overlap; so their sum is not the time of a step. `data` is
  a batch gathered from memory (see `data.py` for files); `logging` is a log line's share. Health, pictures and
  checkpoints are left out (see `health.py`).

Images are random, which does not affect the times.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode

import command
import onefold
from health import random_images
from onefold.compute import eager, resolve_device
from onefold.data import Loader
from onefold.networks.base import Network
from onefold.objectives.losses import reconstruction_error
from onefold.objectives.self_distillation import DenoisingDraws, SelfDistillation, denoising_error, draw
from onefold.paths import Linear, noised, per_token
from onefold.pixels import mirrored, to_float
from onefold.training import ema
from onefold.training.config import Config
from onefold.training.engine import autocast
from onefold.training.log import RunLog, Window, peak_memory
from onefold.training.optimizer import Muon, guarded_step, set_rates
from onefold.training.phases import phases_of, training_flops
from onefold.training.prepare import decide
from onefold.training.state import TrainingState
from onefold.training.step import accumulate, training_step
from timing import machine, product_peak, seconds_of, table, taking_turns, wait, write

# --- the same step, written plainly -----------------------------------------------------------------------------------


class PlainMuon(Muon):
    """Muon, matrix by matrix."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_stack([p], group, scale=max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def plain_state(config: Config, device: torch.device) -> TrainingState:
    """The same weights, with optimizers that take one tensor at a time."""
    state = TrainingState.fresh(config, device)
    training = config.training
    plain: list[Optimizer] = []
    for optimizer in state.optimizers["network"]:
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optimizer.param_groups]
        if isinstance(optimizer, Muon):
            matrices = groups[0]["params"]
            plain.append(PlainMuon(matrices, lr=training.muon_rate, weight_decay=training.weight_decay))
        else:
            plain.append(AdamW(groups, lr=training.learning_rate, betas=training.betas, foreach=False, fused=False))
    state.optimizers["network"] = plain
    return state


def plain_loss(
    network: Network, target: Network, x: Tensor, y: Tensor, draws: DenoisingDraws, objective: SelfDistillation
) -> Tensor:
    """The recipes' objective: `self_distillation` with an EMA target and no perceptual term."""
    x = mirrored(x, draws.mirrored)
    z = network.encode(x)
    with torch.no_grad():
        z_target = target.encode(x)
    x_hat = network.decode(noised(Linear(), z, draws.decoder_eps, per_token(draws.decoder_t)))
    total = objective.reconstruction_weight * reconstruction_error(x_hat, x, objective.reconstruction)
    classes = network.config.classes
    for k in range(objective.draws):
        t, eps = draws.t[:, k], draws.eps[:, k]
        z_t = noised(Linear(), z.detach(), eps, per_token(t))
        labels = torch.where(draws.unlabelled[:, k], classes, y) if classes else None
        z_hat = network.denoise(z_t, t, labels)
        error = denoising_error(z_hat, z_t, z_target, eps, t, objective)
        total = total + objective.denoising_weight / objective.draws * error
    return total


def plain_step(state: TrainingState, x: Tensor, y: Tensor, config: Config) -> None:
    """`training_step`, written plainly, in float32."""
    network, target, training, counters = state.network, state.averages[0], config.training, state.counters
    set_rates(state.optimizers["network"], training.rate_factor(counters.images, len(x)))
    shape = (config.network.tokens, config.network.latent_channels)
    draws = draw(config.objective, len(x), shape, state.rng(training.seed, x.device))
    micro = training.micro_batch or len(x)
    for start in range(0, len(x), micro):
        stop = min(start + micro, len(x))
        part = draws.part(start, stop)
        total = plain_loss(network, target, x[start:stop], y[start:stop], part, config.objective)
        ((stop - start) / len(x) * total).backward()
    norm = clip_grad_norm_(network.parameters(), training.clip, foreach=False)
    counters.images += len(x)
    if torch.isfinite(norm):
        for optimizer in state.optimizers["network"]:
            optimizer.step()
        for average, half_life in zip(state.averages, training.ema_half_lives, strict=True):
            survival = training.survival(half_life, counters.images, len(x))
            with torch.no_grad():
                for mean, p in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(p, 1 - survival)
    network.zero_grad()


# --- variants ---------------------------------------------------------------------------------------------------------

Step = Callable[[TrainingState, Tensor, Tensor, Config], object]


def variants(config: Config) -> dict[str, tuple[Step, Config]]:
    """Steps to compare, for resolved settings; those that would be the same as onefold's are left out."""
    found: dict[str, tuple[Step, Config]] = {"onefold": (training_step, config)}
    if config.training.compile == "yes":
        found["not compiled"] = training_step, config.with_changes({"training.compile": "no"})
    if config.training.precision == "bfloat16":
        found["in float32"] = training_step, config.with_changes({"training.precision": "float32"})
    plain = config.with_changes({"training.precision": "float32", "training.compile": "no"})
    return found | {"plain": (plain_step, plain)}


def prepared(step: Step, config: Config, device: torch.device) -> TrainingState:
    """The state that a variant trains."""
    state = plain_state(config, device) if step is plain_step else TrainingState.fresh(config, device)
    if config.training.compile == "yes":
        state.compile(phases_of(config)[0])
    return state


def images(config: Config, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Random images in [−1, 1], and labels in rotation."""
    network = config.network
    x = torch.rand((count, network.channels, *network.image_size), device=device) * 2 - 1
    return x, torch.arange(count, device=device) % max(1, network.classes)


def memory_of(name: str, config: Config) -> int:
    """Peak memory of this process after two steps of a variant."""
    device = resolve_device(config.training.device)
    step, config = variants(config)[name]
    state = prepared(step, config, device)
    x, y = images(config, device, config.training.batch)
    for _ in range(2):
        step(state, x, y, config)
    wait(device)
    return peak_memory(device)


def memory_apart(name: str, config: Config) -> int:
    """`memory_of` in a new process, which starts with nothing in memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_of, name, config).result()


# --- parts and operations ---------------------------------------------------------------------------------------------


def parts(config: Config, device: torch.device, folder: Path) -> dict[str, tuple[int, Callable[[], float]]]:
    """For each part: how often it occurs in a step, and a function that runs it and returns its seconds."""
    training, objective, batch = config.training, config.objective, config.training.batch
    state = prepared(training_step, config, device)
    network, target, (part,) = state.network, state.averages[0], phases_of(config)[0].parts
    micro = min(training.micro_batch or batch, batch)
    x, y = images(config, device, micro)
    shape = (config.network.tokens, config.network.latent_channels)
    draws = draw(objective, micro, shape, state.rng(training.seed, device))
    t, eps = draws.t.flatten(), draws.eps.flatten(0, 1)
    z = torch.randn((micro, *shape), device=device)
    z_t = noised(Linear(), z.repeat_interleave(objective.draws, 0), eps, per_token(t))
    labels = y.repeat_interleave(objective.draws) if config.network.classes else None
    loader = Loader(random_images(config.network, batch, folder), batch=batch, seed=0, in_memory=True, device=device)
    log = RunLog(folder / "log.jsonl", images=0)
    values = {name: torch.ones((), device=device) for name in ("reconstruction", "denoising", "gradient_norm")}

    def timed(work: Callable[[], object]) -> float:
        return seconds_of(work, device)

    def fetch() -> None:
        some_x, _ = next(loader)
        to_float(some_x)

    def under_autocast(work: Callable[[], object]) -> None:
        with autocast(training, device):
            work()

    def encode_target() -> None:
        with torch.no_grad():
            target.encode(x)

    def backward_pass() -> float:
        with autocast(training, device):
            total = part.loss(network, target, x, y, draws).total
        seconds = timed(total.backward)
        network.zero_grad()
        return seconds

    def with_gradient(work: Callable[[], object]) -> float:
        for p in network.parameters():
            p.grad = torch.full_like(p, 1e-3)
        seconds = timed(work)
        network.zero_grad()
        return seconds

    def move_averages() -> None:
        for average in state.averages:
            ema.update(average, network, 0.001)

    def write_log() -> float:
        window = Window()
        each = timed(lambda: window.add(values, skipped=state.skips.in_row > 0))
        line = timed(lambda: log.write({"images": 0, **window.means(), "peak_memory": peak_memory(device)}))
        return each + min(1.0, batch / training.log_every) * line

    passes = -(-batch // micro)
    return {
        "data": (1, lambda: timed(fetch)),
        "draws": (1, lambda: timed(lambda: draw(objective, batch, shape, state.rng(training.seed, device)))),
        "encode": (passes, lambda: timed(lambda: under_autocast(lambda: network.encode(x)))),
        "target": (passes, lambda: timed(lambda: under_autocast(encode_target))),
        "decode and denoise": (
            passes,
            lambda: timed(lambda: under_autocast(lambda: network.decode_and_denoise(z, z_t, t, labels))),
        ),
        "backward": (passes, backward_pass),
        "clip and optimizer": (
            1,
            lambda: with_gradient(lambda: guarded_step(network, state.optimizers["network"], training.clip)),
        ),
        "EMA": (1, lambda: timed(move_averages)),
        "logging": (1, write_log),
    }


def torch_flops(config: Config, device: torch.device, count: int = 2) -> dict[str, float]:
    """Operations of matrix products as counted by torch: for an image's losses and gradients, and the optimizers."""
    state = TrainingState.fresh(config, device)
    x, y = images(config, device, count)
    (part,) = phases_of(config)[0].parts
    draws = part.draw(count, state.rng(config.training.seed, device))
    # It does not count the CPU's fused attention, so attention is computed by its definition here.
    with eager(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as losses:
        accumulate(state, part, x, y, draws, config.with_changes({"training.micro_batch": None}).training)
    with FlopCounterMode(display=False) as updates:
        for optimizer in state.optimizers["network"]:
            optimizer.step()
    return {"image": losses.get_total_flops() / count, "optimizer_step": float(updates.get_total_flops())}


# --- the report -------------------------------------------------------------------------------------------------------


def measured(config: Config, device: torch.device, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """All numbers, for resolved settings."""
    where, batch = machine(device), config.training.batch
    compared = variants(config)
    memory = {name: memory_apart(name, config) for name in compared}
    peaks = {name: product_peak(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    x, y = images(config, device, batch)

    def turn(name: str) -> Callable[[], float]:
        step, settings = compared[name]
        state = prepared(step, settings, device)
        return lambda: seconds_of(lambda: [step(state, x, y, settings) for _ in range(steps)], device) / steps

    times = taking_turns({name: turn(name) for name in compared}, rounds)
    pieces = parts(config, device, folder)
    part_times = taking_turns({name: piece for name, (_, piece) in pieces.items()}, rounds)
    counted = training_flops(config)

    def variant(name: str) -> dict[str, Any]:
        step, rate = median(times[name]), batch * counted / median(times[name])
        shares = {dtype: rate / peak.flops_per_second for dtype, peak in peaks.items()}
        return {
            "seconds": times[name],
            "step": step,
            "images_per_second": batch / step,
            "flops_per_second": rate,
            "share_of_peak": shares,
            "peak_memory": memory[name],
        }

    return {
        **where,
        "recipe": config.recipe,
        "precision": config.training.precision,
        "compile": config.training.compile,
        "batch": batch,
        "micro_batch": config.training.micro_batch,
        "rounds": rounds,
        "steps_per_round": steps,
        "peaks": {name: vars(peak) for name, peak in peaks.items()},
        "variants": {name: variant(name) for name in compared},
        "parts": {name: pieces[name][0] * median(seconds) for name, seconds in part_times.items()},
        "flops": {"counted": counted, "torch": torch_flops(config, device)},
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    first, peaks, flops = found["variants"]["onefold"], found["peaks"], found["flops"]
    print(f"{found['recipe']}, batch {found['batch']} by {found['micro_batch'] or found['batch']}", end=", ")
    print(f"{found['device']}, {found['precision']}, compile {found['compile']}, load before {found['load']:.1f}\n")
    head = ["step", "images/s", "time, onefold = 1", "of the float32 peak", "of the bf16 peak", "peak memory, GiB"]
    rows = [
        [
            name,
            f"{one['images_per_second']:,.1f}",
            f"{one['step'] / first['step']:.2f}",
            f"{100 * one['share_of_peak']['float32']:.1f} %",
            f"{100 * one['share_of_peak']['bfloat16']:.1f} %",
            f"{one['peak_memory'] / 2**30:.2f}",
        ]
        for name, one in found["variants"].items()
    ]
    print(table(head, rows))
    for name, peak in peaks.items():
        print(f"\npeak of {name} products: {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s at {peak['size']}²", end="")
    ratio = flops["counted"] / flops["torch"]["image"]
    share = flops["torch"]["optimizer_step"] / found["batch"] / flops["torch"]["image"]
    print(f"\n\noperations: {flops['counted'] / 1e9:,.3f} GFLOP an image by onefold, {ratio:.3f} times torch's")
    print(f"the optimizers' products, which are not among them: {100 * share:.1f} % of these at this batch\n")
    total = sum(found["parts"].values())
    rows = [[name, f"{1e3 * s:.2f}", f"{100 * s / total:.1f} %"] for name, s in found["parts"].items()]
    print(table(["part, run by itself", "ms in a step", "of the sum"], rows))
    print(f"\nsum of the parts: {1e3 * total:.1f} ms; a whole step: {1e3 * first['step']:.1f} ms")


def main(
    recipe: str = "digits",
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    compile: Literal["auto", "yes", "no"] = "auto",
    batch: int | None = None,
    micro_batch: int | None = None,
    rounds: int = 7,
    steps: int | None = None,
    json_file: Path | None = None,
) -> None:
    """Measure, print tables, and write all numbers.

    Args:
        recipe: A recipe, with its own settings.
        device: auto, cpu, cuda, …
        precision: Precision of onefold's step; the plain one is in float32.
        compile: Whether onefold's blocks are compiled; auto decides as training does.
        batch: Images per step. Default: the recipe's.
        micro_batch: Images per pass. Default: the recipe's, else the batch.
        rounds: Rounds that count.
        steps: Steps per variant and round. Default: 1 on a CPU, else 10, so that the device's queue stays full.
        json_file: Where to write all numbers.
    """
    where = resolve_device(device)
    changes = {"device": str(where), "precision": precision, "compile": compile}
    changes |= {} if batch is None else {"batch": batch}
    config = onefold.recipe(recipe).with_changes(
        {f"training.{name}": value for name, value in {**changes, "micro_batch": micro_batch}.items()}
    )
    config = decide(config, where)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(config, where, rounds, steps or (1 if where.type == "cpu" else 10), Path(folder))
    show(found)
    write(found, json_file)


if __name__ == "__main__":
    command.run(main)
