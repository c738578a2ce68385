"""A sweep chooses on one part of the images and reports on another."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_images import noise
from helpers_runs import tiny
from onefold import metrics
from onefold.cli import run as command
from onefold.data import open_dataset, read_all
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.files import sha256_of
from onefold.networks.base import Network
from onefold.sampling import Sampler
from onefold.summary import read_records
from onefold.sweep import sweep
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import Run

PARTS = {"images": 100, "selection": 80}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(training__ema_half_lives=(4, 64)), tmp_path_factory.mktemp("digits") / "run", quiet=True)


@pytest.fixture(scope="module")
def found(run: Run) -> dict[str, Any]:
    return sweep(run, [Sampler(1), Sampler(2), Sampler(2, guidance=2.0)], averages=(4, 64), **PARTS)


class Seeing:
    """A feature extractor that keeps what it is shown."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self._honest = metrics.digits_classifier()

    def __getattr__(self, name: str) -> object:
        return getattr(self._honest, name)

    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        self.shown.append(images)
        return self._honest.features(images, batch)


def contents(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_each_setting_is_measured_on_the_selection_alone(run: Run, found: dict[str, Any]):
    """By hand: training images 100 … 179 of the random order, seeds from 100."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(1437)[100:180]
    images, labels = read_all(open_dataset("digits"), order)
    extractor = metrics.digits_classifier()
    settings = [(average, steps, guidance) for average in (4, 64) for steps, guidance in ((1, 1), (2, 1), (2, 2))]
    assert [(each["average"], each["steps"], each["guidance"]) for each in found["settings"]] == settings
    state = checkpoints(run.folder)[-1]
    for k in (0, 5):
        average, steps, guidance = settings[k]
        network = Network.from_pretrained(run.model)
        network.load_state_dict(load_file(state / f"average-{(4, 64).index(average)}.safetensors"))
        made = network.sample(80, labels=labels.tolist(), steps=steps, guidance=guidance, seed=100)
        x, y = (extractor.features(each) for each in (images, torch.from_numpy(made).permute(0, 3, 1, 2)))
        space = found["settings"][k]["spaces"][extractor.name]
        assert space["frechet_distance"] == pytest.approx(metrics.frechet_distance(x, y), rel=1e-3)
        assert space["kid"] == pytest.approx(metrics.kernel_distance(x, y)[0], rel=1e-3, abs=1e-5)


def test_the_best_of_the_selection_is_reported_by_the_ordinary_protocol(run: Run, found: dict[str, Any]):
    name = metrics.digits_classifier().name
    distances = [each["spaces"][name]["frechet_distance"] for each in found["settings"]]
    best = found["settings"][found["chosen"]]
    assert found["chosen"] == int(np.argmin(distances))
    assert len(set(distances)) == 6
    chosen = dataclasses.replace(run, average=best["average"])
    sampler = Sampler(best["steps"], guidance=best["guidance"])
    plain, record = evaluate(chosen, sampler=sampler, images=100), found["record"]
    protocol = {**record["protocol"], "selection": plain["protocol"]["selection"]}
    assert {**record, "protocol": protocol, "images_per_second": 0} == {**plain, "images_per_second": 0}
    told = f"least Fréchet distance ({name}) of 80 samples of other seeds to as many other training images"
    assert record["protocol"]["selection"] == f"none: the last average; sampler and average of 6 settings: {told}"
    assert record["protocol"]["ema"] == best["average"]
    assert found["selection"]["images"] == 80


def test_the_choice_sees_nothing_of_the_report(run: Run):
    """Neither its images, nor its seeds."""
    seeing = Seeing()
    sweep(run, [Sampler(1), Sampler(2)], extractor=seeing, batch=128, **PARTS)  # type: ignore[arg-type]
    selection, first, second, reference, made = seeing.shown[:5]
    assert [len(each) for each in (selection, first, second, reference, made)] == [80, 80, 80, 100, 100]
    assert not set(contents(selection)) & set(contents(reference))
    assert not set(contents(first) + contents(second)) & set(contents(made))


def test_no_setting_is_timed_by_the_first_call_of_its_network(run: Run, monkeypatch: pytest.MonkeyPatch):
    module, done = sys.modules["onefold.sweep"], list[tuple[Any, ...]]()
    generate = module.generate

    def generated(network: Network, sampler: Sampler, seeds: range, *rest: Any, **named: Any) -> float:
        done.append((network, sampler.steps, sampler.guidance, len(seeds)))
        return generate(network, sampler, seeds, *rest, **named)

    monkeypatch.setattr(module, "generate", generated)
    found = sweep(run, [Sampler(1), Sampler(5, guidance=2.0)], averages=(4, 64), batch=32, **PARTS)
    assert len(found["settings"]) == 4
    assert len(done) == 8
    for before, timed in zip(done[::2], done[1::2], strict=True):
        assert before[0] is timed[0]
        assert before[1:] == (min(2, timed[1]), timed[2], 32)
        assert timed[3] == 80


def test_an_average_is_that_of_the_checkpoint_and_has_its_own_hash(run: Run):
    state = checkpoints(run.folder)[-1]
    for k, half_life in enumerate((4, 64)):
        chosen = dataclasses.replace(run, average=half_life)
        expected = load_file(state / f"average-{k}.safetensors")
        assert all(torch.equal(expected[name], value) for name, value in chosen.network.state_dict().items())
        assert chosen.model_sha256 == sha256_of(state / f"average-{k}.safetensors")
        assert (chosen.model_sha256 == run.model_sha256) == (half_life == 64), "the last is the published one"
        assert chosen.half_life == half_life
    assert run.half_life == 64
    with pytest.raises(UserError, match=r"^average: 33 is not the half-life of one; choose one of 4, 64$"):
        dataclasses.replace(run, average=33).network.eval()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (
            {"images": 1400, "selection": None},
            "selection: 37 images for the selection, fewer than the 64 features: chance would choose",
        ),
        ({"images": 2000}, "1,437 for the report leave 0; give less than 1,437 to both"),
        ({"images": 1000, "selection": 500}, "1,000 for the report leave 437"),
        ({"selection": 63}, "selection: 63 images for the selection, fewer than the 64 features"),
        ({"selection": 0}, "for the report leave"),
        ({"samplers": [Sampler(2)]}, "a single setting leaves no choice"),
        ({"averages": (7,)}, "average: 7 is not the half-life of one"),
        ({"images": 2}, "images: 2 are too few to measure anything"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen_is_refused(run: Run, options: dict[str, Any], cause: str):
    samplers = options.pop("samplers", [Sampler(1), Sampler(2)])
    with pytest.raises(UserError) as caught:
        sweep(run, samplers, **({"selection": 80} | options))
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_without_classes_are_not_guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))
    np.savez(tmp_path / "images.npz", images=noise(80, 4, 6, 1))
    config = tiny(data__source=str(tmp_path / "images.npz"), data__test=None, training__images=16)
    unlabelled = train(config, tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="guidance"):
        sweep(unlabelled, [Sampler(1), Sampler(1, guidance=2.0)])


def test_the_command_prints_the_settings_and_writes_both(run: Run, capsys: pytest.CaptureFixture[str]):
    arguments = ["sweep", str(run.folder), "--steps", "1", "2", "--guidance", "1", "1.5", "--averages", "4"]
    arguments += ["--images", "100", "--selection", "80", "--device", "cpu"]
    assert command(arguments) == 0
    shown = capsys.readouterr().out
    written = json.loads((run.folder / "evaluation" / "swept-seed-0-settings.json").read_text(encoding="utf-8"))
    rows = [row.split() for row in shown.splitlines()]
    best = written["settings"][written["chosen"]]
    distance = best["spaces"][metrics.digits_classifier().name]["frechet_distance"]
    (row,) = (row for row in rows if row and row[0] == "★")
    assert row[1:4] == [str(best["steps"]), f"{best['guidance']:g}", f"{distance:.3f}"]
    assert len(written["settings"]) == 4
    assert "setting 4 of 4: 2 steps, guidance 1.5, average 4" in shown
    read = read_records(run)
    assert read["swept-seed-0"] == written["record"]
    assert "swept-seed-0-settings" not in read
    assert command([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for each in (*again["settings"], *written["settings"], again["record"], written["record"]):
        each["images_per_second"] = 0
    assert again == written


def test_by_default_a_fifth_is_set_apart(run: Run):
    lines: list[str] = []
    found = sweep(run, [Sampler(1), Sampler(2)], say=lines.append)
    settings = [line for line in lines if line.startswith("setting")]
    assert settings == ["setting 1 of 2: 1 step, guidance 1", "setting 2 of 2: 2 steps, guidance 1"]
    assert found["selection"]["images"] == 287
    assert found["selection"]["first_seed"] == found["record"]["protocol"]["generated_images"] == 1150
