"""Time and memory of listing many images in tar shards and as files.

    python benchmarks/listing.py --json-file docs/results/listing.json

Images are empty, for they are listed and not read, each with a class in a file beside it (tar) or in a folder (files).
They are written to a temporary folder, which must have room: 2 KiB for each image in shards, 4 KiB for each as a file.
Each kind is listed, and the place of its first batch drawn, in a process of its own, with one thread. Memory is the
largest of `getrusage`, less what the interpreter and the package take.
"""

import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

import command
from onefold.data import indices
from onefold.data.source import list_source
from timing import machine, table, write

Kind = Literal["tar", "folder"]


def write_shards(folder: Path, count: int, shards: int) -> None:
    """`count` images of 1,000 classes, in samples of an image and a class."""
    per = -(-count // shards)
    for shard in range(shards):
        with (folder / f"train-{shard:05d}.tar").open("wb") as file:
            for k in range(shard * per, min((shard + 1) * per, count)):
                for suffix, content in ((".jpg", b"."), (".cls", b"%d" % (k % 1000))):
                    info = tarfile.TarInfo(f"{k:09d}{suffix}")
                    info.size = len(content)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
            file.write(bytes(1024))


def write_files(folder: Path, count: int) -> None:
    """`count` images in the folders of 1,000 classes."""
    for label in range(1000):
        (folder / f"c{label:04d}").mkdir()
    for k in range(count):
        (folder / f"c{k % 1000:04d}" / f"{k:09d}.jpg").touch()


def listed(folder: Path) -> dict[str, float]:
    """Seconds and bytes of listing a folder, and of the first batch's place in its order."""
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    listing = list_source(folder)
    classes = int(listing.labels.max()) + 1
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    found |= {"images": len(listing), "classes": classes, "bytes_per_image": (peak() - before) / len(listing)}
    start = time.process_time()
    indices(len(listing), 0, 0, 256)
    return found | {"shuffle_cpu_seconds": time.process_time() - start, "peak_memory": peak() - before}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    count: int = 1_280_000,
    shards: int = 128,
    kinds: tuple[Kind, ...] = ("tar", "folder"),
    only: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Measure, print a table, and write all numbers.

    Args:
        count: Images.
        shards: Tar files that they are in.
        kinds: tar, folder.
        only: List this folder, in this process.
        json_file: Where to write all numbers.
    """
    torch.set_num_threads(1)
    if only is not None:
        print(json.dumps(listed(only)))
        return
    found: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), count, shards) if kind == "tar" else write_files(Path(folder), count)
            program = [sys.executable, __file__, "--only", folder]
            found[kind] = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    rows = [
        [kind, f"{each['cpu_seconds']:.1f}", f"{each['peak_memory'] / 2**20:,.0f}", f"{each['bytes_per_image']:.0f}"]
        for kind, each in found.items()
    ]
    print(table([f"{count:,} images", "processor seconds", "memory, MiB", "bytes per image"], rows))
    write({**machine(torch.device("cpu")), "count": count, "shards": shards, **found}, json_file)


if __name__ == "__main__":
    command.run(main)
