"""`onefold evaluate`."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from onefold.commands import tables
from onefold.commands.images import verifier_factory
from onefold.commands.terminal import console, discard
from onefold.errors import writing
from onefold.settings import Precision

__all__ = ["evaluate"]


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
    features: Path | None = None,
    features_sha256: str | None = None,
    features_size: int = 299,
    reference: Path | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Measure a run against real images; writes evaluation/….json into the run.

    Example: onefold evaluate runs/digits --steps 50 --json

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
        features: Feature extractor: .safetensors, .pt (TorchScript) or .onnx. Default: a small classifier of the data.
        features_sha256: Refuse the features' file if it has another SHA-256.
        features_size: Side to which images are resized for an external extractor.
        reference: Statistics of `onefold data stats` to measure a further Fréchet distance against.
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
    record = evaluation.evaluate(
        loaded,
        sampler=sampler,
        images=images,
        seed=seed,
        batch=batch,
        extractor=metrics.from_file(features, features_sha256, size=features_size) if features else None,
        reference=metrics.Moments.load(reference) if reference else None,
        device=resolve_device(device),
        precision=precision,
        compiled=compiled,
        verifier=verifier,
        say=discard if quiet or json else lambda line: console.print(line, style="dim"),
    )
    name = f"{sampler.solver}-{sampler.steps}-guidance-{sampler.guidance:g}-shift-{sampler.shift:g}-seed-{seed}"
    name += f"-best-of-{best_of}" if best_of else f"-resample-{resample}" if resample else ""
    path = run / "evaluation" / f"{name}.json"
    if ranks().first:
        with writing(path):
            record.write(path)
    if json and ranks().first:
        print(path.read_text(encoding="utf-8"), end="")
    elif not json:
        tables.show_record(console, record)
        console.print(f"{path}")
