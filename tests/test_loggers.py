"""Loggers hand over what the run's folder holds, once, also of a run that was stopped; read back by each service."""

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from helpers_runs import tiny
from onefold import cli
from onefold.loggers import LOGGERS, TensorBoard, opened
from onefold.loggers.logger import numbers
from onefold.training.log import RunLog
from onefold.training.loop import train
from onefold.training.run import Run

SHORT: dict[str, Any] = {"training__health_every": 64, "training__sample_every": 64, "training__checkpoint_every": 64}
"""Lines at 32, 64, …, pictures at 16, 64, 128, 160, checkpoints at 64, 128, 160 images."""


class Stop(Exception):
    """Ends a training between two checkpoints."""


def stop_at(images: int) -> Callable[[Run, dict[str, Any]], None]:
    def stop(run: Run, line: dict[str, Any]) -> None:
        if line["images"] == images:
            raise Stop

    return stop


def read(run: Run) -> Any:
    """All that TensorBoard finds in a run."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    kept = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)  # all of each
    return module.EventAccumulator(str(run.folder / "tensorboard"), kept).Reload()


def assert_shows(run: Run, checkpoints: Sequence[int] = (64, 128, 160)) -> None:
    """TensorBoard shows each line of the log, each picture and the weights of each checkpoint, once."""
    found = read(run)
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in run.history:
        for name, value in numbers(line).items():
            wanted.setdefault(name, []).append((line["images"], pytest.approx(value, rel=1e-6)))
    shown = {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert shown == wanted
    assert {"train/denoising", "train/images_per_second", "health/psnr", "health/channel_std/3"} <= set(shown)
    for name, end in (("samples", ""), ("reconstructions", "-reconstructions")):
        assert [each.step for each in found.Images(name)] == [16, 64, 128, 160]
        for each in found.Images(name):
            with Image.open(run.folder / "samples" / f"{each.step:09d}{end}.png") as drawn:
                image = np.asarray(Image.open(io.BytesIO(each.encoded_image_string)))
                assert (image == np.asarray(drawn.convert("RGB"))).all()
    weights = load_file(run.folder / "model" / "model.safetensors")
    assert {f"weights/{name}" for name in weights} | {"latents"} == set(found.Tags()["histograms"])
    for name, value in weights.items():
        series = found.Histograms(f"weights/{name}")
        assert [each.step for each in series] == list(checkpoints)
        last = series[-1].histogram_value
        assert (last.num, last.min, last.max) == (value.size, value.min(), value.max())
    latents = found.Histograms("latents")[-1].histogram_value
    assert latents.num == 32 * 16 * 4
    assert latents.sum_squares / latents.num == pytest.approx(1, abs=1e-3), "tokens have unit RMS"


@pytest.fixture
def _needs_tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")


def test_the_numbers_of_a_line_have_their_path_as_name():
    line = {"images": 32, "denoising": 0.5, "skipped": 1, "alarm": "low", "reconstruction": None, "none": float("nan")}
    line |= {"health": {"psnr": 20.0, "drift": None, "channel_std": [0.1, None]}, "onestep": {"auc": [0.5, 0.75]}}
    assert numbers(line) == {
        "train/denoising": 0.5,
        "train/skipped": 1,
        "health/psnr": 20.0,
        "health/channel_std/0": 0.1,
        "onestep/auc/0": 0.5,
        "onestep/auc/1": 0.75,
    }


@pytest.mark.usefixtures("_needs_tensorboard")
def test_tensorboard_shows_the_run_and_leaves_it_as_it_is(tmp_path: Path):
    config = tiny(**SHORT)
    with TensorBoard() as log:
        run = train(config, tmp_path / "run", callbacks=[log], quiet=True)
    assert_shows(run)
    assert train(config, tmp_path / "other", quiet=True).model_sha256 == run.model_sha256


@pytest.mark.usefixtures("_needs_tensorboard")
@pytest.mark.parametrize("before", [True, False], ids=["logged before", "logged first when resumed"])
def test_a_resumed_run_goes_on_with_its_series(before: bool, tmp_path: Path):
    with pytest.raises(Stop), opened(["tensorboard"] * before) as callbacks:
        train(tiny(**SHORT), tmp_path / "run", callbacks=[*callbacks, stop_at(96)], quiet=True)
    assert (tmp_path / "run" / "tensorboard").exists() == before
    with opened(["tensorboard"]) as callbacks:
        run = train(None, tmp_path / "run", resume=True, callbacks=callbacks, quiet=True)
    assert_shows(run)


@pytest.mark.usefixtures("_needs_tensorboard")
def test_what_a_run_has_gone_back_behind_is_not_shown(tmp_path: Path):
    run = train(tiny(**SHORT), tmp_path / "run", quiet=True)
    lines = run.history
    with TensorBoard() as log:
        for line in [*lines[:2], {"images": 96, "denoising": 7.0, "alarm": "diverges"}]:
            RunLog(run.folder / "log.jsonl", images=line["images"] - 1).write(line)
            log(Run(run.folder, run.config), line)
        RunLog(run.folder / "log.jsonl", images=64)
        assert [each.value for each in read(run).Scalars("train/denoising")][-1] == 7
        assert [each.step for each in read(run).Images("samples")] == [16, 64], "of an abandoned continuation are more"
        assert b"diverges" in read(run).Tensors("alarm/text_summary")[0].tensor_proto.string_val[0]
        for line in lines[2:]:
            RunLog(run.folder / "log.jsonl", images=line["images"] - 1).write(line)
            log(Run(run.folder, run.config), line)
    assert_shows(run, [160])  # the weights of the others are no longer there


@pytest.mark.parametrize("name", LOGGERS)
def test_what_is_missing_is_said_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert cli.run(["train", "digits", "--log", name, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"onefold: --log {name}: needs {name}; pip install 'onefold[{name}]'\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="needs wandb; pip install"), opened(["wandb"]):
        pass


@pytest.mark.usefixtures("_needs_tensorboard")
def test_the_option_may_be_repeated_and_goes_with_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--out", str(tmp_path / "run"), "--log", "tensorboard", "--log", "tensorboard", "--quiet"]
    small = ["--training.batch", "16", "--training.log-every", "16", "--network.width", "32", "--network.depth", "1"]
    small += ["--network.heads", "2", "--training.health-every", "1000", "--sampler.steps", "2"]
    assert cli.run(["train", "digits", "--images", "32", *small, *words]) == 0
    assert capsys.readouterr().out == ""
    assert cli.run(["train", "--resume", "--images", "48", *words[:-1]]) == 0
    how = f"--log tensorboard: `tensorboard --logdir {tmp_path / 'run'}` shows it\n"
    assert capsys.readouterr().out.count(how) == 1
    assert cli.run(["onestep", str(tmp_path / "run"), "--log", "tensorbord"]) == 2
    assert "--log" in capsys.readouterr().err
    run = Run(tmp_path / "run", tiny())
    assert [each.step for each in read(run).Scalars("train/denoising")] == [16, 32, 48]


SERVICES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers_runs import tiny
from test_loggers import SHORT, Stop, stop_at
from onefold.loggers import opened
from onefold.training.loop import train

names = sys.argv[2:]
try:
    with opened(names) as callbacks:
        train(tiny(**SHORT), "run", callbacks=[*callbacks, stop_at(96)], quiet=True)
except Stop:
    pass
with opened(names) as callbacks:
    train(None, "run", resume=True, callbacks=callbacks, quiet=True)
"""
"""A run that is stopped and resumed, in a process of its own: both read their environment when they are imported."""


