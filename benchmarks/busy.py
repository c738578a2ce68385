"""Sampling beside other work: threads that spin while they wait (OpenMP's default) against threads that sleep.

Each measurement is a process of its own, since the policy is read when torch loads; the two policies take turns, first
with the machine as it is, then beside one process for each core that computes without end.

    python benchmarks/busy.py --images 64 --rounds 5 --json-file busy.json
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

POLICIES = ("ACTIVE", "PASSIVE")
"""What torch does by itself, and what onefold sets."""

SAMPLE = """
import sys, time
import torch
from onefold.networks.base import build
from onefold.recipes import recipe
network = build(recipe("digits").network).eval()
network.sample(8, steps=2)
start = time.perf_counter()
network.sample(int(sys.argv[1]), steps=50)
print(time.perf_counter() - start)
"""


def seconds(policy: str, images: int) -> float:
    """The time to sample so many digits in 50 steps, with one policy of waiting."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(images)], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def measure(images: int, rounds: int) -> dict[str, list[float]]:
    """The times of each policy, in turns."""
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(rounds):
        for policy in POLICIES:
            times[policy].append(seconds(policy, images))
    return times


def main(images: int = 64, rounds: int = 5, json_file: Path | None = None) -> None:
    """Measure and print a table.

    Args:
        images: Digits of each measurement.
        rounds: Measurements of each policy, whose median counts.
        json_file: Write all numbers here, too.
    """
    found = {"load": os.getloadavg(), "cores": os.cpu_count(), "images": images, "alone": measure(images, rounds)}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        found["busy"] = measure(images, rounds)
    finally:
        for other in others:
            other.kill()
    print(f"load before: {found['load'][0]:.1f} on {found['cores']} cores; {images} images, medians of {rounds}\n")
    print("| | waiting threads spin | they sleep | ratio |\n|---|---:|---:|---:|")
    for name in ("alone", "busy"):
        spin, sleep = (statistics.median(found[name][policy]) for policy in POLICIES)
        print(f"| {name} | {spin:.2f} s | {sleep:.2f} s | {spin / sleep:.2f} |")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
