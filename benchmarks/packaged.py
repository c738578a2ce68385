"""Make a network that ships in the package, of a run: half precision, its record, and the commands that made it.

    python benchmarks/packaged.py runs/digits-onestep digits

writes src/onefold/pretrained/digits/. What is measured is what ships: the weights after rounding.
"""

import shutil
import tempfile
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

import onefold
from onefold.errors import UserError, quoted
from onefold.evaluation import evaluate
from onefold.export.hub import card
from onefold.files import write_tensors
from onefold.networks.source import PACKAGED
from onefold.summary import command
from onefold.training.run import Run, load_run

LARGEST = int(2.5 * 2**20)
"""Bytes of a network's weights."""


def package(run: Positional[Path], name: Positional[str], /, into: Path = PACKAGED) -> None:
    """Make the network of a run one of the package.

    Example: python benchmarks/packaged.py runs/digits-onestep digits

    Args:
        run: A run's folder.
        name: What the network is called.
        into: Folder of all of them.
    """
    loaded, folder = load_run(run), into / name
    network = loaded.network
    half = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        rounded = Path(place) / run.resolve().name
        shutil.copytree(run, rounded, ignore=shutil.ignore_patterns("evaluation", "samples"))
        write_tensors(half, rounded / "model" / "model.safetensors")
        size = (rounded / "model" / "model.safetensors").stat().st_size
        if size > LARGEST:
            raise UserError(
                f"{run}: {size / 2**20:.1f} MiB in half precision, and at most 2.5 ship; give a smaller one"
            )
        shipped = load_run(rounded)
        record = evaluate(shipped, say=print)
        record.write(rounded / "evaluation" / "record.json")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rounded / "model", folder)
        shutil.copyfile(rounded / "evaluation" / "record.json", folder / "record.json")
        text = card(shipped.network, shipped, name).replace("(samples.png)", "")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("![")).rstrip()
    (folder / "README.md").write_text(
        f"{text}\n\n## Made by\n\n```sh\n{commands(loaded, name)}\n```\n", encoding="utf-8"
    )
    print(f"{folder}: {size / 2**20:.2f} MiB, Fréchet distance {record['frechet_distance']:.3f}")


def commands(run: Run, name: str) -> str:
    """What makes the run and this network of it, from nothing; places of the machine become `runs/…`."""
    lines, folders = list[str](), [run.folder]
    while run.config.start:
        lines.insert(0, command(run) or f"# {run.folder}: its teacher is gone")
        if not (Path(run.config.start) / "config.json").is_file():
            break
        run = load_run(run.config.start)
        folders.append(run.folder)
    else:
        lines.insert(0, command(run) or "# from Python")
    lines.append(f"python benchmarks/packaged.py {quoted(folders[0])} {name}")
    text = "\n".join(lines)
    for folder in folders:
        text = text.replace(str(folder), f"runs/{folder.name}")
    return text


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(f"onefold {onefold.__version__}")
    tyro.cli(package)
