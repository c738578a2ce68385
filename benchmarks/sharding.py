"""Memory of each rank while a network trains, by either engine.

    export MALLOC_MMAP_THRESHOLD_=100000  # the C library gives memory back as soon as it is free
    torchrun --nproc-per-node 2 benchmarks/sharding.py --engine ddp
    torchrun --nproc-per-node 2 benchmarks/sharding.py --engine fsdp

A network of 51 million parameters learns the digits for a few steps on the CPU, by self-distillation with one average,
so that memory is that of weights and what belongs to them rather than of activations. Of each rank the largest resident
memory is printed, less what it had before the run: until its first step, in the steps after that, and in all that comes
last (a measurement, pictures and a checkpoint, for which the first rank has whole copies). Linux alone tells it.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import command
from onefold.recipes import recipe
from onefold.training import loop
from onefold.training.engine import Engine, joined


def largest() -> int:
    """Bytes of resident memory at most, since the last `reset`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def reset() -> None:
    """Begin to look for the largest anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(engine: Engine, optimizer: str, steps: int, depth: int, out: Path) -> dict[str, int]:
    """Bytes of this rank until the first step, in later ones, and after them."""
    network = {"width": 512, "depth": depth, "heads": 8}
    training = {"images": 8 * steps, "batch": 8, "optimizer": optimizer, "precision": "float32", "device": "cpu"}
    config = recipe("digits", network=network, training=training, sampler={"steps": 2})
    found: dict[str, int] = {}
    step = loop.training_step

    def watched(*arguments: Any) -> Any:
        if not found:
            found["start"] = largest() - before
        values = step(*arguments)
        if len(found) == 1:
            reset()
            found["steps"] = 0
        found["steps"] = largest() - before
        return values

    loop.training_step = watched
    importlib.import_module("torch.distributed.fsdp")  # part of the memory before the run, by either engine
    reset()
    before = largest()
    loop.train(config, out, quiet=True, engine=engine)
    return {**found, "end": largest() - before}


@joined()
def main(
    engine: Engine = "ddp", optimizer: str = "adamw", steps: int = 4, depth: int = 16, out: Path | None = None
) -> None:
    """Measure all ranks.

    Args:
        engine: ddp or fsdp.
        optimizer: adamw or muon.
        steps: Steps of 8 images.
        depth: Blocks of the network, of 3.2 million parameters each.
        out: Where to put the run; it must be new. Default: a temporary folder.
    """
    group = loop.ranks()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(group.of_first(str(out or Path(folder) / "run")))
        found = measured(engine, optimizer, steps, depth, place)
        lines = group.texts("  ".join(f"{name} {bytes / 2**20:6,.0f} MiB" for name, bytes in found.items()))
    if group.first:
        for rank, line in enumerate(lines):
            print(f"{engine}, {optimizer}, rank {rank}: {line}")


if __name__ == "__main__":
    command.run(main)
