"""The command `onefold`: finds the command of the command line, calls it, and gives its exit code.

Wrong input, or too little memory, ends with exit code 2 and one line on stderr, an aborted training with 3, SIGTERM
with 143 and Ctrl-C with 130, both after a checkpoint. Of several processes that a launcher has started, the first alone
prints, and what ends them all is said once. A command's module, and with it torch, is imported only when it
is called, so that the overview appears at once.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from onefold import __version__
from onefold.errors import Elsewhere, Interrupted, TrainingAborted, UserError, printable, reason

__all__ = ["COMMANDS", "command", "main", "run"]

COMMANDS: dict[str, str] = {
    "demo": "Train on the embedded digits, sample in one step and in many, evaluate, and show where the pictures are.",
    "train": "Train one network, end to end.",
    "onestep": "Make a one-step generator of a trained run.",
    "adopt": "Make a network from elsewhere one of onefold: a DDPM of diffusers, EDM, EDM2, or an autoencoder.",
    "sample": "Generate images with a run's network.",
    "reconstruct": "Encode and decode images: above the originals, below what the network makes of them.",
    "evaluate": "Measure a run against real images; writes evaluation/….json into the run.",
    "sweep": "Choose steps, guidance and average of a run on images set apart, and report the choice once on others.",
    "prefetch": "Say which feature extractors can be had, from where and under which licence; download them with "
    "--yes.",
    "report": "Write what a run is and does into one page: report.html. Of several runs, compare them.",
    "export": "Write a network for other programs: a hub folder, ONNX files, a diffusers pipeline or a web page.",
    "serve": "Serve a run's network as a page and a JSON API; also while the run trains.",
    "estimate": "Say what a training costs: parameters, arithmetic, memory, time.",
    "study collapse": "Compare naive joint training, and each step from it to DSD, under one budget; writes table and "
    "pictures.",
    "study onestep": "Compare divergences, ratio networks and score distillation in one-step training; writes table "
    "and pictures.",
    "study initialisation": "Compare what a one-step generator and its ratio network start from, in pixels; writes "
    "table and pictures.",
    "study bias": "Measure bias and variance of the generator's gradient from two learned scores against one learned "
    "ratio.",
    "data inspect": "Say what is in a data source: shapes, ranges, classes, unreadable files, and what to do about "
    "them.",
    "data convert": "Write a zip of PNG images of one size: resized with a filter against aliasing, cropped at the "
    "centre.",
    "data stats": "Store the feature statistics of a data source, for `onefold evaluate --reference`.",
}
"""Each command and the first line of its docstring."""

BEGINNING = {
    "onefold sample digits": "images at once, by a network that comes with the package",
    "onefold data inspect photos/": "what is in a folder of images",
    "onefold train auto --data photos/ --out runs/photos": "train on them, for half an hour",
    "onefold train digits --out runs/digits": "train a network on the embedded digits, some minutes on a laptop",
    "onefold sample runs/digits -n 64": "images from it",
    "onefold onestep runs/digits": "make a one-step generator of it",
    "onefold evaluate runs/digits": "measure it against real images",
}
"""The commands to begin with."""

PARSING = ("train", "onestep", "estimate")
"""Commands that parse their own arguments: the first, a recipe or run, decides the defaults of the options."""

TOGETHER = ("train", "onestep", "evaluate", "sample")
"""Commands that several processes can carry out together."""

MODULES = {"sample": "images", "reconstruct": "images"}
"""Of the commands whose module in `commands` does not bear the name of their first word."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGINT, _leave)  # while modules are imported, which may not bear an exception
    sys.unraisablehook = _not_ignored
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    if code > 128 or (code and "RANK" in os.environ):  # threads and processes that still work have nothing to add
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


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
    except Elsewhere as error:
        return error.code
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported yet
            raise
        cure = "give less to a pass (--training.micro-batch, or --batch); `onefold estimate` tells what fits"
        return _fail(f"the device has no memory left ({str(error).splitlines()[0]}); {cure}", 2)
    except OSError as error:  # a name that the system does not take, a disk that fails
        return _fail(f"{error.filename or 'a file'}: {reason(error)}; check the name and the disk", 2)
    return 0


def command(name: str) -> Callable[..., None]:
    """The function of a command, whose module is imported."""
    first, *rest = name.split()
    module = importlib.import_module(f"onefold.commands.{MODULES.get(first, first)}")
    return getattr(module, rest[0] if rest else first)


