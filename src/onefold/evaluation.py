"""Evaluation of a run: samples, reconstructions and latents against real images, as one record.

The reference of the generated images is the training split (as is usual for the Fréchet distance), which favours a
network that remembers it; the group `test` compares them with the test split, which training never saw. Reconstructions
and latents are those of the test split. Generated image k has the label of the k-th reference image and the seed
`seed + k`, so a record does not depend on the batch size.

Yardsticks come with the distances, under the same features. `halves` is the mean Fréchet distance between two random
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
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
    effective_rank,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    memorisation,
    precision_recall,
)
from onefold.metrics.few import few_images, wilson_interval
from onefold.metrics.reconstruction import image_psnr, image_ssim
from onefold.networks.base import Network
from onefold.pixels import to_float, to_uint8
from onefold.sampling import Sampler
from onefold.settings import Precision
from onefold.training.checkpoint import checkpoints
from onefold.training.engine import Ranks, joined, ranks
from onefold.training.run import Run, git_commit, load_run
from onefold.verifier import Verifier

__all__ = ["KEYS", "LEAST_IMAGES", "LEAST_TEST_IMAGES", "SPLITS", "Metric", "drawn", "evaluate"]

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
    "protocol",
    "subject",
)
"""All that a record may hold, but for metrics of one's own."""

