"""Weights, images and watchers from outside: a run from a network, from another run, of a Python object."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import onefold
from conftest import randomised
from data_images import noise
from helpers_runs import differing, log, newest, tiny
from onefold.cli import run as command
from onefold.errors import Interrupted, UserError
from onefold.evaluation import evaluate
from onefold.files import sha256_of
from onefold.networks import NetworkConfig, build
from onefold.networks.source import PACKAGED
from onefold.training import loop
from onefold.training.checkpoint import checkpoints
from onefold.training.phases import phases_of
from test_interruption import interrupt


class Pictures:
    """Images of one's own: noise, with labels in turn."""

    image_shape = (8, 8, 1)

    def __init__(self, count: int = 60, classes: int = 3, seed: int = 0) -> None:
        self.classes = classes
        self.images = noise(count, 8, 8, 1, seed=seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index % self.classes


def trained(config: onefold.Config, folder: Path, **options: Any) -> onefold.Run:
    return onefold.train(config, folder, quiet=True, **options)


def without_steps(config: onefold.Config) -> onefold.Config:
    """So that weights stay where they begin."""
    return config.with_changes({"training.learning_rate": 1e-30, "training.muon_rate": 1e-30})


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_callbacks_are_told_every_line_in_order(tmp_path: Path):
    told: list[tuple[str, onefold.Run, dict[str, Any]]] = []
    written: list[int] = []

    def first(run: onefold.Run, line: dict[str, Any]) -> None:
        told.append(("first", run, dict(line)))
        written.append(len(run.history))

    run = trained(tiny(), tmp_path / "run", callbacks=[first, lambda run, line: told.append(("second", run, line))])
    assert [name for name, _, _ in told] == ["first", "second"] * 5
    assert [line for name, _, line in told if name == "first"] == run.history
    assert [line for name, _, line in told if name == "second"] == run.history
    assert {each.folder for _, each, _ in told} == {run.folder}
    assert written == [1, 2, 3, 4, 5], "the line is in the log when they are called"


def test_a_callback_may_end_the_training(tmp_path: Path):
    def stop(run: onefold.Run, line: dict[str, Any]) -> None:
        if line["images"] == 96:
            raise StopIteration

    with pytest.raises(StopIteration):
        trained(tiny(), tmp_path / "run", callbacks=[stop])
    whole, cut = trained(tiny(), tmp_path / "whole"), onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(cut.folder)) == []


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> onefold.OneFold:
    return randomised(onefold.OneFold(tiny().network))


def test_a_run_begins_with_the_weights_of_a_network(source: onefold.OneFold, tmp_path: Path):
    before = {name: value.clone() for name, value in source.state_dict().items()}
    requires = [p.requires_grad for p in source.parameters()]
    run = trained(tiny(training__images=16, training__keep_last=9), tmp_path / "run", network=source)
    assert [path.name for path in checkpoints(run.folder)] == ["000000000", "000000016"]
    start = newest_at(run.folder, 0)
    for name in ("network", "average-0", "average-1"):
        assert differing(start[name], before) == []
    assert differing(newest_at(run.folder, 16)["network"], before)
    assert differing(dict(source.state_dict()), before) == [], "it stays as it is"
    assert [p.requires_grad for p in source.parameters()] == requires
    assert json.loads((run.folder / "config.json").read_text())["config"]["start"] == "a network in memory"


