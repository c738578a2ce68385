"""Time and memory of comparing and of evaluating many images.

    python benchmarks/evaluation.py --json-file docs/results/evaluation.json

Precision and recall are of `count` rows of random features; the evaluation is of a run with a very small network and of
`count` random images. Each is measured in a process of its own, with one thread. The largest memory is that of
`getrusage` and includes the interpreter and torch. `--before FILE` puts the numbers of an earlier version beside them,
as this script wrote them when it was run there.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import command
import onefold
from onefold import metrics
from onefold.metrics.classifier import Classifier, ClassifierConfig
from onefold.training.run import git_commit
from timing import machine, table, write

WIDTH = 64
"""Features."""


def compare(count: int, side: int) -> dict[str, Any]:
    """Precision and recall of two sets of `count` rows."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(count, WIDTH, generator=rng)
    made = real.flip(0) + 0.7 * torch.randn(count, WIDTH, generator=rng)
    return measured(lambda: {"values": metrics.precision_recall(real, made)})


def evaluate(count: int, side: int) -> dict[str, Any]:
    """A record of a small network, trained for a moment on `count` images of side × side × 3."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, 3))
        rng = np.random.default_rng(0)
        for start in range(0, count, 1000):
            images[start : start + 1000] = rng.integers(0, 256, images[start : start + 1000].shape, dtype=np.uint8)
        images.flush()
        sizes = {"patch": side // 4, "width": 32, "depth": 1, "heads": 2, "latent_channels": 8}
        network = {"image_size": (side, side), "channels": 3, "classes": 0, **sizes}
        training = {"images": 64, "batch": 32, "precision": "float32", "device": "cpu", "compile": "no"}
        data = {"source": str(path), "test": None, "holdout": 1000 / count}
        config = onefold.recipe("digits", network=network, training=training, data=data)
        run = onefold.train(config, Path(folder) / "run", data=Mapped(images), quiet=True)
        extractor = Classifier(ClassifierConfig.of((3, side, side), 0, "flips")).freeze()
        sampler = run.network.sampler.with_options(steps=1)
        return measured(
            lambda: {"record": onefold.evaluate(run, images=count, sampler=sampler, extractor=extractor).numbers()}
        )


class Mapped:
    """Images on the disk, as data of one's own."""

    classes = 0

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.image_shape = images, images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.array(self.images[index]), 0


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, with its seconds, of which so many of the processor, and the largest memory so far."""
    before, start = time.process_time(), time.perf_counter()
    found = work()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - before}
    return times | {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | found


def alone(name: str, count: int, side: int) -> dict[str, Any]:
    """A measurement in a process of its own."""
    program = [sys.executable, __file__, "--only", name, "--count", str(count), "--side", str(side)]
    return json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(
    count: int = 50_000,
    side: int = 8,
    before: Path | None = None,
    json_file: Path | None = None,
    only: str | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        count: Images, and rows of features.
        side: Height and width of the images.
        before: Numbers of an earlier version.
        json_file: Where to write all numbers.
        only: Measure this alone, in this process: compare or evaluate.
    """
    torch.set_num_threads(1)
    if only is not None:
        print(json.dumps({"compare": compare, "evaluate": evaluate}[only](count, side)))
        return
    now = {"commit": git_commit(), "compare": alone("compare", count, side)}
    now |= {"evaluate": alone("evaluate", count, side), "evaluate a tenth": alone("evaluate", count // 10, side)}
    versions = {"now": now} if before is None else {"before": json.loads(before.read_text())["now"], "now": now}
    rows = [
        [
            name,
            *(
                f"{each[name]['cpu_seconds']:,.1f} s, {each[name]['peak_memory'] / 2**20:,.0f} MiB"
                for each in versions.values()
            ),
        ]
        for name in ("compare", "evaluate", "evaluate a tenth")
    ]
    print(table(["", *versions], rows))
    write({**machine(torch.device("cpu")), "count": count, "side": side, "width": WIDTH, **versions}, json_file)


if __name__ == "__main__":
    command.run(main)
