"""`onefold sample` and `onefold reconstruct`.

What needs torch is imported where it is used, so that `--help` does without it.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro
from tyro.conf import Positional

from onefold.commands.terminal import console
from onefold.errors import UserError, printable
from onefold.settings import Precision

if TYPE_CHECKING:
    import numpy as np

    from onefold.networks.base import Network, NetworkConfig
    from onefold.verifier import Verifier

__all__ = ["reconstruct", "run_name", "sample", "verifier_factory"]

WRITERS = 2
"""Threads that write PNG files."""
REPLACES = "; replaces what was there"
"""Said of a picture whose name was taken."""


def sample(
    run: Positional[Path],
    /,
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None,
    out: Path | None = None,
    labels: tuple[str, ...] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    shift: float | None = None,
    best_of: int | None = None,
    resample: int | None = None,
    seed: int = 0,
    batch: int = 256,
    separate: bool = False,
    device: str = "auto",
    precision: Precision = "float32",
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False,
) -> None:
    """Generate images with a run's network.

    Example: onefold sample runs/digits -n 100 --steps 50 --labels 3 --out threes.png

    Args:
        run: A run's folder, a saved network's folder, a network on the hub (owner/name), or digits, which is in the
            package; a folder of that name goes first.
        n: Number of images. Default: as many as labels, if there are several, or else 64.
        out: PNG file of the grid, or folder with --separate. Default: RUN-samples.png, or a folder
            RUN-samples, here; with the seed and the options of sampling that are given in the name, as in
            RUN-samples-steps-8.png.
        labels: A class for all images, or one for each, by name (fox cat) or number; where names are numbers
            themselves, by name. Default: (seed + k) mod K.
        steps: Steps of the solver; 1 is one-step generation. Default: the run's.
        guidance: Weight of classifier-free guidance; 1 is none.
        solver: By name; a wrong one lists all. Default: the run's. euler, in 50 steps unless told otherwise,
            samples with a one-step generator's network as before it became one. one_pass does without decoding, in a
            network of one run: twice as fast as one step, the images a little worse.
        shift: Time shift of the solver's grid.
        best_of: Of N samples for each image keep the one that the run's ratio network prefers.
        resample: Of N samples for each image draw one by the run's ratio network, which keeps more variety.
        seed: Seed of the first image; image k has seed + k.
        batch: Images per call of the network; does not change them.
        separate: Write one PNG per image, named by its seed and class, instead of a grid.
        device: auto, cpu, cuda, …
        precision: Of matrix products. bfloat16 can be several times faster and changes images a little; auto takes it
            where it is at least twice as fast.
        compiled: Compile the network, which takes some 20 seconds the first time.
    """
    import torch

    from onefold.compute import resolve_device, resolve_precision, sampling_context
    from onefold.data.messages import count_text
    from onefold.networks.base import Network
    from onefold.pictures.grids import grid, save_png
    from onefold.sampling import check_guidance, resolve_labels
    from onefold.training.engine import ranks
    from onefold.training.run import load_run

    network = load_run(run).network if (run / "checkpoints").is_dir() else Network.from_pretrained(run)
    sampler = network.sampler.with_options(steps=steps, guidance=guidance, solver=solver, shift=shift)
    sampler.check_for(network.sampler)
    n = n if n is not None else len(labels) if labels is not None and len(labels) > 1 else 64
    if labels is not None and len(labels) == 1:
        labels = labels * n
    config = network.config
    y = resolve_labels(n, labels, seed, config.classes, config.class_names)
    verifier = verifier_factory(run, best_of=best_of, resample=resample)
    check_guidance(sampler.guidance, network.config.classes)
    where, group = resolve_device(device), ranks()
    first, stop = group.span(n)  # of the images that this rank samples
    if precision == "auto":  # what one rank measures holds for all
        precision = cast(Precision, group.of_first(resolve_precision(precision, where)))
    own = None if y is None else y[first:stop]
    chosen = {"steps": steps, "guidance": guidance, "solver": solver, "shift": shift}
    chosen |= {"best-of": best_of, "resample": resample, "seed": seed or None}
    name = f"{run_name(run)}-samples" + "".join(
        f"-{key}-{_plain(value)}" for key, value in chosen.items() if value is not None
    )
    with sampling_context(network, where, precision=precision, compiled=compiled) as computed:
        source = verifier(network) if verifier else network
        latents = source.sample_latents(range(seed + first, seed + stop), own, sampler, batch=batch)
        origin = {"network": run, "steps": sampler.steps, "guidance": sampler.guidance, "solver": sampler.solver}
        origin |= {"choice": str(source)} if verifier else {}
        origin |= {"precision": computed} if computed != "float32" else {}
        if separate:
            folder = out or Path(name)
            named = None if own is None else [_class_name(config, label) for label in own]
            replaced = _write_each(folder, (network.pictures([z]) for z in latents), seed + first, own, named, origin)
            group.wait()
            told = f"{folder}: {count_text(n)}, {count_text(sampler.steps, 'step')}"
            console.print(printable(told + (REPLACES if replaced else "")))
            return
        images = group.gathered(torch.from_numpy(network.pictures(latents)), n).numpy()
    if not group.first:
        return
    path = out or Path(f"{name}.png")
    about: dict[str, Any] = {"seeds": f"{seed}…{seed + n - 1}", "labels": y}
    if y is not None and config.class_names:
        about["classes"] = ", ".join(_class_name(config, label) for label in y)
    replaced = path.exists()
    save_png(path, grid(images), {**origin, **about})
    told = f"{path}: {count_text(n)}, {count_text(sampler.steps, 'step')}"
    console.print(printable(told + (REPLACES if replaced else "")))


def _plain(value: float | str) -> str:
    """An option's value in the name of a file."""
    return f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.+-]+", "_", str(value))


