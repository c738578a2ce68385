"""What the benchmarks of speed share: rounds in which variants take turns, the peak of matrix products, tables.

Variants take turns, round by round and in one process, so that whatever else the machine does slows all of them
down; of each the median over the rounds counts. A first round, with its compilation and caches, does not.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import onefold

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""Of the square matrices among which the peak is sought."""
SHORTEST = 0.05
"""Seconds that one timing of products takes at least, so that starting them does not count."""


@dataclass(frozen=True)
class Peak:
    """The fastest product of two square matrices."""

    size: int
    flops_per_second: float


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, with all that it gives the device to do."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def taking_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; a variant does its work and returns how long it took."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for k in range(1 + rounds):
        for name, variant in variants.items():
            seconds = variant()
            if k:
                times[name].append(seconds)
    return times


def product_peak(
    device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] = SIZES, longest: float = 0.5
) -> Peak:
    """The peak over `sizes`, in rising order, up to the first whose product takes `longest` seconds."""
    peak = Peak(0, 0.0)
    for size in sizes:
        seconds = seconds_of_product(size, device, dtype)
        peak = max(peak, Peak(size, 2 * size**3 / seconds), key=lambda found: found.flops_per_second)
        if seconds >= longest:
            break
    return peak


def seconds_of_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """The least time of a product of two square matrices, of three timings after a first product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products(count: int) -> float:
        return seconds_of(lambda: [torch.matmul(a, b, out=out) for _ in range(count)], device) / count

    products(1)
    count = max(1, math.ceil(SHORTEST / products(1)))
    return min(products(count) for _ in range(3))


def machine(device: torch.device) -> dict[str, Any]:
    """Where and in what the numbers were measured. The load is that of the last minute, from before the benchmark."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "float32_products": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "onefold": onefold.__version__,
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: names to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(found: Mapping[str, Any], json_file: Path | None) -> None:
    """All numbers of a benchmark into a file, if one is wanted."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