LEAST_IMAGES, LEAST_TEST_IMAGES = 4, 2
"""Of training images, and of test images, to measure anything."""
SPLITS = 10
"""Random halvings that the yardsticks are averaged over."""
NEIGHBOURS = 3
SPLIT = "train (samples), test (the group `test`, reconstructions, latents)"
REDUCED = 64
"""Height and width that larger images are reduced to before they are compared pixel by pixel."""
LATENTS = 2**26
"""Numbers in the latents that are kept for their rank, 256 MiB; the group `latent` is of as many test images as fit."""

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
    extractor: FeatureExtractor | None = None,
    reference: Moments | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    compiled: bool = False,
    verifier: Callable[[Network], Verifier] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    say: Say = lambda line: None,
) -> Record:
    """Measure a run's published network. Started by a launcher, processes sample together, and the first measures.

    Args:
        run: A run with a model, or its folder.
        sampler: How to sample; default: the run's own.
        images: Number of generated and of reference images, at most the number of training images.
        seed: Seed of the first generated image, and of the random choices.
        extractor: Features; default: `extractor_for` the run's training data.
        reference: Stored statistics (`onefold data stats`) to measure a further `frechet_to_reference` against.
        batch: Images per call of a network; does not change the result but for rounding.
        device: Where the network runs.
        precision: Of the matrix products of sampling; all else is measured in float32.
        compiled: Compile the network for sampling; images/s then include that.
        verifier: Makes the verifier that chooses among samples of the network, if one is to.
        metrics: Further metrics by the name that their numbers have in the record, such as
            {"brightness": lambda real, generated: generated.float().mean() - real.float().mean()}; for one of features
            take those of an extractor in it.
        say: Told what is being done, a line each.

    Raises:
        UserError: no model, unreadable data, a sampler that does not suit the network, statistics of another extractor,
            or a metric with the name of another or without a number.

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
    extractor = extractor or extractor_for(train, say, device)
    if group.first:
        group.wait()
    say(f"measuring {count:,} training images")
    first, stop = group.span(count)  # of the images that this rank reads and samples
    keep = bool(metrics)
    real = _Images(extractor, keep=keep)
    for x, y in read_batches(train, drawn(train, count, seed)[first:stop], batch):
        real.add(x, y)

    say(f"sampling {count:,} images in {count_text(sampler.steps, 'step')}")
    wanted = real.labels.tolist() if network.config.classes else None
    classifies = wanted is not None and extractor.classes == network.config.classes
    generated = _Images(extractor, classifies=classifies, keep=keep)
    source = verifier(network) if verifier else network
    if precision == "auto":  # what one rank measures holds for all
        precision = cast(Precision, group.of_first(resolve_precision(precision, torch.device(device))))
    with sampling_context(network, torch.device(device), precision=precision, compiled=compiled) as computed:
        seconds, start = 0.0, time.perf_counter()
        for latents in source.sample_latents(range(seed + first, seed + stop), wanted, sampler, batch=batch):
            made = torch.from_numpy(network.pictures([latents])).permute(0, 3, 1, 2)
            seconds += time.perf_counter() - start
            with torch.autocast(torch.device(device).type, enabled=False):
                generated.add(made)
            start = time.perf_counter()
    for each in (real, generated):
        each.gather(group, count)
    if not group.first:
        return Record(json.loads(group.of_first("")))

    chosen = drawn(test, images, seed)
    say(f"measuring {count_text(len(chosen), 'test image')}")
    held_out = _Images(extractor, classifies=classifies)
    reconstructed = _Reconstructions(network, extractor)
    for x, y in read_batches(test, chosen, batch):
        held_out.add(x, y)
        reconstructed.add(x)

    say("comparing")
    real_features, generated_features, test_features = real.features, generated.features, held_out.features
    kid, kid_error = kernel_distance(real_features, generated_features, subset=min(1000, count // 2), seed=seed)
    precision_, recall = precision_recall(real_features, generated_features, NEIGHBOURS)
    halves, matched = _yardsticks(real_features, generated_features, seed)
    numbers: dict[str, object] = {
        "frechet_distance": frechet_distance(real_features, generated_features),
        "frechet": {
            "halves": halves,
            "matched": matched,
            "ratio": matched / halves if halves else None,
            "floor": halves / 2,
        },
        "kid": kid,
        "kid_error": kid_error,
        "precision": precision_,
        "recall": recall,
        "memorisation": _memorisation(generated.rows, real.rows, None if test is train else held_out.rows, say),
        "reconstruction": reconstructed.numbers(test_features),
        "latent": reconstructed.latent(),
        "images_per_second": count / seconds,
    }
    if test is not train and len(chosen) >= LEAST_IMAGES:
        numbers["test"] = _against_test(real_features, generated_features, test_features, seed)
    if classifies:
        for name, seen, labels in (
            ("class_accuracy", generated, real.labels),
            ("class_accuracy_real", held_out, held_out.labels),
        ):
            share = (seen.classes == labels).double().mean().item()
            numbers[name], numbers[f"{name}_interval"] = share, list(wilson_interval(share, len(labels)))
    if reference is not None:
        moments = Moments.from_features(generated_features, extractor.sha256)
        numbers["frechet_to_reference"] = frechet_from_moments(reference, moments)
    numbers |= {name: _number(name, metric(real.pixels, generated.pixels)) for name, metric in (metrics or {}).items()}
    outside = count - 1 if test is train else len(chosen)
    subject, selection, selected = _subject(run, len(train))
    few = few_images(generated=count, held_out=outside, tested=len(chosen), width=extractor.width, selected_by=selected)
    if numbers["memorisation"] is None:
        few.pop("memorisation", None)
    numbers["few"] = {name: why for name, why in few.items() if name.partition(".")[0] in {*numbers, "selection"}}
    protocol = Protocol(
        data=train.source,
        data_sha256=train.digest(),
        split="train (samples, reconstructions, latents)" if test is train else SPLIT,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        real_images=count,
        generated_images=count,
        few_images=count < 2 * extractor.width,
        test_images=len(chosen),
        test_data_sha256=test.digest(),
        kid_subset=min(1000, count // 2),
        neighbours=NEIGHBOURS,
        sampler=_sampler_text(sampler) + (f", {source}" if verifier else ""),
        steps=sampler.steps,
        guidance=sampler.guidance,
        ema=run.config.training.ema_half_lives[-1],
        selection=selection,
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
        if counters["best"] is not None:
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


class _Images:
    """What is kept of images that come batch by batch and go: features, classes, and their pixels reduced to rows.

    A row takes H·W·C bytes, of images larger than `REDUCED` as many as one of that size: 12 KiB of an RGB image.
    """

    def __init__(self, extractor: FeatureExtractor, *, classifies: bool = False, keep: bool = False) -> None:
        """`classifies`: keep the extractor's classes; `keep`: all pixels, which metrics of the caller's own need."""
        self._extractor, self._classifies, self._keep = extractor, classifies, keep
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, images: UInt8[Tensor, "B C H W"], labels: Int64[Tensor, " B"] | None = None) -> None:
        found = {"features": self._extractor.features(images, len(images)), "rows": _shrink(images)}
        if self._classifies:
            found["classes"] = self._extractor.predict(images, len(images))
        if self._keep:
            found["pixels"] = images
        if labels is not None:
            found["labels"] = labels
        for name, part in found.items():
            self._parts.setdefault(name, []).append(part)

    def gather(self, group: Ranks, total: int) -> None:
        """In the first rank, keep what all ranks have of `total` images."""
        self._parts = {name: [group.gathered(self._all(name), total)] for name in self._parts}

    def _all(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = [torch.cat(parts)]
        return self._parts[name][0]

    @property
    def features(self) -> Float[Tensor, "n d"]:
        return self._all("features")

    @property
    def rows(self) -> UInt8[Tensor, "n d"]:
        return self._all("rows")

    @property
    def classes(self) -> Int64[Tensor, " n"]:
        return self._all("classes")

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        return self._all("labels")

    @property
    def pixels(self) -> UInt8[Tensor, "n C H W"]:
        return self._all("pixels")


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


def _shrink(images: UInt8[Tensor, "n C H W"]) -> UInt8[Tensor, "n d"]:
    """Pixels in rows; where an image is larger than `REDUCED`, means over areas, rounded."""
    height, width = images.shape[2:]
    if max(height, width) <= REDUCED:
        return images.flatten(1)
    size = min(height, REDUCED), min(width, REDUCED)
    return F.adaptive_avg_pool2d(images.float(), size).round().to(torch.uint8).flatten(1)


def _yardsticks(real: Float[Tensor, "n d"], made: Float[Tensor, "n d"], seed: int) -> tuple[float, float]:
    """Mean Fréchet distances over random halvings: half against half, and half against as many generated."""
    rng = torch.Generator().manual_seed(seed)
    half = len(real) // 2
    between, against = [], []
    for _ in range(SPLITS):
        order = torch.randperm(len(real), generator=rng)
        first, second = real[order[:half]], real[order[half : 2 * half]]
        some = made[torch.randperm(len(made), generator=rng)[:half]]
        between.append(frechet_distance(first, second))
        against.append(frechet_distance(first, some))
    return float(np.mean(between)), float(np.mean(against))


def _against_test(
    real: Float[Tensor, "n d"], made: Float[Tensor, "n d"], test: Float[Tensor, "m d"], seed: int
) -> dict[str, float]:
    """Generated images against the test images; precision and recall, which need it, of as many as these."""
    fewer = min(len(made), len(test))
    kid, kid_error = kernel_distance(test, made, seed=seed)
    precision, recall = precision_recall(test[:fewer], made[:fewer], NEIGHBOURS)
    return {
        "frechet_distance": frechet_distance(test, made),
        "floor": frechet_distance(test, real),
        "kid": kid,
        "kid_error": kid_error,
        "precision": precision,
        "recall": recall,
    }


class _Reconstructions:
    """What is kept of images that are encoded and decoded batch by batch: features, errors and latents."""

    def __init__(self, network: Network, extractor: FeatureExtractor) -> None:
        self._network, self._extractor = network, extractor
        self._features: list[Tensor] = []
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._room = LATENTS
        self._values = 1

    @torch.no_grad()
    def add(self, x: UInt8[Tensor, "B C H W"]) -> None:
        z = self._network.encode(to_float(x.to(self._network.device)))
        x_hat = to_uint8(self._network.decode(z)).cpu()
        self._features.append(self._extractor.features(x_hat, len(x)))
        self._psnr.append(image_psnr(x_hat, x))
        self._ssim.append(image_ssim(x_hat, x))
        kept = z[: self._room // z[0].numel()].cpu()
        self._room -= kept.numel()
        self._latents.append(kept)
        self._values = x[0].numel()

    def numbers(self, features: Float[Tensor, "n d"]) -> dict[str, float]:
        """`features` are those of the images."""
        psnr, ssim = (torch.cat(parts).mean().item() for parts in (self._psnr, self._ssim))
        distance = frechet_distance(features, torch.cat(self._features))
        return {"psnr": psnr, "ssim": ssim, "frechet_distance": distance}

    def latent(self) -> dict[str, float]:
        """Effective rank over tokens and over whole latents, and the standard deviation over images, averaged."""
        z = torch.cat(self._latents)
        found = {
            "effective_rank": effective_rank(z.flatten(0, 1)),
            "effective_rank_whole": effective_rank(z.flatten(1)),
            "std": z.std(0).mean().item(),
            "numbers_per_pixel_value": z[0].numel() / self._values,
        }
        fewer = len(z) < sum(map(len, self._psnr))
        return found | {"images": len(z)} if fewer else found
