"""What a run tells: one JSON object per line in `log.jsonl`.

The log is a pure record of the run: when a run resumes at an earlier checkpoint, lines beyond it are cut off, so that
the file reads as if there had been no interruption (but for the times).
"""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onefold.errors import writing
from onefold.files import write_whole

__all__ = ["RunLog", "Window", "peak_memory", "read_log"]


class RunLog:
    """Append-only `log.jsonl` of a run folder."""

    def __init__(self, path: Path, *, images: int) -> None:
        """Open for a run that stands at `images`; what an abandoned continuation logged beyond it is removed."""
        self.path = path
        self.cut(images)

    def cut(self, images: int) -> None:
        """Remove what was logged beyond `images`: the run goes on from there."""
        path = self.path
        seen = read_log(path)
        kept = [line for line in seen if line["images"] <= images]
        if kept != seen or not path.exists() or not path.read_bytes().endswith(b"\n"):
            with writing(path):
                write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, none if there is no file."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the last line of a killed process may be cut short
            continue
    return lines


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation on CUDA, else the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux: getrusage there also counts what the process was forked from
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        if found is not None:
            return 1024 * int(found[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Window:
    """Means since the last log line, of each value over the steps that have it; skipped steps do not enter them.

    All is added up on the device; the host waits for it only in `means` and `to_json`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Float[Tensor, "2"]] = {}
        """Of each value: its sum, and the number of steps in it."""
        self.images = 0
        self.seconds = 0.0
        self._start = 0.0

    def begin(self) -> None:
        """A step begins, with its data."""
        self._start = time.perf_counter()

    def end(self, images: int) -> None:
        """The step is done, on `images` images, with all that the host has waited for."""
        self.images += images
        self.seconds += time.perf_counter() - self._start

    def add(self, values: Mapping[str, Float[Tensor, ""]], *, skipped: Bool[Tensor, ""]) -> None:
        """A step has given `values`."""
        new = torch.stack(list(values.values()))
        # Chosen, not multiplied by 0: what a skipped step gives may be NaN.
        counted = torch.where(skipped, 0.0, torch.stack([new, torch.ones_like(new)], dim=1))
        for name, each in zip(values, counted, strict=True):
            self.sums[name] = self.sums[name] + each if name in self.sums else each

    def means(self) -> dict[str, float | None]:
        """Mean of each value (none if every step was skipped) and the speed, without pictures and checkpoints."""
        speed = self.images / self.seconds if self.seconds else None
        return {name: total / steps for name, (total, steps) in self._read().items()} | {"images_per_second": speed}

    def to_json(self) -> dict[str, list[float]]:
        """What a checkpoint keeps, so that a resumed run logs the same means."""
        return {name: [total, steps] for name, (total, steps) in self._read().items()}

    def _read(self) -> dict[str, tuple[float, int]]:
        """The sum of each value and the number of steps in it, at least one; a single copy from the device."""
        found = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        return {name: (total, int(steps)) for name, (total, steps) in zip(self.sums, found, strict=True) if steps}

    @classmethod
    def from_json(cls, kept: Mapping[str, list[float]], device: torch.device) -> Self:
        """The window that `to_json` gave; its speed is measured anew."""
        window = cls()
        window.sums = {name: torch.tensor(both, dtype=torch.float32, device=device) for name, both in kept.items()}
        return window
