"""Evaluation of a run: samples, reconstructions and latents against real images, as one record.

The reference of the generated images is the training split (as is usual for the Fréchet distance), which favours a
network that remembers it; the group `test` compares them with the test split, which training never saw. Reconstructions
and latents are those of the test split. Generated image k has the label of the k-th reference image and the seed
`seed + k`, so a record does not depend on the batch size.

Numbers of features are those of the first feature space, and under `spaces` those of each further one. Yardsticks come
with the distances, in the same features. `halves` is the mean Fréchet distance between two random
halves of the reference; `matched` is that between one half and as many generated images. Two *floors* say what real
images in place of the generated ones would have: `test.floor` is the distance between the reference and the test
images; `frechet.floor` is what n fresh images would have against the n of the reference. Of the latter there are none,
but for two sets of n and m images of one distribution, with covariance of eigenvalues λ,

    E d²  ≈  c·(1/n + 1/m),      c = Σ_i λ_i + ½ Σ_ij (1 + δ_ij) λ_i λ_j / (λ_i + λ_j)   for Gaussian features

(the means differ by Σ/n + Σ/m, and to second order in the error Δ of the covariances the rest is
½ Σ_ij Δ_ij² / (λ_i + λ_j)). Halves have c·4/n, n against n have c·2/n: the floor is half of `halves`, whatever c is.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from onefold import __version__, sampling
from onefold.compute import resolve_precision, sampling_context
from onefold.data import Dataset, read_batches
from onefold.data.messages import count_text
from onefold.errors import UserError, quoted
from onefold.extractor import extractor_for
from onefold.metrics import (
    FeatureExtractor,
    Moments,
    Protocol,
    Record,
    Subject,
    frechet_from_moments,
    memorisation,
)
from onefold.metrics.few import few_images, wilson_interval
from onefold.networks.base import Network
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.spaces import LEAST_IMAGES, NEIGHBOURS, Images, Reconstructions, check_spaces, compare
from onefold.training.checkpoint import checkpoints
from onefold.training.engine import joined, ranks
from onefold.training.run import Run, git_commit, load_run
from onefold.verifier import Verifier

__all__ = ["KEYS", "LEAST_IMAGES", "LEAST_TEST_IMAGES", "Features", "Metric", "drawn", "evaluate", "generate"]
__all__ += ["opened"]

KEYS = (
    "frechet_distance",
    "frechet",
    "kid",
    "kid_error",
    "precision",
    "recall",
    "test",
    "memorisation",
    "reconstruction",
    "latent",
    "images_per_second",
    "class_accuracy",
    "class_accuracy_real",
    "class_accuracy_interval",
    "class_accuracy_real_interval",
    "few",
    "frechet_to_reference",
    "spaces",
    "protocol",
    "subject",
)
"""All that a record may hold, but for metrics of one's own."""

LEAST_TEST_IMAGES = 2
"""Of test images, to measure anything; of training images they are `LEAST_IMAGES`."""
SPLIT = "train (samples), test (the group `test`, reconstructions, latents)"

Features = FeatureExtractor | None
"""An extractor; None: the default one, `extractor_for` the run's training data."""
Metric = Callable[[UInt8[Tensor, "n C H W"], UInt8[Tensor, "n C H W"]], float]
"""(real, generated) → one finite number. Generated image k has the label of real image k."""
Say = Callable[[str], None]


