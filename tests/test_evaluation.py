import functools
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import onefold
from data_images import noise
from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold import evaluation, extractor, metrics, spaces
from onefold.cli import run as command
from onefold.commands import tables
from onefold.data import open_dataset, read_all
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.extractor import extractor_for
from onefold.networks.base import Network
from onefold.sampling import Sampler
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import Run, load_run, open_data


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    quick = functools.partial(metrics.train_classifier, epochs=1)
    monkeypatch.setattr(metrics, "train_classifier", quick)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("digits") / "run", quiet=True)


@pytest.fixture(scope="module")
def record(run: Run) -> metrics.Record:
    return evaluate(run, images=100)


@pytest.fixture
def unlabelled(tmp_path: Path) -> Run:
    """A run of 80 rectangular grey images without classes."""
    np.savez(tmp_path / "images.npz", images=noise(80, 4, 6, 1))
    config = tiny(data__source=str(tmp_path / "images.npz"), data__test=None, training__images=16)
    return train(config, tmp_path / "run", quiet=True)


class Seeing:
    """A feature extractor that keeps what it is shown: real, generated, and test images with their reconstructions."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self._honest = metrics.digits_classifier()

    def __getattr__(self, name: str) -> object:
        return getattr(self._honest, name)

    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        self.shown.append(images)
        return self._honest.features(images, batch)


class Pooled(nn.Module):
    """Means and largest values of the channels: other features than the classifier's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3)), x.flatten(1)[:, :3]], 1)


