"""Loggers: a run's log, pictures and weights, where people look. Each is a callback of `onefold.train`.

    with loggers.TensorBoard() as log:
        onefold.train(config, "runs/digits", callbacks=[log])

`log.jsonl` is written in any case and is the record; what a logger shows is a copy of it.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

from onefold.loggers.logger import Logger
from onefold.loggers.tensorboard import TensorBoard
from onefold.loggers.trackio import Trackio
from onefold.loggers.wandb import WandB

__all__ = ["LOGGERS", "Logger", "TensorBoard", "Trackio", "WandB", "opened"]

LOGGERS: dict[str, type[Logger]] = {each.name: each for each in (TensorBoard, Trackio, WandB)}
"""By the name of `--log`."""


@contextmanager
def opened(
    names: Iterable[str], folder: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Generator[list[Logger]]:
    """The loggers of these names, each once; they are closed in the end.

    `say` is told where each shows the run of a folder, a line each.

    Raises:
        UserError: what one of them needs is not there.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(LOGGERS[name]()) for name in dict.fromkeys(names)]
        if folder is not None:
            for each in found:
                say(f"--log {each.name}: {each.view(folder)}")
        yield found
