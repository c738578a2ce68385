"""Numbers that rest on few images: how far they may be off, and that they say so."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import onefold
from helpers_runs import tiny
from onefold import metrics
from onefold.commands import tables
from onefold.data import open_dataset, read_all
from onefold.metrics.few import LEAST_HELD_OUT, LEAST_REGION, few_images, wilson_interval
from onefold.training.loop import train
from onefold.training.run import Run


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.9, 100, 0.8256, 0.9448)],
)
def test_wilsons_interval_has_its_known_values(share: float, count: int, low: float, high: float):
    """By hand from the formula; those of 0 and 1 are z²/(n + z²) from the end."""
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)


def test_wilsons_interval_holds_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    for p, n in ((0.3, 20), (0.9, 50), (0.5, 200)):
        hits = rng.binomial(n, p, 4000) / n
        inside = np.mean([low <= p <= high for low, high in (wilson_interval(share, n) for share in hits)])
        assert 0.92 < inside < 0.98


def test_noise_passes_for_digits_where_they_are_few_and_not_from_the_threshold_on():
    """Digits with their pixels in another order: no digit at all."""
    (x, _), rng, extractor = read_all(open_dataset("digits")), np.random.default_rng(0), metrics.digits_classifier()
    real = extractor.features(x)
    orders = [torch.from_numpy(rng.permutation(64)) for _ in range(6)]
    made = [extractor.features(x.flatten(2)[:, :, order].unflatten(2, (8, 8))) for order in orders]

    def precision(n: int) -> float:
        return float(np.mean([metrics.precision_recall(real[:n], noise[-n:])[0] for noise in made]))

    assert precision(16) > 0.6
    assert precision(LEAST_REGION) < 0.2


def test_few_held_out_images_make_copies_of_new_ones():
    rng = np.random.default_rng(0)

    def chance(held_out: int) -> float:
        return float(np.mean([np.quantile(rng.random(held_out), 0.05) for _ in range(2000)]))

    assert chance(8) > 0.13
    assert chance(LEAST_HELD_OUT) < 0.065


def test_each_number_is_named_below_its_threshold_and_not_above():
    many = few_images(generated=10_000, held_out=10_000, tested=10_000, width=64)
    assert many == {}
    few = few_images(generated=57, held_out=5, tested=5, width=64)
    expected = {"frechet_distance", "kid", "precision", "recall", "class_accuracy", "class_accuracy_real"}
    expected |= {"memorisation", "reconstruction", "latent", "reconstruction.frechet_distance"}
    against_test = {"test.frechet_distance", "test.kid", "test.precision", "test.recall"}
    assert few.keys() == expected | against_test
    assert all("57 images" in few[name] for name in ("frechet_distance", "kid", "precision", "recall"))
    assert all("5 images" in few[name] for name in ("reconstruction", "class_accuracy_real", "memorisation"))
    assert all(few[name].startswith("5 images") for name in against_test)
    only = few_images(generated=10_000, held_out=10_000, tested=100, width=64)
    assert only.keys() == {"reconstruction.frechet_distance", *against_test}
    enough = few_images(generated=10_000, held_out=10_000, tested=LEAST_REGION, width=64)
    assert enough == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("digits") / "run", quiet=True)


def test_the_record_and_the_table_say_it(run: Run, tmp_path: Path):
    record = onefold.evaluate(run, images=20)
    record.write(tmp_path / "record.json")
    few = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["few"]
    assert {"precision", "recall", "kid", "class_accuracy", "memorisation", "reconstruction"} <= few.keys()
    low, high = record["class_accuracy_interval"]
    assert low <= record["class_accuracy"] <= high
    assert high - low > 0.2
    text = table(record)
    assert "20 images: noise may pass" in text
    assert f"at 95 %: {low:.2f} to {high:.2f}" in text
    assert "rest on few images" in text


def test_where_there_are_enough_nothing_is_said(run: Run):
    record = onefold.evaluate(run, images=400)
    assert record["few"] == {}
    assert "rest on few images" not in table(record)
    low, high = record["class_accuracy_real_interval"]
    assert high - low < 0.1


def table(record: metrics.Record) -> str:
    out = io.StringIO()
    tables.show_record(Console(file=out, width=200), record)
    return out.getvalue()