def pooled(path: Path) -> Path:
    """A file of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Pooled(), torch.rand(3, 3, 8, 8)).save(str(path))
    return path


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_record_has_the_keys_that_others_read(record: metrics.Record):
    for key in ("frechet_distance", "kid", "precision", "recall", "class_accuracy", "images_per_second"):
        assert isinstance(record[key], float)
    assert {"psnr", "ssim"} <= record["reconstruction"].keys()
    assert {"effective_rank", "std"} <= record["latent"].keys()
    assert all(np.isfinite(value) for value in record.numbers().values())


def test_its_numbers_are_within_their_ranges(record: metrics.Record):
    for key in ("precision", "recall", "class_accuracy", "class_accuracy_real"):
        assert 0 <= record[key] <= 1
    assert record["class_accuracy_real"] > 0.9, "the classifier knows real digits"
    assert record["frechet_distance"] > record["frechet"]["halves"] > 0
    assert record["frechet"]["ratio"] == record["frechet"]["matched"] / record["frechet"]["halves"]
    assert record["frechet"]["floor"] == record["frechet"]["halves"] / 2
    assert 5 < record["reconstruction"]["psnr"] < 60
    assert 1 <= record["latent"]["effective_rank"] <= 4
    assert record["latent"]["numbers_per_pixel_value"] == 1


def test_its_protocol_is_complete(run: Run, record: metrics.Record):
    training, test = open_data(run.config.data)
    protocol = record["protocol"]
    assert all(value is not None and value != "" for value in protocol.values())
    expected = {
        "data": "digits",
        "data_sha256": training.digest(),
        "extractor_sha256": metrics.digits_classifier().sha256,
        "resize": "none",
        "real_images": 100,
        "generated_images": 100,
        "few_images": True,
        "test_images": 100,
        "test_data_sha256": test.digest(),
        "sampler": "euler",
        "steps": 2,
        "guidance": 1.0,
        "ema": 64,
        "selection": "none: the last average",
        "precision": "float32",
        "label_mode": "of the reference images",
        "seed": 0,
        "version": onefold.__version__,
    }
    assert {name: protocol[name] for name in expected} == expected
    assert "train" in protocol["split"]
    assert "test" in protocol["split"]


def test_its_subject_says_which_model_it_is_of(run: Run, record: metrics.Record):
    commit = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["commit"]
    assert record["subject"] == {
        "model_sha256": run.model_sha256,
        "training_seed": 0,
        "images_seen": 160,
        "checkpoint": 160,
        "training_commit": commit,
        "commit": commit,
    }


def test_it_says_which_checkpoint_a_run_chose_and_how(run: Run, tmp_path: Path):
    """A one-step run publishes the average of its least distance."""
    changes = {"training__health_every": 64, "training__seed": 3, "training__on_collapse": "ignore"}
    config = one_step_from(run.folder, onestep__measured=40, **changes)
    fast = train(config, tmp_path / "fast", quiet=True)
    measured = [line["images"] for line in fast.history if line.get("onestep")]
    record = evaluate(fast, images=20)
    assert record["subject"]["checkpoint"] in measured
    assert record["protocol"]["sampler"] == "refine from t = 0.3"
    path = checkpoints(fast.folder)[-1] / "state.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["counters"]["best_images"] = 64  # as if the first had been the best
    path.write_text(json.dumps(described), encoding="utf-8")
    path.with_name("COMPLETE").write_text(json.dumps({path.name: path.stat().st_size}), encoding="utf-8")
    record = evaluate(fast, images=20)
    sizes = {name: record["subject"][name] for name in ("training_seed", "images_seen", "checkpoint")}
    assert sizes == {"training_seed": 3, "images_seen": 160, "checkpoint": 64}
    selection = "least Fréchet distance of 40 samples of other seeds to a fifth of the training images"
    assert record["protocol"]["selection"] == selection
    assert record["few"]["selection"].startswith("40 samples, below the 64 features")
    tables.show_record(Console(file=(shown := io.StringIO()), width=200), record)
    assert "The published weights were selected by 40 samples, below the 64 features" in shown.getvalue()


def test_without_checkpoints_it_does_not_pretend_to_know(run: Run, tmp_path: Path):
    folder = tmp_path / "published"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    record = evaluate(folder, images=20)
    assert record["subject"]["images_seen"] == 160
    assert record["subject"]["checkpoint"] is None
    assert record["protocol"]["selection"].startswith("unknown")


def test_the_protocol_names_everything_that_changes_the_numbers(run: Run):
    """Two records that differ only in one of these must not look comparable."""
    samplers = [
        Sampler(steps=2),
        Sampler(steps=3),
        Sampler(steps=2, solver="heun"),
        Sampler(steps=2, guidance=2.0),
        Sampler(steps=2, shift=2.0),
        Sampler(steps=2, guidance=2.0, guidance_interval=(0.0, 0.4)),
        Sampler(steps=2, start=0.3),
        Sampler(steps=2, start=0.5, shift=2.0),
        Sampler(steps=2, solver="refine"),
        Sampler(steps=2, solver="refine", start=0.3),
    ]
    records = [evaluate(run, sampler=sampler, images=20) for sampler in samplers]
    records += [evaluate(run, images=20, seed=1), evaluate(run, images=21)]
    protocols = [json.dumps(each["protocol"], sort_keys=True) for each in records]
    assert len(set(protocols)) == len(protocols)
    told = ["euler from t = 0.3", "euler from t = 0.5, shift 2", "refine", "refine from t = 0.3"]
    assert [each["protocol"]["sampler"] for each in records[6:10]] == told


def test_it_says_what_it_does(run: Run):
    lines: list[str] = []
    evaluate(run, images=20, say=lines.append)
    assert any("sampling 20 images in 2 steps" in line for line in lines)


def test_an_evaluation_is_repeatable_and_leaves_the_run_alone(run: Run, record: metrics.Record):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    again = evaluate(load_run(run.folder), images=100)
    assert {**again, "images_per_second": 0} == {**record, "images_per_second": 0}
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_of_large_latents_only_so_many_are_kept(run: Run, record: metrics.Record, monkeypatch: pytest.MonkeyPatch):
    latents = run.network.config.tokens * run.network.config.latent_channels
    monkeypatch.setattr(spaces, "LATENTS", 30 * latents + 1)
    found = evaluate(run, images=100, batch=20)
    assert found["latent"]["images"] == 30
    assert found["latent"]["std"] == pytest.approx(record["latent"]["std"], rel=0.1)
    assert found["reconstruction"]["psnr"] == pytest.approx(record["reconstruction"]["psnr"])
    assert "images" not in record["latent"]


def test_reconstructions_that_are_known_are_not_measured_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of two spaces, from a record in a file: what another sampler gives is, but for them, measured as always."""
    both = {"images": 50, "extractor": [None, metrics.from_file(pooled(tmp_path / "pooled.pt"), size=8)]}
    evaluate(run, **both).write(tmp_path / "known.json")
    known = metrics.Record.read(tmp_path / "known.json")
    whole = evaluate(run, sampler=Sampler(3), **both)
    assert whole["frechet_distance"] != known["frechet_distance"]
    monkeypatch.setattr(spaces.Reconstructions, "add", None)
    again = evaluate(run, sampler=Sampler(3), reconstructions=known, **both)
    assert {**again, "images_per_second": 0} == {**whole, "images_per_second": 0}


@pytest.mark.parametrize(
    ("change", "options", "what"),
    [
        ({"subject": {"model_sha256": "0"}}, {}, "another network"),
        ({"protocol": {"test_data_sha256": "0"}}, {}, "other test images"),
        ({}, {"images": 21}, "other test images, or another number or seed of them"),
        ({}, {"seed": 1}, "other test images, or another number or seed of them"),
        ({"protocol": {"extractor_sha256": "0"}}, {}, "other features"),
        ({"protocol": {"spaces": {"more": {"extractor_sha256": "0"}}}}, {}, "other features"),
        ({"protocol": {"version": "0"}}, {}, "another version"),
    ],
    ids=str,
)
def test_reconstructions_of_others_are_refused(
    run: Run, record: metrics.Record, change: dict[str, dict[str, object]], options: dict[str, int], what: str
):
    other = metrics.Record({**record, **{group: {**record[group], **changed} for group, changed in change.items()}})
    with pytest.raises(UserError, match=rf"^reconstructions: the record is of {what}.*; leave it out") as caught:
        evaluate(run, **{"images": 100, "reconstructions": other} | options)
    assert "\n" not in str(caught.value)


def test_pixels_are_dropped_unless_a_metric_needs_them(run: Run, monkeypatch: pytest.MonkeyPatch):
    kept: list[Tensor] = []
    honest = spaces.Images.add

    def add(self: spaces.Images, images: Tensor, labels: Tensor | None = None) -> None:
        honest(self, images, labels)
        kept.extend(part for name, parts in self._parts.items() if name == "pixels" for part in parts)

    monkeypatch.setattr(spaces.Images, "add", add)
    evaluate(run, images=20)
    assert not kept
    evaluate(run, images=20, metrics={"one": lambda real, made: 1.0 * (len(real) == len(made) == 20)})
    assert kept


