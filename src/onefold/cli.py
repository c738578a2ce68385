"""The command `onefold`: finds the command of the command line, calls it, and gives its exit code.

Wrong input, or too little memory, ends with exit code 2 and one line on stderr, an aborted training with 3, SIGTERM
with 143 and Ctrl-C with 130, both after a checkpoint.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

import torch

from onefold import __version__
from onefold.commands import data, demo, estimate, evaluate, images, onestep, study, tables, train
from onefold.commands.arguments import parse
from onefold.commands.terminal import console
from onefold.errors import TrainingAborted, UserError, printable, reason
from onefold.training.interruption import Interrupted

__all__ = ["COMMANDS", "main", "run"]

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "train": train.train,
    "onestep": onestep.onestep,
    "sample": images.sample,
    "reconstruct": images.reconstruct,
    "evaluate": evaluate.evaluate,
    "estimate": estimate.estimate,
    "study collapse": study.collapse,
    "study onestep": study.onestep,
    "study initialisation": study.initialisation,
    "study bias": study.bias,
    "data inspect": data.inspect,
    "data convert": data.convert,
    "data stats": data.stats,
}

PARSING = ("train", "onestep", "estimate")
"""Commands that parse their own arguments: the first, a recipe or run, decides the defaults of the options."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know ASCII alone, and a name be no text at all
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(arguments)
    except UserError as error:
        return _fail(error, 2)
    except TrainingAborted as error:
        return _fail(error, 3)
    except Interrupted as error:
        return _fail(error, 128 + error.signal)
    except torch.OutOfMemoryError as error:
        cure = "give less to a pass (--training.micro-batch, or --batch); `onefold estimate` tells what fits"
        return _fail(f"the device has no memory left ({str(error).splitlines()[0]}); {cure}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a name that the system does not take, a disk that fails
        return _fail(f"{error.filename or 'a file'}: {reason(error)}; check the name and the disk", 2)
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        tables.show_commands(console, COMMANDS)
        return
    if arguments[0] == "--version":
        console.print(f"onefold {__version__}")
        return
    for words in (2, 1):
        name, rest = " ".join(arguments[:words]), arguments[words:]
        if name in PARSING:
            return COMMANDS[name](rest)
        if name in COMMANDS:
            return parse(COMMANDS[name], rest, f"onefold {name}")
    group = {name: command for name, command in COMMANDS.items() if name.startswith(arguments[0] + " ")}
    if group and arguments[1:] in (["-h"], ["--help"]):
        tables.show_commands(console, group)
        return
    known = ", ".join(group or COMMANDS)
    raise UserError(f"{' '.join(arguments[:2]) if group else arguments[0]}: no such command; choose one of {known}")


def _fail(error: object, code: int) -> int:
    print(f"onefold: {printable(error)}", file=sys.stderr)
    return code