def _dispatch(arguments: list[str]) -> None:
    if not arguments:
        return _show_beginning()
    if arguments[0] in ("-h", "--help"):
        return _show(COMMANDS)
    if arguments[0] == "--version":
        print(f"onefold {__version__}")
        return None
    if arguments[0] == "--print-completion":
        return _print_completion(arguments[1:])
    option, equals, value = arguments[0].partition("=")
    if option == "--import":
        _import([value] if equals else arguments[1:2])
        return _dispatch(arguments[1 if equals else 2 :])
    for words in (2, 1):
        name, rest = " ".join(arguments[:words]), arguments[words:]
        if name in COMMANDS:
            return _call(name, rest)
    group = {name: line for name, line in COMMANDS.items() if name.startswith(arguments[0] + " ")}
    if group and arguments[1:] in (["-h"], ["--help"]):
        return _show(group)
    word = " ".join(arguments[:2]) if group else arguments[0]
    if group and len(arguments) == 1:
        raise UserError(f"{word}: is followed by one of {', '.join(name.split()[1] for name in group)}")
    close = difflib.get_close_matches(word, group or COMMANDS, 1)
    choice = f"perhaps {close[0]}?" if close else f"choose one of {', '.join(group or COMMANDS)}"
    raise UserError(f"{word}: no such command; {choice}")


def _import(given: list[str]) -> None:
    """Run a Python file, whose divergence, solver, network or phase the command then knows by the name it registers."""
    path = Path(given[0]) if given else None
    if path is None or path.suffix != ".py":
        raise UserError(f"--import: needs a .py file that registers what is your own{f', not {path}' if path else ''}")
    if not path.is_file():
        raise UserError(f"--import: {path}: no such file; give the .py file that registers what is your own")
    there = None if path.stem in sys.modules else importlib.util.find_spec(path.stem)
    if path.stem in sys.modules or (there is not None and Path(there.origin or "").resolve() != path.resolve()):
        raise UserError(f"--import: {path} has the name of another module; give it a name of its own")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        if isinstance(error, UserError):
            raise
        raise UserError(f"--import: {path} cannot be run ({type(error).__name__}: {error}); mend it first") from error


def _call(name: str, arguments: list[str]) -> None:
    function = command(name)
    if signal.getsignal(signal.SIGINT) is _leave:  # all is imported
        signal.signal(signal.SIGINT, _interrupt)
    with _together(name) if "RANK" in os.environ else contextlib.nullcontext():
        if name in PARSING:
            return function(arguments)
        from onefold.commands.arguments import parse

        return parse(function, arguments, f"onefold {name}")


@contextlib.contextmanager
def _together(name: str) -> Generator[None]:
    """Work together with the other processes that a launcher has started; the first alone prints."""
    from onefold.training.engine import joined

    with joined() as group, Path(os.devnull).open("w") as nowhere:
        if group.count > 1 and name not in TOGETHER:
            raise UserError(f"{name}: is the work of one process; leave the launcher (torchrun) out")
        with contextlib.nullcontext() if group.first else contextlib.redirect_stdout(nowhere):
            yield


def _print_completion(arguments: list[str]) -> None:
    from onefold.commands.completion import check_shell, options_in, script

    shell, options = check_shell(arguments), dict[str, list[str]]()
    for name in COMMANDS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            _call(name, ["--help"])
        options[name] = options_in(shown.getvalue())
    print(script(shell, options), end="")


def _show_beginning() -> None:
    print("onefold: image generators as one network, trained in one run, sampled in one step\n")
    width = max(map(len, BEGINNING))
    for line, what in BEGINNING.items():
        print(f"  {line:<{width}}  {what}")
    print("\n`onefold --help` shows all commands, `onefold COMMAND --help` a command's options and an example.")
    print('`eval "$(onefold --print-completion bash)"` (or zsh) completes them; there is one for fish too.')


def _show(commands: dict[str, str]) -> None:
    print("onefold: image generators as one network, trained in one run, sampled in one step\n")
    width = max(map(len, commands))
    for name, line in commands.items():
        print(f"  {name:<{width}} {line}")
    print("\n`onefold COMMAND --help` shows a command's options and an example; `onefold --import FILE.py COMMAND …`")
    print("first runs a file of your own, such as one that registers a divergence.")


def _fail(error: object, code: int) -> int:
    print(f"onefold: {printable(error)}", file=sys.stderr)
    return code


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: there is nothing to save, or it is the second time."""
    os.write(2, b"onefold: interrupted\n")
    os._exit(128 + number)


def _not_ignored(ignored: Any) -> None:
    """Python ignores what is raised amid a destructor or its own bookkeeping. A Ctrl-C that falls there ends all."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        _leave(signal.SIGINT, None)
    sys.__unraisablehook__(ignored)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends what is being done; the next ends the process."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt
