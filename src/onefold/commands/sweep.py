"""`onefold sweep`."""

import json as text
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from onefold.commands import tables
from onefold.commands.evaluate import opened_features
from onefold.commands.terminal import console, discard
from onefold.errors import printable, writing
from onefold.settings import Precision

__all__ = ["sweep"]


def sweep(
    run: Positional[Path],
    /,
    steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    averages: tuple[int, ...] = (),
    data: str | None = None,
    test_data: str | None = None,
    solver: str | None = None,
    shift: float | None = None,
    images: int | None = None,
    selection: int | None = None,
    seed: int = 0,
    batch: int = 256,
    features: tuple[Path, ...] = (),
    features_sha256: tuple[str, ...] = (),
    features_size: int = 299,
    device: str = "auto",
    precision: Precision = "float32",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Choose steps, guidance and average of a run on images set apart, and report the choice once on others.

    Example: onefold sweep runs/photos --steps 1 2 4 8 --guidance 1 1.5 2

    Args:
        run: A run's folder.
        steps: Numbers of steps to choose among. Default: the run's.
        guidance: Weights of classifier-free guidance to choose among; 1 is none. Default: the run's.
        averages: Half-lives, in images, of averages of the newest checkpoint to choose among. Default: the published
            network.
        data: Where the images that it was trained on are now. Default: where they were.
        test_data: Likewise its test images; or others of the same kind.
        solver: By name; a wrong one lists all. Default: the run's.
        shift: Time shift of the solver's grid.
        images: Generated and reference images of the report. Default: up to 5000 of four fifths of the training images.
        selection: Those of the choice, which are others. Default: up to 5000 of the rest.
        seed: Seed of the first generated image, and of the order of the training images.
        batch: Images per call of the networks; does not change the result.
        features: Feature extractors, as of `onefold evaluate`; the first choose, the others only show.
        features_sha256: Refuse the features' files, in the same order, if they have other SHA-256s.
        features_size: Side to which images are resized for a file that does not say.
        device: auto, cpu, cuda, …
        precision: Of matrix products while sampling; the record names it.
        json: Print all numbers as JSON.
        quiet: Print nothing but the numbers.
    """
    from onefold.compute import resolve_device  # only here, since they load torch
    from onefold.files import write_whole
    from onefold.metrics import Record
    from onefold.sweep import sweep as swept
    from onefold.training.run import load_run

    loaded, where = load_run(run, data=data, test_data=test_data), resolve_device(device)
    own = loaded.network.sampler
    samplers = [
        own.with_options(steps=count, guidance=weight, solver=solver, shift=shift)
        for count, weight in product(dict.fromkeys(steps or (None,)), dict.fromkeys(guidance or (None,)))
    ]
    for sampler in samplers:
        sampler.check_for(own)
    found = swept(
        loaded,
        samplers,
        averages=tuple(dict.fromkeys(averages)),
        images=images,
        selection=selection,
        seed=seed,
        extractor=opened_features(features, features_sha256, features_size, where),
        batch=batch,
        device=where,
        precision=precision,
        say=discard if quiet or json else lambda line: console.print(printable(line), style="dim"),
    )
    folder = run / "evaluation"
    name = f"swept-seed-{seed}" + "".join(f"-{path.stem}" for path in features)
    path, table = folder / f"{name}.json", folder / f"{name}-settings.json"
    with writing(path):
        Record(found["record"]).write(path)
        write_whole(table, text.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if json:
        print(table.read_text(encoding="utf-8"), end="")
        return
    if not quiet:
        console.print(_table(found))
        console.print("The choice, on images and seeds that had no part in it:")
    tables.show_record(console, found["record"])
    console.print(printable(f"{path} (the report), {table} (all settings)"))


def _table(found: Mapping[str, Any]) -> Table:
    """A row for each setting, the chosen one marked."""
    settings: list[dict[str, Any]] = found["settings"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    several = len({each["average"] for each in settings}) > 1
    for column in ("", *(["average"] if several else []), "steps", "guidance"):
        table.add_column(column, justify="right")
    for name in settings[0]["spaces"]:
        table.add_column(Text(f"Fréchet, {printable(name)}"), justify="right")
        table.add_column("KID", justify="right")
    table.add_column("images/s", justify="right")
    for k, each in enumerate(settings):
        cells = ["★" if k == found["chosen"] else "", *([f"{each['average']:,}"] if several else [])]
        cells += [str(each["steps"]), f"{each['guidance']:g}"]
        for space in each["spaces"].values():
            cells += [f"{space['frechet_distance']:.3f}", f"{space['kid']:.4f} ± {space['kid_error']:.4f}"]
        table.add_row(*cells, f"{each['images_per_second']:.1f}")
    return table