def run_name(run: Path) -> str:
    """What pictures of a run, or of the network saved in one, are named by."""
    folder = run.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _class_name(config: "NetworkConfig", label: int) -> str:
    """What a class is called, in metadata; its number where it has no name."""
    if label == config.classes:
        return "no class"
    return config.class_names[label] if config.class_names else str(label)


def _file_word(name: str, label: int) -> str:
    """What a class is called in the name of a file, where not every letter can stand."""
    word = re.sub(r"[^\w.+-]+", "_", name)[:60]
    return f"class{label}" if name in (str(label), "no class") else word


def _write_each(
    folder: Path,
    batches: "Iterable[np.ndarray]",
    seed: int,
    labels: list[int] | None,
    names: list[str] | None,
    origin: dict[str, Any],
) -> int:
    """A PNG file for each image, written by threads while the next batches are sampled; how many were there before."""
    from onefold.data.parallel import map_ordered
    from onefold.pictures.grids import save_png

    def numbered() -> "Iterator[tuple[int, np.ndarray]]":
        start = 0
        for images in batches:
            yield start, images
            start += len(images)

    def write(batch: "tuple[int, np.ndarray]") -> int:
        (start, images), replaced = batch, 0
        for k, image in enumerate(images, start):
            label, seeded = "", {**origin, "seed": seed + k, "label": "none"}
            if labels is not None and names is not None:
                label = f"-{_file_word(names[k], labels[k])}"
                seeded |= {"label": labels[k], "class": names[k]}
            path = folder / f"seed{seed + k}{label}.png"
            replaced += path.exists()
            save_png(path, image, seeded)
        return replaced

    return sum(map_ordered(write, numbered(), workers=WRITERS))


def reconstruct(
    run: Positional[Path],
    images: Positional[tuple[Path, ...]],
    /,
    out: Path | None = None,
) -> None:
    """Encode and decode images: above the originals, below what the network makes of them.

    Example: onefold reconstruct runs/digits one.png two.png --out both.png

    Args:
        run: As of `onefold sample`.
        images: Image files of the network's size, or a data source (folder, .zip, …; its first 30 images).
        out: PNG file to write. Default: RUN-reconstructions.png, here.
    """
    from onefold.data.messages import count_text
    from onefold.reconstruction import write_reconstructions

    path = out or Path(f"{run_name(run)}-reconstructions.png")
    replaced = path.exists()
    psnr, count = write_reconstructions(run, images, path)
    console.print(printable(f"{path}: {count_text(count)}, PSNR {psnr:.2f} dB{REPLACES if replaced else ''}"))


def verifier_factory(run: Path, *, best_of: int | None, resample: int | None) -> "Callable[[Network], Verifier] | None":
    """What makes the verifier of a network with the run's ratio network; None if none is wanted."""
    if best_of is None and resample is None:
        return None
    option, count = ("--best-of", best_of) if best_of is not None else ("--resample", resample)
    if best_of is not None and resample is not None:
        raise UserError("--best-of: cannot go with --resample; choose one")
    assert count is not None
    if count < 1:
        raise UserError(f"{option}: {count} is not positive; give at least 1")
    if not (run / "ratio").is_dir():
        raise UserError(
            f"{option}: {run} has no ratio network; give a run made with `onefold onestep RUN --method ratio`"
        )
    from onefold.networks.ratio import RatioNet
    from onefold.verifier import Verifier

    ratio = RatioNet.from_pretrained(run / "ratio")
    choice = "best" if best_of is not None else "resample"
    return lambda network: Verifier(network, ratio.to(network.device), count, choice)
