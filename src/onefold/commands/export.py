"""`onefold export`.

What needs torch is imported where it is used, so that `--help` does without it.
"""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable

__all__ = ["export"]


def export(
    run: Positional[Path],
    /,
    to: Literal["hub", "onnx", "diffusers", "web"],
    out: Path | None = None,
    push: str | None = None,
    private: bool = False,
    runtime: Path | None = None,
) -> None:
    """Write a network for other programs: a hub folder, ONNX files, a diffusers pipeline or a web page.

    Example: onefold export runs/digits-onestep --to onnx --out digits-onnx

    Args:
        run: A run's folder, a saved network's folder, a network on the hub (owner/name), or digits, which is in the
            package; a folder of that name goes first.
        to: hub: README.md (the model card), config.json, sampler.json, model.safetensors. onnx: each role as a file for
            onnxruntime; generator.onnx is one step of a one-step generator. diffusers: a folder for
            `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. web: a page that runs a one-step
            generator in the browser, for any server of plain files.
        out: Folder to write, a new or empty one. Default: RUN-hub, RUN-onnx, …, here.
        push: With --to hub or diffusers: then upload it to this repository on the hub (owner/name).
        private: Make the repository a private one, if it is new.
        runtime: With --to web: folder with onnxruntime-web's files. Default: node_modules/onnxruntime-web/dist, where
            `npm install onnxruntime-web` puts them.
    """
    if push is not None and to in ("onnx", "web"):
        raise UserError("--push: goes with --to hub or diffusers")
    from onefold.commands.images import run_name
    from onefold.export import diffusers, hub, onnx, web
    from onefold.files import is_unused
    from onefold.networks.base import Network
    from onefold.networks.source import upload
    from onefold.training.run import load_run

    found = load_run(run) if (run / "checkpoints").is_dir() else None
    network = found.network if found else Network.from_pretrained(run)
    folder = out or Path(f"{run_name(run)}-{to}")
    if not is_unused(folder):
        raise UserError(f"{folder}: is not an empty folder; choose another --out")
    if to == "hub":
        files = hub.write(network, folder, run=found, name=push or run_name(run))
    elif to == "web":
        files = web.write(network, folder, runtime=runtime or web.RUNTIME)
    else:
        files = (onnx if to == "onnx" else diffusers).write(network, folder)
    console.print(printable(f"{folder}: {', '.join(str(path.relative_to(folder)) for path in files)}"))
    if to == "onnx" and not network.sampler.jumps:
        console.print("no generator.onnx: it is written for a one-step generator, which `onefold onestep RUN` makes")
    if push is not None:
        console.print(upload(folder, push, private=private))
