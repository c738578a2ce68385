"""Several feature spaces in one record."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from helpers_runs import tiny
from onefold import evaluation, metrics
from onefold.cli import run as command
from onefold.commands import tables
from onefold.data import open_dataset, read_all
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.metrics.kid import mmd2
from onefold.report import records
from onefold.spaces import Images, Reconstructions, compare
from onefold.training.loop import train
from onefold.training.run import Run


class Quarters(nn.Module):
    """Means over the quarters of each channel: twelve features."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


class Extremes(nn.Module):
    """Largest and least values of each row of the first channel: features of which images have 16."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0].amax(2), x[:, 0].amin(2)], 1)


def traced(path: Path, network: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.rand(3, 3, 8, 8)).save(str(path))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("features")
    return traced(folder / "quarters.pt", Quarters()), traced(folder / "extremes.pt", Extremes())


@pytest.fixture(scope="module")
def extractors(files: tuple[Path, Path]) -> list[metrics.FeatureExtractor]:
    return [metrics.from_file(path, size=8) for path in files]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("digits") / "run", quiet=True)


@pytest.fixture(scope="module")
def record(run: Run, extractors: list[metrics.FeatureExtractor]) -> metrics.Record:
    return evaluate(run, images=50, extractor=[None, *extractors])


def shown(record: metrics.Record) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    tables.show_record(console, record)
    return [" ".join(row.split()) for row in console.file.getvalue().splitlines()]


def test_each_space_has_the_numbers_that_it_has_alone(
    run: Run, record: metrics.Record, extractors: list[metrics.FeatureExtractor]
):
    """And the first, or the only one, those without a group."""
    default = evaluate(run, images=50)
    first = {name: value for name, value in record.items() if name != "spaces"}
    without = {key: value for key, value in first["protocol"].items() if key != "spaces"}
    few = {name: why for name, why in first["few"].items() if not name.startswith("spaces.")}
    assert first | {"protocol": without, "few": few, "images_per_second": 0} == default | {"images_per_second": 0}
    for extractor in extractors:
        alone = evaluate(run, images=50, extractor=extractor)
        space, protocol = record["spaces"][extractor.name], record["protocol"]["spaces"][extractor.name]
        distance = {"frechet_distance": alone["reconstruction"]["frechet_distance"]}
        assert space == {name: alone[name] for name in space} | {"reconstruction": distance}
        assert space.keys() > {"frechet_distance", "frechet", "kid", "kid_error", "precision", "recall", "test"}
        assert protocol == {name: alone["protocol"][name] for name in protocol}
        assert protocol.keys() == {"extractor", "extractor_sha256", "resize", "few_images"}
        own = {name: why for name, why in alone["few"].items() if name.endswith("frechet_distance")}
        prefix = f"spaces.{extractor.name}."
        found = {name.removeprefix(prefix): why for name, why in record["few"].items() if name.startswith(prefix)}
        assert found == own
    assert all(np.isfinite(value) for value in record.numbers().values())


class Given(nn.Module):
    """Features in the place of images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_distances_are_those_of_torchmetrics_on_the_same_features(
    run: Run, extractors: list[metrics.FeatureExtractor], monkeypatch: pytest.MonkeyPatch
):
    fid, kid = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")
    seen: list[list[Tensor]] = []
    reconstructed: list[Tensor] = []
    honest = Reconstructions.numbers

    def looked_at(*features: Tensor, **options: Any) -> dict[str, object]:
        seen.append([each.double() for each in features])
        return compare(*features, **options)

    def numbers(self: Reconstructions, originals: list[Tensor]) -> list[dict[str, float]]:
        reconstructed.extend(each.double() for each in self.features)
        return honest(self, originals)

    def distance(x: Tensor, y: Tensor) -> float:
        metric = fid.FrechetInceptionDistance(Given(x.shape[1])).set_dtype(torch.float64)
        metric.update(x, real=True)
        metric.update(y, real=False)
        return metric.compute().item()

    monkeypatch.setattr(evaluation, "compare", looked_at)
    monkeypatch.setattr(Reconstructions, "numbers", numbers)
    record = evaluate(run, images=100, extractor=[None, *extractors])
    assert len(seen) == 3
    for found, (real, made, test), x_hat in zip([record, *record["spaces"].values()], seen, reconstructed, strict=True):
        assert found["frechet_distance"] == pytest.approx(distance(real, made), rel=1e-6)
        assert found["test"]["frechet_distance"] == pytest.approx(distance(test, made), rel=1e-6)
        assert found["reconstruction"]["frechet_distance"] == pytest.approx(distance(test, x_hat), rel=1e-6)
        kernel = kid.KernelInceptionDistance(Given(real.shape[1]), subsets=1, subset_size=100).set_dtype(torch.float64)
        kernel.update(real, real=True)
        kernel.update(made, real=False)
        assert mmd2(real, made).item() == pytest.approx(kernel.compute()[0].item(), rel=1e-6)
        assert found["kid"] == metrics.kernel_distance(real, made, subset=50)[0]


def test_the_default_features_need_not_be_the_first(run: Run, extractors: list[metrics.FeatureExtractor]):
    """Classes are those of whichever extractor knows them."""
    record = evaluate(run, images=20, extractor=[extractors[0], None])
    assert record["protocol"]["extractor"] == "quarters.pt"
    assert list(record["spaces"]) == [metrics.digits_classifier().name]
    assert record["class_accuracy_real"] > 0.9


