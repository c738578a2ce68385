"""The functions of the benchmarks of speed; what they measure is left to whoever runs them on an idle machine."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import gpu
import real_images
import sampling
import scaling
import sheets
import timing
import train_step
from helpers_runs import batch, differing, fresh, tensors, tiny
from onefold.data import open_dataset, read_all
from onefold.pictures.grids import grid, save_png
from onefold.training.config import Config
from onefold.training.phases import training_flops
from onefold.training.state import TrainingState
from onefold.training.step import training_step

CPU = torch.device("cpu")

# --- turns, peak, tables ----------------------------------------------------------------------------------------------


def test_variants_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []

    def variant(name: str, seconds: list[float]) -> float:
        order.append(name)
        return seconds.pop(0)

    times = timing.taking_turns({"a": partial(variant, "a", [9, 1, 2]), "b": partial(variant, "b", [9, 3, 4])}, 2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert times == {"a": [1, 2], "b": [3, 4]}


def test_the_peak_is_the_fastest_product(monkeypatch: pytest.MonkeyPatch):
    """8: 1,024 operations in 1 s; 16: 8,192 in 2 s; 32: 65,536 in 64 s; 64 is not tried any more."""
    seconds = {8: 1.0, 16: 2.0, 32: 64.0}
    monkeypatch.setattr(timing, "seconds_of_product", lambda size, device, dtype: seconds[size])
    peak = timing.product_peak(CPU, torch.float32, sizes=(8, 16, 32, 64), longest=10)
    assert peak == timing.Peak(16, 4096.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_timed(dtype: torch.dtype):
    assert 0 < timing.seconds_of_product(8, CPU, dtype) < 1


def test_a_table_is_markdown():
    shown = timing.table(["step", "ms"], [["one", "1.0"], ["two", "2.0"]])
    assert shown == "| step | ms |\n| --- | ---: |\n| one | 1.0 |\n| two | 2.0 |"


def test_numbers_are_written_where_wanted(tmp_path: Path):
    timing.write({"a": 1}, None)
    timing.write({"a": 1, **timing.machine(CPU)}, tmp_path / "new" / "found.json")
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert found["a"] == 1
    assert {"device", "processor", "threads", "load", "torch", "onefold"} <= set(found)


# --- training step ----------------------------------------------------------------------------------------------------


def stepped(step: train_step.Step, state: TrainingState, config: Config, steps: int = 3) -> TrainingState:
    for k in range(steps):
        step(state, *batch(start=100 * k), config)
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("micro", [None, 5])
@pytest.mark.parametrize("classes", [10, 0])
def test_the_plain_step_is_the_same_step(optimizer: str, micro: int | None, classes: int):
    changes = {"objective__draws": 3, "objective__flip": True, "objective__decoder_noise": 0.5}
    changes |= {"training__micro_batch": micro, "network__classes": classes, "training__clip": 0.05}
    config = tiny(training__optimizer=optimizer, training__muon_rate=2e-3, **changes)
    start = tensors(fresh(config))
    ours = stepped(training_step, fresh(config), config)
    plain = stepped(train_step.plain_step, train_step.plain_state(config, CPU), config)
    assert ours.counters == plain.counters
    assert "network.trunk.blocks.0.swiglu.project_in.weight" in differing(start, tensors(ours))
    expected = tensors(ours)
    for name, value in tensors(plain).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["onefold", "plain"]),
        ({"training__compile": "yes"}, ["onefold", "not compiled", "plain"]),
        ({"training__precision": "bfloat16"}, ["onefold", "in float32", "plain"]),
    ],
)
def test_variants_change_one_thing(changes: dict[str, str], names: list[str]):
    config = tiny(**{"training__compile": "no", **changes})
    found = train_step.variants(config)
    assert list(found) == names
    assert found["onefold"] == (training_step, config)
    plain = found["plain"][1].training
    assert (plain.precision, plain.compile) == ("float32", "no")


def test_torch_counts_the_same_operations():
    config = tiny(network__width=96, network__depth=3, network__heads=3)
    found = train_step.torch_flops(config, CPU)
    assert training_flops(config) == pytest.approx(found["image"], rel=0.05)
    assert found["optimizer_step"] > 0, "Muon's"


def test_parts_are_run_as_often_as_in_a_step(tmp_path: Path):
    pieces = train_step.parts(tiny(training__micro_batch=5, training__compile="no"), CPU, tmp_path)
    once = {"data", "draws", "clip and optimizer", "EMA", "logging"}
    assert {name for name, (count, _) in pieces.items() if count == 1} == once
    assert {count for name, (count, _) in pieces.items() if name not in once} == {4}, "16 images by 5"
    assert all(piece() > 0 for _, piece in pieces.values())


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_one_step_is_compared_with_the_most():
    steps = {
        "50": {"latency": 5.0, "images_per_second": 2.0, "flops_per_image": 51.0},
        "4": {"latency": 0.5, "images_per_second": 20.0, "flops_per_image": 5.0},
        "1": {"latency": 0.25, "images_per_second": 50.0, "flops_per_image": 2.0},
    }
    assert sampling.ratios({"steps": steps}) == {"latency": 20.0, "batch": 25.0, "operations": 25.5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_is_measured(precision: str):
    found = sampling.measured(tiny(), CPU, batch=3, steps=(2, 1), rounds=2, precision=precision)
    assert list(found["steps"]) == ["2", "1"]
    assert all(one["latency"] > 0 and len(one["seconds_of_batch"]) == 2 for one in found["steps"].values())


# --- on a GPU, in a dry run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "graphs"), [("fashion", True), ("imagenet256-s", False)])
def test_a_toy_is_measured_without_a_gpu(recipe: str, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "resolve_device", lambda name: CPU)
    gpu.speed(recipe, tmp_path / "speed.json", graphs=graphs, dry=True)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["images_per_second"] > 0
    assert (found["batch"], found["micro_batch"]) == (16, None if recipe == "fashion" else 8)
    assert not found["graphs"], "as there are none"


def test_a_job_that_takes_too_long_is_told_once_and_may_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second signal would end a training at once. The time is up when the job is ready for it."""
    log = tmp_path / "slow.log"
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: 60.0 if log.exists() and "ready" in log.read_text() else 0.0)
    script = "trap 'echo told; told=1' TERM; echo ready; until [ $told ]; do sleep 0.1; done; sleep 1; exit 7"
    (job,) = gpu.run_together([gpu.Job("slow", ["sh", "-c", script], 50.0)], tmp_path)
    assert (job.status, job.said) == (7, ["ready", "told"])
    assert json.loads((tmp_path / "gpu.json").read_text())[0]["status"] == 7


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_every_source_holds_the_same_images(channels: int, tmp_path: Path):
    pytest.importorskip("pyarrow")
    images = data.generated(20, 12, channels)
    assert images.shape == (20, 12, 12, channels)
    sources = data.write_sources(images, tmp_path)
    assert list(sources) == ["folder", "zip", "npz", "parquet"]
    found = {kind: read_all(open_dataset(source)) for kind, source in sources.items()}
    for x, y in found.values():
        order = np.lexsort(x.flatten(1).numpy().T)  # folders are in the order of their classes
        expected = np.lexsort(images.transpose(0, 3, 1, 2).reshape(20, -1).T)
        np.testing.assert_array_equal(x.numpy()[order], images.transpose(0, 3, 1, 2)[expected])
        np.testing.assert_array_equal(y.numpy()[order], expected % data.CLASSES)