# --- batches, seeds, labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_size_has_no_part_in_it(run: Run, record: metrics.Record, batch: int):
    """Exact but for rounding: an image may differ by 1 of 255 in a pixel here and there."""
    other = evaluate(run, images=100, batch=batch)
    assert other["protocol"] == record["protocol"]
    numbers, others = record.numbers(), other.numbers()
    assert numbers.keys() == others.keys()
    for name in numbers.keys() - {"images_per_second"}:
        assert others[name] == pytest.approx(numbers[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("batch", [7, 100])
def test_generated_images_have_their_seeds_and_the_labels_of_the_reference(run: Run, batch: int):
    seeing = Seeing()
    record = evaluate(run, images=30, seed=5, extractor=seeing, batch=batch)
    batches = -(-30 // batch)
    assert max(map(len, seeing.shown)) == min(batch, 30)
    real, made = torch.cat(seeing.shown[:batches]), torch.cat(seeing.shown[batches : 2 * batches])
    images, classes = read_all(open_data(run.config.data)[0])
    place = {image.numpy().tobytes(): k for k, image in enumerate(images)}
    labels = [int(classes[place[image.numpy().tobytes()]]) for image in real]
    expected = torch.from_numpy(run.network.sample(30, labels=labels, steps=2, seed=5)).permute(0, 3, 1, 2)
    assert (made.int() - expected.int()).abs().max() <= 1
    accuracy = (metrics.digits_classifier().predict(made) == torch.tensor(labels)).double().mean().item()
    assert record["class_accuracy"] == accuracy


def test_the_reference_is_training_data_and_reconstructions_are_of_the_test_images(run: Run):
    seeing = Seeing()
    evaluate(run, images=50, extractor=seeing)
    real, _, held_out, _ = seeing.shown

    def contents(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    assert contents(real) <= contents(read_all(open_dataset("digits"))[0])
    assert contents(held_out) <= contents(read_all(open_dataset("digits:test"))[0])
    assert len(contents(real)) == len(contents(held_out)) == 50


def test_of_many_test_images_those_measured_are_drawn_at_random(run: Run):
    """Files are often sorted by class: the first ones are of one."""
    training, test = open_data(run.config.data)
    images, labels = read_all(test)
    order = labels.argsort(stable=True)
    ordered = onefold.data.as_dataset((images[order].permute(0, 2, 3, 1).numpy(), labels[order].numpy()))
    record = evaluate(Run(run.folder, run.config, (training, ordered)), images=30, extractor=(seen := Seeing()))
    found = {image.numpy().tobytes() for image in seen.shown[2]}
    kinds = {int(y) for image, y in zip(images, labels, strict=True) if image.numpy().tobytes() in found}
    assert len(found) == 30
    assert len(kinds) > 5
    assert record["class_accuracy_real"] > 0.9, "images and their classes belong together"


# --- what the numbers mean --------------------------------------------------------------------------------------------


def generated_by(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    """The network decodes what it samples to these images, batch by batch."""
    left = images.permute(0, 2, 3, 1).numpy()

    def pictures(network: Network, latents: list[Tensor]) -> np.ndarray:
        nonlocal left
        count = sum(map(len, latents))
        batch, left = left[:count], left[count:]
        return batch

    monkeypatch.setattr(Network, "pictures", pictures)


def reference(run: Run, count: int, seed: int = 0) -> Tensor:
    training, _ = open_data(run.config.data)
    indices = np.random.Generator(np.random.PCG64(seed)).permutation(len(training))[:count]
    return read_all(training, indices)[0]


def test_copies_of_training_images_are_found_out(run: Run, monkeypatch: pytest.MonkeyPatch):
    generated_by(monkeypatch, reference(run, 300))
    copied = evaluate(run, images=300)
    assert copied["memorisation"] == {"share": 1.0, "ratio": 0.0}
    assert copied["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (copied["precision"], copied["recall"]) == (1, 1)
    assert copied["class_accuracy"] > 0.97
    assert 0.5 < copied["frechet"]["ratio"] < 1.5


def test_new_images_are_no_copies(run: Run, monkeypatch: pytest.MonkeyPatch):
    generated_by(monkeypatch, read_all(open_dataset("digits:test"), range(300))[0])
    fresh = evaluate(run, images=300)
    assert fresh["memorisation"]["share"] < 0.1
    assert 0.9 < fresh["memorisation"]["ratio"] < 1.1


def test_copies_of_test_images_are_near_them_and_copies_of_training_images_are_at_the_floor(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    generated_by(monkeypatch, read_all(open_dataset("digits:test"), range(360))[0])
    copied = evaluate(run, images=360)["test"]
    assert copied["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (copied["precision"], copied["recall"]) == (1, 1)
    assert copied["floor"] > 0.1
    generated_by(monkeypatch, reference(run, 360))
    real = evaluate(run, images=360)["test"]
    assert real["frechet_distance"] == pytest.approx(real["floor"])
    assert real["floor"] == pytest.approx(copied["floor"])


def test_the_numbers_against_the_test_images_are_those_of_the_metrics(run: Run, monkeypatch: pytest.MonkeyPatch):
    """400 generated images and all 360 of the test; precision and recall of as many."""
    made = reference(run, 400, seed=9)
    generated_by(monkeypatch, made)
    found = evaluate(run, images=400, extractor=(seeing := Seeing()))["test"]
    tested, made = (metrics.digits_classifier().features(images) for images in (torch.cat(seeing.shown[4::2]), made))
    assert len(tested) == 360
    assert found["frechet_distance"] == pytest.approx(metrics.frechet_distance(tested, made))
    kid, kid_error = metrics.kernel_distance(tested, made)
    assert (found["kid"], found["kid_error"]) == pytest.approx((kid, kid_error))
    assert (found["precision"], found["recall"]) == metrics.precision_recall(tested, made[:360])


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize(("n", "m"), [(100, 100), (300, 100), (50, 200)])
def test_the_distance_of_two_sets_of_one_gaussian_falls_with_their_numbers(width: int, n: int, m: int):
    """The closed form of the floor: E d² ≈ c·(1/n + 1/m)."""
    rng = np.random.default_rng(0)
    values = np.geomspace(1, 0.1, width)  # eigenvalues of the covariance
    pairs = np.outer(values, values) / np.add.outer(values, values)
    c = values.sum() + 0.5 * (pairs * (1 + np.eye(width))).sum()

    def features(count: int) -> np.ndarray:
        return rng.standard_normal((count, width)) * values**0.5

    found = [metrics.frechet_distance(features(n), features(m)) for _ in range(600)]
    assert np.mean(found) == pytest.approx(c * (1 / n + 1 / m), rel=0.08)


def squares(count: int, rng: torch.Generator) -> Tensor:
    return torch.randn(count, 5, generator=rng, dtype=torch.float64).square()


def like_digits(count: int, rng: torch.Generator) -> Tensor:
    """A Gaussian with the covariance of the digits' 64 features."""
    features = metrics.digits_classifier().features(read_all(open_dataset("digits"))[0]).double()
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    return torch.randn(count, 64, generator=rng, dtype=torch.float64) @ (vectors * values.clamp(min=0).sqrt()).T


@pytest.mark.parametrize(("features", "n", "times"), [(squares, 300, 60), (like_digits, 128, 12)])
def test_half_the_distance_of_two_halves_is_that_of_fresh_images(
    features: Callable[[int, torch.Generator], Tensor], n: int, times: int
):
    rng = torch.Generator().manual_seed(0)
    floors, fresh = [], []
    for seed in range(times):
        real = features(n, rng)
        floors.append(spaces.yardsticks(real, real, seed)[0] / 2)
        fresh.append(metrics.frechet_distance(real, features(n, rng)))
    assert np.mean(floors) == pytest.approx(np.mean(fresh), rel=0.1)


def test_noise_is_far_from_everything(run: Run, monkeypatch: pytest.MonkeyPatch, record: metrics.Record):
    generated_by(monkeypatch, torch.from_numpy(noise(100, 1, 8, 8)))
    far = evaluate(run, images=100)
    assert far["memorisation"]["share"] == 0
    assert far["precision"] < 0.1
    assert far["class_accuracy"] < 0.4
    assert far["frechet"]["ratio"] > 5


def test_one_real_image_again_and_again_is_precise_and_recalls_nothing(run: Run, monkeypatch: pytest.MonkeyPatch):
    generated_by(monkeypatch, reference(run, 200)[:1].expand(200, -1, -1, -1))
    repeated = evaluate(run, images=200)
    assert repeated["precision"] == 1
    assert repeated["recall"] < 0.05


def test_data_full_of_copies_can_be_evaluated(tmp_path: Path):
    """Where training and test images are alike there is no scale of memorisation, but the rest can be measured."""
    np.savez(tmp_path / "images.npz", images=noise(40, 4, 4, 1), labels=np.arange(40) % 2)
    same = str(tmp_path / "images.npz")
    train(tiny(data__source=same, data__test=same, training__images=16), tmp_path / "run", quiet=True)
    assert command(["evaluate", str(tmp_path / "run")]) == 0
    (written,) = (tmp_path / "run" / "evaluation").glob("*.json")
    assert np.isfinite(metrics.Record.read(written)["frechet_distance"])


# --- metrics of one's own ---


def brightness(real: Tensor, generated: Tensor) -> Tensor:
    """By how much generated images are brighter than real ones, of 255."""
    return generated.float().mean() - real.float().mean()


def test_a_metric_of_ones_own_enters_the_record(run: Run, tmp_path: Path):
    """As in a user's script: one number of images, one of features."""
    features = metrics.digits_classifier().features

    def shift_of_means(real: Tensor, generated: Tensor) -> float:
        return (features(real).mean(0) - features(generated).mean(0)).norm().item()

    record = evaluate(run, images=50, metrics={"brightness": brightness, "shift_of_means": shift_of_means})
    record.write(tmp_path / "record.json")
    read = metrics.Record.read(tmp_path / "record.json")
    real = reference(run, 50)
    _, labels = read_all(open_dataset("digits"))
    place = {
        image.numpy().tobytes(): int(y) for image, y in zip(read_all(open_dataset("digits"))[0], labels, strict=True)
    }
    wanted = [place[image.numpy().tobytes()] for image in real]
    made = torch.from_numpy(run.network.sample(50, labels=wanted, steps=2)).permute(0, 3, 1, 2)
    assert read["brightness"] == pytest.approx(brightness(real, made).item(), abs=0.1)
    assert read["shift_of_means"] == pytest.approx(shift_of_means(real, made), rel=0.02)
    without = evaluate(run, images=50)
    assert {**record, "images_per_second": 0} == {
        **without,
        "images_per_second": 0,
        **{name: record[name] for name in ("brightness", "shift_of_means")},
    }


def test_the_names_of_a_record_are_taken(run: Run, tmp_path: Path):
    statistics = metrics.Moments.from_features(metrics.digits_classifier().features(reference(run, 80)))
    extractors = [None, metrics.from_file(pooled(tmp_path / "pooled.pt"), size=8)]
    assert set(evaluate(run, images=20, reference=statistics, extractor=extractors)) == set(evaluation.KEYS)
    for name in evaluation.KEYS:
        with pytest.raises(UserError, match=rf"^metrics: '{name}' is in every record; choose another name$"):
            evaluate(run, images=20, metrics={name: brightness})


@pytest.mark.parametrize("value", [None, "much", float("nan"), float("inf"), torch.zeros(2), np.zeros(3)], ids=str)
def test_a_metric_that_gives_no_number_is_named(run: Run, value: object):
    with pytest.raises(UserError, match=r"^metrics: 'odd' gave .*, not one finite number; return a float$") as caught:
        evaluate(run, images=20, metrics={"odd": lambda real, generated: value})
    assert "\n" not in str(caught.value)


# --- data without classes, extractors, statistics ---------------------------------------------------------------------


def test_data_without_classes_have_no_class_accuracy(unlabelled: Run):
    record = evaluate(unlabelled)
    assert "class_accuracy" not in record
    assert "class_accuracy_real" not in record
    assert record["protocol"]["label_mode"] == "none"
    assert record["protocol"]["extractor"] == "classifier of 1 × 4 × 6, flips"
    assert all(np.isfinite(value) for value in record.numbers().values())


def test_the_classifier_is_trained_once(unlabelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = evaluate(unlabelled, images=20)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.suffix == ".safetensors"
    monkeypatch.setattr(metrics, "train_classifier", None)
    again = evaluate(unlabelled, images=20)
    assert {**again, "images_per_second": 0} == {**first, "images_per_second": 0}


def test_other_data_have_another_classifier(tmp_path: Path):
    for k in (0, 1):
        np.savez(tmp_path / f"{k}.npz", images=noise(20, 4, 4, 1, seed=k))
    one, two = (extractor_for(open_dataset(tmp_path / f"{k}.npz")) for k in (0, 1))
    assert one.sha256 != two.sha256
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_half_written_classifier_is_trained_anew(unlabelled: Run, tmp_path: Path):
    first = evaluate(unlabelled, images=20)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])
    assert evaluate(unlabelled, images=20)["protocol"] == first["protocol"]


def test_a_cache_that_cannot_be_written_is_done_without(
    unlabelled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "file"))
    lines: list[str] = []
    evaluate(unlabelled, images=20, say=lines.append)
    assert any("could not be kept" in line for line in lines)


@pytest.mark.parametrize("name", ["digits.npz", "digits28.npz"])
def test_files_named_like_the_digits_are_not_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    np.savez(name, images=noise(20, 8, 8, 1), labels=np.arange(20) % 10)
    assert extractor_for(open_dataset(name)).sha256 != metrics.digits_classifier().sha256


def test_the_digits_have_their_own_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "train_classifier", None)
    for name in ("digits", "digits:test"):
        assert extractor_for(open_dataset(name)).sha256 == metrics.digits_classifier().sha256
    assert not (tmp_path / "cache").exists()


def test_one_class_has_no_class_accuracy(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=noise(80, 4, 4, 1), labels=np.zeros(80, np.int64))
    config = tiny(data__source=str(tmp_path / "images.npz"), data__test=None, training__images=16)
    record = evaluate(train(config, tmp_path / "run", quiet=True))
    assert "class_accuracy" not in record
    assert record["protocol"]["label_mode"] == "of the reference images"


def test_stored_statistics_give_a_further_distance(run: Run, tmp_path: Path):
    images = reference(run, 100)
    extractor = metrics.digits_classifier()
    moments = metrics.Moments.from_features(extractor.features(images), extractor.sha256)
    record = evaluate(run, images=100, reference=moments)
    assert record["frechet_to_reference"] == pytest.approx(record["frechet_distance"], rel=1e-6)
    other = metrics.Moments.from_features(extractor.features(images), "another extractor")
    with pytest.raises(UserError) as caught:
        evaluate(run, images=20, reference=other)
    assert "\n" not in str(caught.value)


# --- what cannot be evaluated -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"images": 3}, {"images": -1}, {"seed": -1}, {"batch": 0}, {"batch": -1}, {"seed": 2**64}], ids=str
)
def test_numbers_out_of_range_are_refused(run: Run, options: dict[str, int]):
    with pytest.raises(UserError) as caught:
        evaluate(run, **{"images": 20} | options)
    assert next(iter(options)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_model_is_refused(tmp_path: Path, run: Run):
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    with pytest.raises(UserError, match="no model yet"):
        evaluate(load_run(tmp_path))


@pytest.mark.parametrize("count", [2, 7, 12, 30])
def test_few_images_are_measured_or_refused_with_a_cure(tmp_path: Path, count: int):
    """Of 12 images three are set apart, of fewer than 8 none, which then serve for both."""
    np.savez(tmp_path / "images.npz", images=noise(count, 4, 4, 1))
    config = tiny(data__source=str(tmp_path / "images.npz"), data__test=None, training__images=16)
    finished = train(config, tmp_path / "run", quiet=True)
    if count >= 4:
        record = evaluate(finished)
        assert all(np.isfinite(value) for value in record.numbers().values())
        assert ("test" in record) == (count == 30), "of 3 test images there is no region, and of none nothing"
        assert any(name.startswith("test.") for name in record["few"]) == (count == 30)
        return
    with pytest.raises(UserError, match=r"too few to measure anything; .*onefold sample") as caught:
        evaluate(finished)
    assert "\n" not in str(caught.value)


def test_a_single_test_image_is_refused_with_a_cure(tmp_path: Path, run: Run):
    """It has no distribution."""
    images, labels = noise(1, 8, 8, 1), np.array([0])
    one = onefold.data.as_dataset((images, labels))
    train_images = open_dataset("digits")
    with pytest.raises(UserError, match="1 test image is too few; give more with --test-data"):
        evaluate(Run(run.folder, run.config, (train_images, one)))


def test_large_images_are_compared_reduced():
    """To means over areas, so that nearness of copies survives; small ones number by number."""
    small, large = torch.from_numpy(noise(3, 64, 64, 3)), torch.from_numpy(noise(3, 130, 96, 3))
    small, large = small.permute(0, 3, 1, 2), large.permute(0, 3, 1, 2)
    assert torch.equal(spaces.shrink(small), small.flatten(1))
    found = spaces.shrink(large)
    assert found.shape == (3, 3 * 64 * 64)
    assert found.dtype == torch.uint8
    assert found[0, 0] == round(large[0, 0, :3, :2].float().mean().item())


def test_the_classifier_of_a_large_set_sees_images_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []

    def trained(images: torch.Tensor, *rest: object, **named: object) -> metrics.FeatureExtractor:
        seen.append(images)
        return metrics.digits_classifier()

    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "train_classifier", trained)
    monkeypatch.setattr(extractor, "LARGEST", 3 * 4 * 4)
    images = np.repeat(np.arange(9, dtype=np.uint8), 16).reshape(9, 4, 4, 1)
    np.savez(tmp_path / "a.npz", images=images)
    extractor_for(open_dataset(tmp_path / "a.npz"))
    assert seen[0][:, 0, 0, 0].tolist() == [0, 4, 8]


def test_images_that_are_all_alike_have_no_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez(tmp_path / "black.npz", images=np.zeros((40, 4, 4, 1), np.uint8))
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    data = {"data__source": str(tmp_path / "black.npz"), "data__test": None}
    run = train(tiny(training__images=32, **data), tmp_path / "run", quiet=True)
    record = evaluate(run, images=20, sampler=Sampler(1))
    assert record["frechet"]["halves"] == 0
    assert record["frechet"]["ratio"] is None
    console = Console(file=io.StringIO(), width=200)
    tables.show_record(console, record)
    assert "all alike" in console.file.getvalue()
    assert "20 images, below twice the 64 features: too large" in console.file.getvalue()


def test_the_table_shows_the_test_images_and_what_real_ones_would_have(run: Run):
    record = evaluate(run, images=400)
    console = Console(file=io.StringIO(), width=200)
    tables.show_record(console, record)
    shown = [" ".join(row.split()) for row in console.file.getvalue().splitlines()]
    test, frechet = record["test"], record["frechet"]
    distances = f"{test['frechet_distance']:.2f} {test['floor']:.2f}"
    assert f"against test images: Fréchet {distances} of 400 to 360; real: training images" in shown
    assert f"{record['frechet_distance']:.2f} {frechet['floor']:.2f} of 400 to all; real: fresh images" in shown
    assert f"recall {test['recall']:.3f} of 360 to as many" in shown