def test_extractors_that_a_record_could_not_tell_apart_are_refused(run: Run, files: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"^features: quarters.pt is given twice; give each extractor once$"):
        evaluate(run, images=20, extractor=[metrics.from_file(files[0], size=8) for _ in range(2)])
    (tmp_path / "other").mkdir()
    other = traced(tmp_path / "other" / "quarters.pt", Extremes())
    with pytest.raises(UserError, match=r"^features: two are called 'quarters.pt'; rename one of their files$"):
        evaluate(run, images=20, extractor=[metrics.from_file(path, size=8) for path in (files[0], other)])


def test_stored_statistics_belong_to_the_space_that_they_are_of(run: Run, extractors: list[metrics.FeatureExtractor]):
    images = read_all(open_dataset("digits"))[0][:200]
    first, second = (metrics.Moments.from_features(each.features(images), each.sha256) for each in extractors)
    record = evaluate(run, images=20, extractor=extractors, reference=[second, first])
    for k, moments in enumerate((first, second)):
        alone = evaluate(run, images=20, extractor=extractors[k], reference=moments)["frechet_to_reference"]
        assert (record if k == 0 else record["spaces"]["extremes.pt"])["frechet_to_reference"] == alone
    with pytest.raises(UserError, match=r"^reference: two are of extremes.pt; give one for each feature space$"):
        evaluate(run, images=20, extractor=extractors, reference=[second, second])
    with pytest.raises(UserError, match="take both from the same feature extractor"):
        evaluate(run, images=20, reference=[second])


def test_records_of_other_spaces_are_not_ranked_and_those_of_the_same_in_each(
    record: metrics.Record, run: Run, extractors: list[metrics.FeatureExtractor]
):
    better = metrics.Record({**record, "spaces": {**record["spaces"]}})
    better["spaces"]["quarters.pt"] = {**record["spaces"]["quarters.pt"], "kid": -1.0, "recall": 2.0}
    both = {"a": record, "b": better}
    assert records.best(both, "spaces.quarters.pt.kid") == {"b"}
    assert records.best(both, "spaces.quarters.pt.recall") == {"b"}
    assert records.best(both, "spaces.quarters.pt.frechet.halves") == set()
    alone = evaluate(run, images=50)
    assert "spaces" not in alone["protocol"]
    (line,) = records.unlike({"a": record, "c": alone})
    assert line.endswith("their protocols differ in spaces (quarters.pt + extremes.pt and None).")
    page = "".join(records.section({"a": record}))
    assert "spaces: quarters.pt: extractor sha256" in page


def test_the_table_has_a_column_for_each_further_space(record: metrics.Record):
    rows = shown(record)
    numbers = [record["spaces"][name] for name in ("quarters.pt", "extremes.pt")]
    assert "in other features quarters.pt extremes.pt" in rows
    assert "Fréchet distance " + " ".join(f"{each['frechet_distance']:.2f}" for each in numbers) in rows
    distances = [each["reconstruction"]["frechet_distance"] for each in numbers]
    assert "reconstruction Fréchet {:.2f} {:.2f}".format(*distances) in rows
    assert "of training images " + " ".join(f"{each['test']['floor']:.2f}" for each in numbers) in rows


def test_the_command_takes_several(
    run: Run, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    names = list(map(str, files))
    hashes = [metrics.from_file(path, size=8).sha256 for path in files]
    arguments = ["evaluate", str(run.folder), "--images", "20", "--features-size", "8", "--device", "cpu", "--json"]
    assert command([*arguments, "--features", "default", *names, "--features-sha256", *hashes]) == 0
    (path,) = (run.folder / "evaluation").glob("euler-2-guidance-1-shift-1-seed-0-default-quarters-extremes.json")
    read = metrics.Record.read(path)
    assert list(read["spaces"]) == ["quarters.pt", "extremes.pt"]
    capsys.readouterr()
    for wrong, cause in (
        (["--features", *names, "--features-sha256", hashes[0]], "--features-sha256: 1 for 2 files of --features"),
        (["--features", *names, "--features-sha256", *hashes[::-1]], "quarters.pt: SHA-256 is"),
        (["--features", names[0], "--features", names[1]], "--features: is given twice; give it once, with all"),
        (["--features", "dinov2"], "`onefold prefetch dinov2` says what it would download"),
    ):
        monkeypatch.setenv("ONEFOLD_CACHE", str(run.folder / "no cache"))
        assert command([*arguments, *wrong]) == 2
        error = capsys.readouterr().err
        assert cause in error
        assert len(error.splitlines()) == 1


def test_images_without_test_images_have_no_group(extractors: list[metrics.FeatureExtractor]):
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 5, generator=rng) for _ in range(3)]
    assert "test" in compare(*parts, seed=0, held_out=True)
    assert "test" not in compare(*parts, seed=0, held_out=False)


def test_features_of_a_batch_are_computed_in_each_space(extractors: list[metrics.FeatureExtractor]):
    images = read_all(open_dataset("digits"))[0][:30]
    seen = Images(extractors)
    for part in images.split(7):
        seen.add(part)
    for features, extractor in zip(seen.features, extractors, strict=True):
        torch.testing.assert_close(features, extractor.features(images))