def logged(name: str, folder: Path) -> Run:
    """A run that was stopped, resumed and logged."""
    pytest.importorskip(name, reason=f"needs {name}")
    apart = {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline"}
    words = [sys.executable, "-c", SERVICES, str(Path(__file__).parent), name]
    done = subprocess.run(words, cwd=folder, env={**os.environ, **apart}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return Run(folder / "run", tiny())


def test_trackio_shows_the_run(tmp_path: Path):
    import sqlite3

    run = logged("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "onefold.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {"run-" + (run.folder / "trackio" / "id").read_text()}
    shown: dict[str, dict[int, Any]] = {}
    for _, step, values in rows:
        for key, value in json.loads(values).items():
            shown.setdefault(key, {})[step] = value
    assert shown["train/denoising"] == {line["images"]: line["denoising"] for line in run.history}
    assert shown["health/psnr"] == {line["images"]: line["health"]["psnr"] for line in run.history if "health" in line}
    assert set(shown["samples"]) == set(shown["reconstructions"]) == {16, 64, 128, 160}
    assert set(shown["latents"]) == {64, 128, 160}
    assert sum(shown["latents"][160]["values"]) == 32 * 16 * 4


def records(data: bytes) -> Iterator[bytes]:
    """Of a file in the format of LevelDB's log, behind W&B's header: blocks of 32 KiB, records cut at their ends."""
    whole, place = b"", 7
    while place < len(data):
        if 2**15 - place % 2**15 < 7:  # too little room for a header
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def test_wandb_keeps_the_run_offline(tmp_path: Path):
    run = logged("wandb", tmp_path)
    from wandb.proto import wandb_internal_pb2 as messages

    shown: dict[str, dict[int, Any]] = {}
    for path in sorted((run.folder / "wandb").glob("offline-run-*/*.wandb")):
        assert path.stem.removeprefix("run-") == (run.folder / "wandb" / "id").read_text()
        for data in records(path.read_bytes()):
            record = messages.Record.FromString(data)
            if not record.history.item:
                continue
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key, value in values.items():
                shown.setdefault(key, {})[json.loads(values["_step"])] = json.loads(value)
    assert shown["train/denoising"] == {line["images"]: line["denoising"] for line in run.history}
    for step, caption in shown["samples/caption"].items():
        assert caption == f"{step} images"
    assert set(shown["samples/caption"]) == set(shown["reconstructions/caption"]) == {16, 64, 128, 160}
    assert set(shown["latents/values"]) == {64, 128, 160}