def test_sources_are_read_in_every_way(tmp_path: Path):
    np.savez(tmp_path / "images.npz", images=data.generated(20, 12, 3))
    found = data.measured({"npz": str(tmp_path / "images.npz")}, workers=1, batch=4, batches=2, rounds=1)
    assert list(found["npz"]) == ["when asked", "1 threads ahead", "from memory"]
    assert all(speed > 0 for speed in found["npz"].values())


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_the_slope_of_a_power_law_is_its_exponent():
    sizes = [1, 2, 4, 16]
    assert scaling.slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.slope(sizes, [7.0] * 4) == pytest.approx(0)


@pytest.mark.parametrize("axis", scaling.AXES)
def test_one_size_grows_at_a_time(axis: str):
    config = tiny()
    big = scaling.grown(config, axis, 2)
    for other in scaling.AXES:
        factor = {"tokens": 4}.get(axis, 2) if other == axis else 1
        assert scaling.size_of(big, other) == factor * scaling.size_of(config, other)
    assert big.network.width // big.network.heads == config.network.width // config.network.heads
    assert scaling.grown(config, axis, 1) == config


# --- sheets of samples ------------------------------------------------------------------------------------------------


def test_a_row_of_real_images_names_its_sheet():
    rows = ("1 step", "4 steps", "50 steps", "denoiser, 50 steps", "denoiser, 50 steps, guidance 1.5")
    endings = ["1-step", "4-steps-refined", "50-steps-refined", "50-steps", "50-steps-guided-1.5"]
    assert [real_images.ending(row) for row in rows] == endings


@pytest.mark.parametrize("other", [("c", "b", 10), ("a", "c", 10), ("a", "b", 20)])
def test_rows_of_real_images_are_added_to_those_of_the_same_network(other: tuple[str, str, int], tmp_path: Path):
    json_file = tmp_path / "rows.json"
    assert real_images.rows_before(json_file, "a", "b", 10) == {}
    rows = {"1 step": {"subject": {"model_sha256": "a"}, "protocol": {"extractor_sha256": "b", "generated_images": 10}}}
    json_file.write_text(json.dumps(rows))
    assert real_images.rows_before(json_file, "a", "b", 10) == rows
    with pytest.raises(SystemExit, match=r"rows.json: its row '1 step' is of another network, features or --images"):
        real_images.rows_before(json_file, *other)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_gives_back_its_images(channels: int, tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (real_images.SHEET, 4, 6, channels), np.uint8)
    save_png(tmp_path / "sheet.png", grid(images, columns=real_images.COLUMNS, scale=1, gap=0))
    found = sheets.images_of(tmp_path / "sheet.png", (4, 6, channels))
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images)