@joined()
def evaluate(
    run: Run | str | Path,
    *,
    sampler: Sampler | None = None,
    images: int = 5000,
    seed: int = 0,
    extractor: Features | Sequence[Features] = None,
    reference: Moments | Sequence[Moments] | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    compiled: bool = False,
    verifier: Callable[[Network], Verifier] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    reconstructions: Record | None = None,
    selected: str = "",
    say: Say = lambda line: None,
) -> Record:
    """Measure a run's published network. Started by a launcher, processes sample together, and the first measures.

    Args:
        run: A run with a model, or its folder.
        sampler: How to sample; default: the run's own.
        images: Number of generated and of reference images, at most the number of training images.
        seed: Seed of the first generated image, and of the random choices.
        extractor: Features; None: `extractor_for` the run's training data. Of several the first give the numbers of
            the record, and each of the others a group of the same under `spaces`, by its name.
        reference: Stored statistics (`onefold data stats`) to measure a further `frechet_to_reference` against, each in
            the space that they are of.
        batch: Images per call of a network; does not change the result but for rounding.
        device: Where the network and the default features run.
        precision: Of the matrix products of sampling; all else is measured in float32.
        compiled: Compile the network for sampling; images/s then include that.
        verifier: Makes the verifier that chooses among samples of the network, if one is to.
        metrics: Further metrics by the name that their numbers have in the record, such as
            {"brightness": lambda real, generated: generated.float().mean() - real.float().mean()}; for one of features
            take those of an extractor in it.
        reconstructions: A record of the same weights, test images, seed and features, as by another sampler: its groups
            `reconstruction` and `latent`, which no sampler changes, are taken over, not measured again.
        selected: How the sampler was chosen among others, for the protocol.
        say: Told what is being done, a line each.

    Raises:
        UserError: no model, unreadable data, a sampler that does not suit the network, statistics of another extractor,
            extractors of one name, a metric with the name of another or without a number, or reconstructions of others.

    Images are read, made, measured and dropped batch by batch. Of n images stay their features (n, d), float32, and
    their pixels reduced to at most 64 × 64, uint8, which the share of copies needs; of test images also latents, up to
    256 MiB. Only `metrics` of the caller's own are given all pixels, and so keep them in memory.
    """
    if not isinstance(cast(object, run), Run | str | Path):
        cure = "give a run, or its folder: a network alone does not know its data"
        raise UserError(f"run: {type(run).__name__} is no run; {cure}")
    run = run if isinstance(run, Run) else load_run(run)
    for name in metrics or {}:
        if name in KEYS:
            raise UserError(f"metrics: {name!r} is in every record; choose another name")
    sampler = sampler or run.network.sampler
    network = run.network.to(device)
    sampling.check_guidance(sampler.guidance, network.config.classes)
    train, test = run.open_data(say)
    if len(train) < LEAST_IMAGES:
        cure = f"look at samples instead, `onefold sample {quoted(run.folder)}`"
        raise UserError(f"{train.source}: {count_text(len(train))} to train on are too few to measure anything; {cure}")
    count = min(images, len(train))
    if count < LEAST_IMAGES:
        raise UserError(f"images: {count} are too few to measure anything; give at least {LEAST_IMAGES}")
    if len(test) < LEAST_TEST_IMAGES:
        raise UserError(f"{test.source}: {count_text(len(test), 'test image')} is too few; give more with --test-data")
    if batch < 1:
        raise UserError(f"batch: {batch} is not positive; give at least 1")
    sampling.resolve_labels(count, None, seed, 0)  # refuses a seed out of range
    group = ranks()
    if not group.first:  # which may train one first
        group.wait()
    extractors = opened(extractor, train, device, say)
    if group.first:
        group.wait()
    references = _by_space([reference] if isinstance(reference, Moments) else reference or (), extractors)
    chosen = drawn(test, images, seed)
    known = None if reconstructions is None else _known(reconstructions, run, test, len(chosen), seed, extractors)
    say(f"measuring {count:,} training images")
    first, stop = group.span(count)  # of the images that this rank reads and samples
    keep = bool(metrics)
    real = Images(extractors, keep=keep)
    for x, y in read_batches(train, drawn(train, count, seed)[first:stop], batch):
        real.add(x, y)

    say(f"sampling {count:,} images in {count_text(sampler.steps, 'step')}")
    wanted = real.labels.tolist() if network.config.classes else None
    classifies = [each for each in extractors if wanted is not None and each.classes == network.config.classes]
    classifier = classifies[0] if classifies else None
    generated = Images(extractors, classifier=classifier, keep=keep)
    source = verifier(network) if verifier else network
    if precision == "auto":  # what one rank measures holds for all
        precision = cast(Precision, group.of_first(resolve_precision(precision, torch.device(device))))
    with sampling_context(network, torch.device(device), precision=precision, compiled=compiled) as computed:
        seconds = generate(network, sampler, range(seed + first, seed + stop), wanted, generated, source, batch)
    for each in (real, generated):
        each.gather(group, count)
    if not group.first:
        return Record(json.loads(group.of_first("")))

    say(f"measuring {count_text(len(chosen), 'test image')}")
    held_out = Images(extractors, classifier=classifier)
    reconstructed = Reconstructions(network, extractors)
    for x, y in read_batches(test, chosen, batch):
        held_out.add(x, y)
        if known is None:
            reconstructed.add(x)

    say("comparing")
    apart = test is not train and len(chosen) >= LEAST_IMAGES
    sets = zip(real.features, generated.features, held_out.features, strict=True)
    compared = [compare(*features, seed=seed, held_out=apart) for features in sets]
    again, latent = known or (reconstructed.numbers(held_out.features), reconstructed.latent())
    for numbers, found in zip(compared, again, strict=True):
        numbers["reconstruction"] = found
    for numbers, stored, each, features in zip(compared, references, extractors, generated.features, strict=True):
        if stored is not None:
            moments = Moments.from_features(features, each.sha256)
            numbers["frechet_to_reference"] = frechet_from_moments(stored, moments)
    numbers = compared[0]
    numbers |= {
        "memorisation": _memorisation(generated.rows, real.rows, None if test is train else held_out.rows, say),
        "latent": latent,
        "images_per_second": count / seconds,
    }
    if classifier is not None:
        for name, seen, labels in (
            ("class_accuracy", generated, real.labels),
            ("class_accuracy_real", held_out, held_out.labels),
        ):
            share = (seen.classes == labels).double().mean().item()
            numbers[name], numbers[f"{name}_interval"] = share, list(wilson_interval(share, len(labels)))
    if len(extractors) > 1:
        numbers["spaces"] = {each.name: found for each, found in zip(extractors[1:], compared[1:], strict=True)}
    numbers |= {name: _number(name, metric(real.pixels, generated.pixels)) for name, metric in (metrics or {}).items()}
    outside = count - 1 if test is train else len(chosen)
    subject, selection, samples = _subject(run, len(train))
    few = {
        each.name: few_images(
            generated=count, held_out=outside, tested=len(chosen), width=each.width, selected_by=samples
        )
        for each in extractors
    }
    numbers["few"] = _few(few, numbers, extractors[0].name)
    described = [_described(each, count) for each in extractors]
    protocol = Protocol(
        data=train.source,
        data_sha256=train.digest(),
        split="train (samples, reconstructions, latents)" if test is train else SPLIT,
        **described[0],
        spaces={each["extractor"]: each for each in described[1:]},
        real_images=count,
        generated_images=count,
        test_images=len(chosen),
        test_data_sha256=test.digest(),
        kid_subset=min(1000, count // 2),
        neighbours=NEIGHBOURS,
        sampler=_sampler_text(sampler) + (f", {source}" if verifier else ""),
        steps=sampler.steps,
        guidance=sampler.guidance,
        ema=run.half_life,
        selection=f"{selection}; {selected}" if selected else selection,
        precision=computed,
        compiled=compiled,
        label_mode="of the reference images" if wanted is not None else "none",
        seed=seed,
        version=__version__,
    )
    record = Record.of(protocol, subject, **numbers)
    group.of_first(json.dumps(record))
    return record


def drawn(data: Dataset, count: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Indices of up to `count` images, drawn at random, since files are often sorted by class."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(len(data))[:count]


def opened(
    extractor: Features | Sequence[Features], train: Dataset, device: torch.device | str, say: Say
) -> list[FeatureExtractor]:
    """The extractors that are meant; the default one is trained if it must be.

    Raises:
        UserError: two that a record could not tell apart.
    """
    given = list(extractor) or [None] if isinstance(extractor, Sequence) else [extractor]
    found = [extractor_for(train, say, device) if each is None else each for each in given]
    check_spaces(found)
    return found


def generate(
    network: Network,
    sampler: Sampler,
    seeds: range,
    labels: Sequence[int] | None,
    into: Images,
    source: Network | Verifier | None = None,
    batch: int = 256,
) -> float:
    """Sample an image for each seed into what is kept of them; returns the seconds that sampling took.

    `source` gives the latents where it is not the network alone.
    """
    seconds, start = 0.0, time.perf_counter()
    for latents in (source or network).sample_latents(seeds, labels, sampler, batch=batch):
        made = torch.from_numpy(network.pictures([latents])).permute(0, 3, 1, 2)
        seconds += time.perf_counter() - start
        with torch.autocast(network.device.type, enabled=False):
            into.add(made)
        start = time.perf_counter()
    return seconds


def _by_space(references: Sequence[Moments], extractors: Sequence[FeatureExtractor]) -> list[Moments | None]:
    """For each extractor the statistics of it; those of no known one are the first's.

    Raises:
        UserError: two of one space.
    """
    found: list[Moments | None] = [None for _ in extractors]
    names = [each.sha256 for each in extractors]
    for moments in references:
        k = names.index(moments.extractor) if moments.extractor in names else 0
        if found[k] is not None:
            raise UserError(f"reference: two are of {extractors[k].name}; give one for each feature space")
        found[k] = moments
    return found


def _known(
    record: Record, run: Run, test: Dataset, count: int, seed: int, extractors: Sequence[FeatureExtractor]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What a record has of reconstructions, in each space, and of latents.

    Raises:
        UserError: a record of another network, other test images or features, or another version.
    """
    subject, protocol, spaces = (record.get(name, {}) for name in ("subject", "protocol", "spaces"))
    features = [each.get("extractor_sha256") for each in (protocol, *protocol.get("spaces", {}).values())]
    images = [protocol.get(name) for name in ("test_data_sha256", "test_images", "seed")]
    for same, what in (
        (subject.get("model_sha256") == run.model_sha256, "another network"),
        (images == [test.digest(), count, seed], "other test images, or another number or seed of them"),
        (features == [each.sha256 for each in extractors], "other features"),
        (protocol.get("version") == __version__, "another version"),
    ):
        if not same:
            raise UserError(f"reconstructions: the record is of {what}; leave it out, and they are measured")
    return [each["reconstruction"] for each in (record, *spaces.values())], record["latent"]


def _few(found: Mapping[str, Mapping[str, str]], numbers: Mapping[str, Any], first: str) -> dict[str, str]:
    """What rests on few images in each space, by the name that it has in the record, if it is there."""
    there = {*numbers, "selection"} - ({"memorisation"} if numbers["memorisation"] is None else set())
    few = {name: why for name, why in found[first].items() if name.partition(".")[0] in there}
    for space, whys in found.items():
        if space != first:  # where the distances alone depend on more, the number of features
            distances = {name: why for name, why in whys.items() if name.endswith("frechet_distance")}
            few |= {f"spaces.{space}.{name}": why for name, why in distances.items() if name.partition(".")[0] in there}
    return few


def _described(extractor: FeatureExtractor, count: int) -> dict[str, Any]:
    """A feature space, for the protocol."""
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "resize": extractor.resize,
        "few_images": count < 2 * extractor.width,
    }


def _number(name: str, value: object) -> float:
    """What a metric of the caller gave, which may be a tensor or array of one number.

    Raises:
        UserError: no single finite number.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        found = " ".join(repr(value).split())
        raise UserError(f"metrics: {name!r} gave {found[:60]}, not one finite number; return a float")
    return number


def _subject(run: Run, train_images: int) -> tuple[Subject, str, int | None]:
    """Which weights are published, and how and by how many samples they were chosen: by the newest checkpoint."""
    described = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    found = checkpoints(run.folder)
    seen, checkpoint, selection, samples = run.images, None, "unknown: the run has no checkpoints", None
    if found:
        counters = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))["counters"]
        seen = checkpoint = counters["images"]
        selection = "none: the last average"
        if counters["best"] is not None and run.average is None:
            checkpoint, samples = counters["best_images"], min(run.config.onestep.measured, train_images)
            selection = (
                f"least Fréchet distance of {samples:,} samples of other seeds to a fifth of the training images"
            )
    subject = Subject(
        model_sha256=run.model_sha256,
        training_seed=run.config.training.seed,
        images_seen=seen,
        checkpoint=checkpoint,
        training_commit=described.get("commit"),
        commit=git_commit(),
    )
    return subject, selection, samples


def _sampler_text(sampler: Sampler) -> str:
    """The solver, and what is not as usual."""
    text = sampler.solver if sampler.start == 0 else f"{sampler.solver} from t = {sampler.start:g}"
    if sampler.shift != 1:
        text += f", shift {sampler.shift:g}"
    if sampler.guidance != 1 and sampler.guidance_interval != (0, 1):
        text += ", guidance from {:g} to {:g}".format(*sampler.guidance_interval)
    return text


def _memorisation(
    generated: UInt8[Tensor, "n d"], real: UInt8[Tensor, "n d"], held_out: UInt8[Tensor, "m d"] | None, say: Say
) -> dict[str, float] | None:
    """In pixels, of images reduced to `REDUCED`, against the reference; None where those are copies of one another."""
    try:
        found = memorisation(generated, real, held_out)
    except UserError as error:
        say(f"memorisation is not measured: {error}")
        return None
    return {"share": found.share, "ratio": found.ratio}