def newest_at(folder: Path, images: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint by file and name."""
    path = folder / "checkpoints" / f"{images:09d}"
    return {file.stem: load_file(file) for file in path.glob("*.safetensors")}


def test_it_may_have_other_classes(source: onefold.OneFold, tmp_path: Path):
    """Label vectors are new ones, from the run's seed; all other weights are taken."""
    random = torch.get_rng_state()
    config = tiny(training__images=16, training__keep_last=9)
    runs = [trained(config, tmp_path / name, data=Pictures(), network=source) for name in "ab"]
    other = trained(config.with_changes({"training.seed": 1}), tmp_path / "c", data=Pictures(), network=source)
    assert torch.equal(torch.get_rng_state(), random), "the global generator is left alone"
    assert runs[0].config.network == dataclasses.replace(source.config, classes=3)
    a, b, c = (newest_at(run.folder, 0)["network"] for run in (*runs, other))
    assert differing(a, dict(source.state_dict())) == ["labels.weight"]
    assert a["labels.weight"].shape == (4, 32)
    assert differing(a, b) == []
    assert differing(a, c) == ["labels.weight"]


@pytest.mark.parametrize(
    "change", [{"patch": 4}, {"width": 64}, {"depth": 2}, {"latent_channels": 3}, {"channels": 3}], ids=str
)
def test_a_network_of_another_kind_does_not_fit(change: dict[str, int]):
    other = build(dataclasses.replace(tiny().network, **change))
    with pytest.raises(UserError, match=r"^start: the weights do not fit this run's network \(.* differs\); give") as e:
        phases_of(tiny())[0].begin_from(other)
    assert "\n" not in str(e.value)


def test_a_network_for_other_images_is_refused_before_anything_is_written(tmp_path: Path):
    colours = build(dataclasses.replace(tiny().network, channels=3))
    with pytest.raises(UserError, match=r"^start: the weights do not fit"):
        trained(tiny(), tmp_path / "run", network=colours)
    assert not (tmp_path / "run").exists()


def test_the_architecture_is_that_of_the_network(tmp_path: Path):
    pixels = randomised(build(NetworkConfig(width=32, depth=1, heads=2, architecture="pixels")))
    run = trained(tiny(training__images=16), tmp_path / "run", network=pixels)
    assert run.config.network == pixels.config


def test_a_resumed_run_has_its_weights_already(source: onefold.OneFold, tmp_path: Path):
    run = trained(tiny(training__images=16), tmp_path / "run")
    with pytest.raises(UserError, match=r"^network: the run in .* goes on with its own weights; leave it out$"):
        onefold.train(None, run.folder, resume=True, network=source, quiet=True)


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_run_of_a_python_object(tmp_path: Path):
    pictures, unseen = Pictures(), Pictures(20, seed=1)
    run = trained(tiny(), tmp_path / "run", data=pictures, test_data=unseen)
    assert run.config.network.classes == 3
    assert run.config.data.source == run.config.data.test == "Pictures (a Python object)"
    assert [len(part) for part in run.open_data()] == [60, 20]
    record = evaluate(run, images=20)
    assert record["protocol"]["data"] == "Pictures (a Python object)"


def test_some_of_the_object_is_set_apart(tmp_path: Path):
    run = trained(tiny(training__images=16, data__holdout=0.1), tmp_path / "run", data=Pictures())
    assert [len(part) for part in run.open_data()] == [52, 8]
    assert run.config.data.test is None


def test_it_is_resumed_with_the_same_object(tmp_path: Path):
    data = {"data": Pictures(), "test_data": Pictures(20, seed=1)}
    whole = trained(tiny(), tmp_path / "whole", **data)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 80)
        with pytest.raises(Interrupted):
            trained(tiny(), tmp_path / "cut", **data)
    with pytest.raises(UserError, match=r"Pictures \(a Python object\)") as caught:
        onefold.train(None, tmp_path / "cut", resume=True, quiet=True)
    assert "\n" not in str(caught.value)
    other = {**data, "data": Pictures(classes=1)}
    with pytest.raises(UserError, match=r"with 1 class, but .*cut was trained on .* with 3 classes; give"):
        onefold.train(None, tmp_path / "cut", resume=True, quiet=True, **other)
    cut = onefold.train(None, tmp_path / "cut", resume=True, quiet=True, **data)
    assert differing(newest(whole.folder), newest(cut.folder)) == []
    assert log(whole.folder) == log(cut.folder)


def test_test_images_alone_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"^test_data: goes with data; "):
        trained(tiny(), tmp_path / "run", test_data=Pictures())
    assert not (tmp_path / "run").exists()


# --- another run ------------------------------------------------------------------------------------------------------

SHORT = ["--training.batch", "16", "--training.images", "32", "--training.device", "cpu", "--quiet"]


