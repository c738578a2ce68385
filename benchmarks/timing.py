"""Shared by the speed benchmarks: rounds in which variants take turns, the peak of matrix products, tables.

Variants take turns, round by round and in one process, so that whatever else the machine does slows all of them down;
the median over the rounds counts. A first round, which compiles and fills caches, is discarded.
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
"""Sizes of the square matrices among which the peak is sought."""
SHORTEST = 0.05
"""Minimum seconds of one timing of products, so that launching them does not count."""


@dataclass(frozen=True)
class Peak:
    """The fastest product of two square matrices."""

    size: int
    flops_per_second: float


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, including everything that it queues on the device."""
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
    """The shortest of three timings of a product of two square matrices, after a first product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products(count: int) -> float:
        return seconds_of(lambda: [torch.matmul(a, b, out=out) for _ in range(count)], device) / count

    products(1)
    count = max(1, math.ceil(SHORTEST / products(1)))
    return min(products(count) for _ in range(3))


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and software of the measurement. The load is that of the minute before the benchmark."""
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
    """The processor's name, as far as the system reports it."""
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
    """Write all numbers of a benchmark to a file, if one is given."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
