"""`onefold evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from onefold.commands import tables
from onefold.commands.images import verifier_factory
from onefold.commands.terminal import console, discard
from onefold.errors import UserError, writing
from onefold.settings import Precision

if TYPE_CHECKING:
    import torch

    from onefold.evaluation import Features

__all__ = ["evaluate", "opened_features"]

DEFAULT = Path("default")
"""The name of the features that come from a small classifier of the data."""


def evaluate(
    run: Positional[Path],
    /,
    data: str | None = None,
    test_data: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    shift: float | None = None,
    best_of: int | None = None,
    resample: int | None = None,
    images: int = 5000,
    seed: int = 0,
    batch: int = 256,
    features: tuple[Path, ...] = (),
    features_sha256: tuple[str, ...] = (),
    features_size: int = 299,
    reference: tuple[Path, ...] = (),
    device: str = "auto",
    precision: Precision = "float32",
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Measure a run against real images; writes evaluation/….json into the run.

    Example: onefold evaluate runs/photos --steps 50 --features inception dinov2 --images 50000

    Args:
        run: A run's folder.
        data: Where the images that it was trained on are now. Default: where they were.
        test_data: Likewise its test images; or others of the same kind.
        steps: Steps of the solver. Default: the run's.
        guidance: Weight of classifier-free guidance; 1 is none.
        solver: By name; a wrong one lists all. Default: the run's.
        shift: Time shift of the solver's grid.
        best_of: Of N samples for each image keep the one that the run's ratio network prefers.
        resample: Of N samples for each image draw one by the run's ratio network.
        images: Generated and reference images, at most as many as there are training images.
        seed: Seed of the first generated image.
        batch: Images per call of the networks; does not change the result.
        features: Feature extractors, one or several: default (a small classifier of the data); inception, dinov2 or
            clip, once `onefold prefetch` has them; a file, .safetensors, .pt (TorchScript) or .onnx; the folder of a
            DINOv2 or CLIP. Of several, the first give the main numbers.
        features_sha256: Refuse the features' files, in the same order, if they have other SHA-256s.
        features_size: Side to which images are resized for a file that does not say.
        reference: Statistics of `onefold data stats` to measure a further Fréchet distance against, for each of the
            features at most one.
        device: auto, cpu, cuda, …
        precision: Of matrix products while sampling; the record names it. auto: bfloat16 where it is twice as fast.
        compiled: Compile the network for sampling, which takes some 20 seconds the first time.
        json: Print the record as JSON.
        quiet: Print nothing but the record.
    """
    from onefold import evaluation, metrics  # only here, since they load torch
    from onefold.compute import resolve_device
    from onefold.training.engine import ranks
    from onefold.training.run import load_run

    loaded = load_run(run, data=data, test_data=test_data)
    sampler = loaded.network.sampler.with_options(steps=steps, guidance=guidance, solver=solver, shift=shift)
    sampler.check_for(loaded.network.sampler)
    verifier = verifier_factory(run, best_of=best_of, resample=resample)
    where = resolve_device(device)
    record = evaluation.evaluate(
        loaded,
        sampler=sampler,
        images=images,
        seed=seed,
        batch=batch,
        extractor=opened_features(features, features_sha256, features_size, where),
        reference=[metrics.Moments.load(path) for path in reference],
        device=where,
        precision=precision,
        compiled=compiled,
        verifier=verifier,
        say=discard if quiet or json else lambda line: console.print(line, style="dim"),
    )
    name = f"{sampler.solver}-{sampler.steps}-guidance-{sampler.guidance:g}-shift-{sampler.shift:g}-seed-{seed}"
    name += f"-best-of-{best_of}" if best_of else f"-resample-{resample}" if resample else ""
    name += "".join(f"-{path.stem}" for path in features)
    path = run / "evaluation" / f"{name}.json"
    if ranks().first:
        with writing(path):
            record.write(path)
    if json and ranks().first:
        print(path.read_text(encoding="utf-8"), end="")
    elif not json:
        tables.show_record(console, record)
        console.print(f"{path}")


def opened_features(
    paths: Sequence[Path], hashes: Sequence[str], size: int, device: "torch.device"
) -> "list[Features]":
    """The extractors that are named, on a device; None stands for the default one.

    Raises:
        UserError: hashes that are not one for each file, or an extractor that cannot be opened.
    """
    from onefold import metrics

    files = [path for path in paths if path != DEFAULT]
    if hashes and len(hashes) != len(files):
        raise UserError(f"--features-sha256: {len(hashes)} for {len(files)} files of --features; give one for each")
    expected = dict(zip(files, hashes, strict=False))
    return [
        None if path == DEFAULT else metrics.from_file(path, expected.get(path), size=size, device=device)
        for path in paths
    ]