def test_from_a_run_on_the_command_line(tmp_path: Path):
    """Its network is taken over, with its sizes; the data may be others."""
    first = trained(tiny(), tmp_path / "first")
    np.savez(tmp_path / "images.npz", images=noise(40, 8, 8, 1), labels=np.arange(40) % 2)
    out = tmp_path / "second"
    data = ["--data", str(tmp_path / "images.npz")]
    assert command(["train", "digits", "--from", str(first.folder), *data, "--out", str(out), *SHORT]) == 0
    run = onefold.load_run(out)
    assert run.config.network == dataclasses.replace(first.config.network, classes=2)
    assert (run.config.start, run.config.start_sha256) == (str(first.folder), first.model_sha256)
    begun = newest_at(out, 0)["network"]
    assert differing(begun, dict(first.network.state_dict())) == ["labels.weight"]
    assert differing(dict(run.network.state_dict()), begun)

    # A saved network serves as well, and a run whose checkpoints are lost begins with the same weights again.
    first.network.save_pretrained(tmp_path / "saved")
    again = tmp_path / "third"
    assert command(["train", "digits", "--from", str(tmp_path / "saved"), *data, "--out", str(again), *SHORT]) == 0
    assert differing(newest(out), newest(again)) == []
    shutil.rmtree(again / "checkpoints")
    assert command(["train", "--resume", "--out", str(again), "--quiet"]) == 0
    assert differing(newest(out), newest(again)) == []


@pytest.mark.parametrize("option", ["--network.width=64", "--network.patch 4", "--architecture pixels"])
def test_the_network_cannot_be_chosen_besides(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, out = trained(tiny(training__images=16), tmp_path / "first"), tmp_path / "run"
    words = ["train", "digits", "--from", str(first.folder), *option.split(), "--out", str(out), *SHORT]
    assert command(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the network is that of --from {first.folder}; leave it out" in error
    assert option.split("=")[0].split()[0] in error
    assert not out.exists()


def test_from_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command(["train", "digits", "--from", str(tmp_path / "no"), "--out", str(tmp_path / "run"), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "no") in error
    assert not (tmp_path / "run").exists()


def test_a_run_from_another_is_a_function_of_its_configuration(tmp_path: Path):
    """Interrupted before its first step, it begins with the same weights."""
    first = trained(tiny(training__images=16), tmp_path / "first")
    config = dataclasses.replace(without_steps(tiny()), start=str(first.folder))
    whole = trained(config, tmp_path / "whole", data=Pictures(60, classes=4))

    def refuse(*arguments: object) -> None:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", refuse)
        with pytest.raises(ZeroDivisionError):
            trained(config, tmp_path / "cut", data=Pictures(60, classes=4))
    assert checkpoints(tmp_path / "cut") == []
    torch.manual_seed(99)
    cut = onefold.train(None, tmp_path / "cut", resume=True, quiet=True, data=Pictures(60, classes=4))
    assert differing(newest(whole.folder), newest(cut.folder)) == []


def test_a_start_that_has_been_replaced_is_said_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It is refused where it must be read again, and said where the run has weights of its own."""
    first, out = trained(tiny(training__images=16), tmp_path / "first"), tmp_path / "second"
    words = ["train", "digits", "--from", str(first.folder), "--out", str(out), *SHORT]
    assert command(words) == 0
    config = onefold.load_run(out).config
    assert command(["train", "--resume", "--out", str(out)]) == 0
    assert "another network" not in capsys.readouterr().out
    randomised(onefold.OneFold(tiny().network)).save_pretrained(first.folder / "model")
    before = newest(out)
    assert command(["train", "--resume", "--out", str(out)]) == 0
    note = f"note: {first.folder}: holds another network than the one that this run began with; it goes on with its own"
    assert capsys.readouterr().out.splitlines().count(note) == 1
    assert differing(newest(out), before) == []

    shutil.rmtree(out / "checkpoints")
    assert command(["train", "--resume", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{first.folder}/model/model.safetensors: is not the network that the run was to begin with" in error
    assert checkpoints(out) == []
    with pytest.raises(UserError, match="is not the network that the run was to begin with"):
        trained(config, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_network_of_the_package_has_its_hash_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert command(["train", "digits", "--from", "digits", "--out", "run", *SHORT]) == 0
    config = onefold.load_run("run").config
    assert (config.start, config.start_sha256) == ("digits", sha256_of(PACKAGED / "digits" / "model.safetensors"))
