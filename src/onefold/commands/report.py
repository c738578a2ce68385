"""`onefold report`.

What needs torch is imported where it is used, so that `--help` does without it.
"""

from pathlib import Path

from tyro.conf import Positional

from onefold.commands.terminal import console, discard
from onefold.errors import UserError, printable

__all__ = ["report"]


def report(
    runs: Positional[tuple[Path, ...]],
    /,
    out: Path | None = None,
    data: str | None = None,
    test_data: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Write what a run is and does into one page: report.html. Of several runs, compare them.

    The page needs no other file and loads nothing. Numbers of several runs are ranked only where they were measured by
    the same protocol.

    Example: onefold report runs/digits runs/digits-onestep --out both.html

    Args:
        runs: Folders of one run or of several.
        out: HTML file to write. Default: report.html in the first run's folder.
        data: Where the images that it was trained on are now. Default: where they were.
        test_data: Likewise its test images.
        device: auto, cpu, cuda, …
        quiet: Print nothing.
    """
    if not runs:
        raise UserError("report: give the folder of a run")
    if len(runs) > 1 and (data or test_data):
        raise UserError("--data: belongs to one run, and several are given; leave it out")
    from onefold.compute import resolve_device
    from onefold.report import write
    from onefold.training.run import load_run

    loaded = [load_run(run, data=data, test_data=test_data) for run in runs]
    path = out or loaded[0].folder / "report.html"
    write(loaded, path, device=resolve_device(device), say=discard if quiet else _say)
    if not quiet:
        console.print(printable(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, one file; open it in a browser"))


def _say(line: str) -> None:
    console.print(printable(line), style="dim")
