"""`onefold demo`."""

from pathlib import Path

from onefold.commands.terminal import console
from onefold.demo import run_demo

__all__ = ["demo"]


def demo(out: Path = Path("demo"), seed: int = 0, quiet: bool = False) -> None:
    """Train on the embedded digits, sample, evaluate, and show where the pictures are.

    Example: onefold demo --out demo

    Args:
        out: Folder of the demo; a finished or interrupted one is continued.
        seed: Seed of the training.
        quiet: No progress bar.
    """
    run_demo(out, seed, console, quiet=quiet)
