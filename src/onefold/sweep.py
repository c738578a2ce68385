"""A sweep: which average, number of steps and guidance a run is best sampled with, chosen and reported apart.

A number that was the least of many is too good: its chance was selected too. So settings are compared on a selection
part, and the one chosen is then measured once, by the ordinary protocol of `evaluation`, on what the choice never saw:

    training images, in one random order:   | images of the report | images of the selection | rest |
    seeds of generated images:              | seed …               | seed + images …         |

All settings are compared on the same reference and the same seeds and labels, so that they share what chance they have.
The choice is by the Fréchet distance in the first feature space, of which the others know nothing: where they disagree,
the first may have been gamed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from onefold import sampling
from onefold.compute import sampling_context
from onefold.data import read_batches
from onefold.data.messages import count_text
from onefold.errors import UserError
from onefold.evaluation import Features, drawn, evaluate, generate, opened
from onefold.metrics import frechet_distance, kernel_distance
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.spaces import LEAST_IMAGES, Images
from onefold.training.run import Run

__all__ = ["sweep"]

SHARE = 5
"""One in so many training images is set apart for the selection, if all are to be used."""
MOST = 5000
"""Images of the report, and of the selection, unless others are wanted."""
Say = Callable[[str], None]


def sweep(
    run: Run,
    samplers: Sequence[Sampler],
    *,
    averages: Sequence[int] = (),
    images: int | None = None,
    selection: int | None = None,
    seed: int = 0,
    extractor: Features | Sequence[Features] = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare settings on a selection part, and report the best once by the ordinary protocol.

    Args:
        run: A run with a model.
        samplers: Of which one is to be chosen.
        averages: Half-lives of the averages among which to choose too; default: the published network alone.
        images: Generated and reference images of the report; default: four fifths of the training images, up to 5,000.
        selection: Those of the selection, which are others; default: up to 5,000 of the rest.
        seed: Seed of the first generated image, and of the random order of the training images.
        extractor: Features; the choice is by the first.
        batch: Images per call of a network.
        device: Where the networks and the default features run.
        precision: Of the matrix products of sampling.
        say: Told what is being done, a line each.

    Returns:
        `settings`: of each, `average`, `steps`, `guidance`, `images_per_second` and by space, under `spaces`,
        `frechet_distance`, `kid` and `kid_error`; `chosen`: the index of the best; `selection`: on what; `record`: the
        report, whose protocol says that its setting was chosen, and among how many.

    Raises:
        UserError: nothing to choose among, an average that the run does not have, or too few images: both parts must be
            there, and the selection must have as many images as the first features are wide.
    """
    settings = list(product(averages or (None,), samplers))
    if len(settings) < 2:
        raise UserError("sweep: a single setting leaves no choice; give several --steps, --guidance or --averages")
    runs = {average: replace(run, average=average) for average in dict.fromkeys(average for average, _ in settings)}
    for average, sampler in settings:
        sampling.check_guidance(sampler.guidance, runs[average].network.config.classes)
    train, _ = run.open_data(say)
    reported = min(MOST, len(train) - len(train) // SHARE) if images is None else min(images, len(train))
    if reported < LEAST_IMAGES:
        raise UserError(f"images: {reported} are too few to measure anything; give at least {LEAST_IMAGES}")
    rest = len(train) - reported
    count = min(MOST, rest) if selection is None else selection
    if not LEAST_IMAGES <= count <= rest:
        cure = f"give less than {len(train):,} to both (--images, --selection)"
        raise UserError(f"images: of {len(train):,} to train on, {reported:,} for the report leave {rest:,}; {cure}")
    extractors = opened(extractor, train, device, say)
    if count < extractors[0].width:
        few = f"{count:,} images for the selection, fewer than the {extractors[0].width} features"
        raise UserError(f"selection: {few}: chance would choose; give it more, and the report less (--images)")

    real = Images(extractors)
    for x, y in read_batches(train, drawn(train, reported + count, seed)[reported:], batch):
        real.add(x, y)
    seeds = range(seed + reported, seed + reported + count)
    found: list[dict[str, Any]] = []
    for k, (average, sampler) in enumerate(settings):
        what = f"{count_text(sampler.steps, 'step')}, guidance {sampler.guidance:g}"
        say(f"setting {k + 1} of {len(settings)}: {what}" + (f", average {average:,}" if average else ""))
        network = runs[average].network
        labels = real.labels.tolist() if network.config.classes else None
        made = Images(extractors)
        with sampling_context(network, torch.device(device), precision=precision):
            few = replace(sampler, steps=min(sampler.steps, 2))  # the first call of a network is slower: not timed
            generate(network, few, seeds[:batch], labels and labels[:batch], Images([]), batch=batch)
            seconds = generate(network, sampler, seeds, labels, made, batch=batch)
        spaces: dict[str, dict[str, float]] = {}
        for each, x, y in zip(extractors, real.features, made.features, strict=True):
            kid, kid_error = kernel_distance(x, y, seed=seed)
            spaces[each.name] = {"frechet_distance": frechet_distance(x, y), "kid": kid, "kid_error": kid_error}
        found.append(
            {
                "average": runs[average].half_life,
                "steps": sampler.steps,
                "guidance": sampler.guidance,
                "images_per_second": count / seconds,
                "spaces": spaces,
            }
        )
    first = extractors[0].name
    best = min(range(len(found)), key=lambda k: found[k]["spaces"][first]["frechet_distance"])
    average, sampler = settings[best]
    how = f"least Fréchet distance ({first}) of {count:,} samples of other seeds to as many other training images"
    record = evaluate(
        runs[average],
        sampler=sampler,
        images=reported,
        seed=seed,
        extractor=extractors,
        batch=batch,
        device=device,
        precision=precision,
        selected=f"sampler and average of {len(settings)} settings: {how}",
        say=say,
    )
    part = {"images": count, "first_seed": seeds.start, "extractor": first, "data_sha256": train.digest()}
    return {"settings": found, "chosen": best, "selection": part, "record": record}
