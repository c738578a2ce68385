"""What a run is, in words: the command makes the same configuration again."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers_one_step import one_step_from
from helpers_runs import tiny
from onefold import cli
from onefold.summary import command, facts, read_records, seconds_of
from onefold.training import loop
from onefold.training.config import Config
from onefold.training.loop import train
from onefold.training.one_run import with_one_step
from onefold.training.prepare import fit_to_data
from onefold.training.run import Run, load_run


def configured(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Path]:
    """What a command line would train, and where."""
    asked: list[Any] = []

    def noted(config: Config, out: Path, **options: object) -> None:
        asked.append((config, out))

    monkeypatch.setattr(loop, "train", noted)
    program, *words = shlex.split(line)
    assert program == "onefold"
    assert cli.run([*words, "--quiet"]) == 0
    return asked[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny(training__images=32, objective__flip=True, network__latent_norm="none", phases=("self_distillation",))
    return train(config, tmp_path_factory.mktemp("a run's") / "the run", quiet=True)


def test_the_command_makes_the_same_configuration(run: Run, monkeypatch: pytest.MonkeyPatch):
    line = command(run)
    assert line is not None
    assert line.startswith("onefold train digits --network.width 32 ")
    assert "--objective.flip True" in line
    assert "--images 32" in line
    config, out = configured(line, monkeypatch)
    assert fit_to_data(config, run.open_data()[0]) == run.config
    assert out == run.folder


def test_so_does_that_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = with_one_step(tiny(training__images=32, onerun__start=0.2, onerun__measured=20))
    both = train(config, tmp_path / "both", quiet=True)
    line = command(both)
    assert line is not None
    assert "--one-step" in line
    assert "--onerun.start 0.2" in line
    assert "--phases" not in line
    config, _ = configured(line, monkeypatch)
    assert fit_to_data(config, both.open_data()[0]) == both.config


def test_so_does_that_of_a_one_step_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"onestep__ratio__calibrated": False, "training__images": 64, "onestep__critic_warmup": 16}
    fast = train(one_step_from(run.folder, **changes), tmp_path / "fast", quiet=True)
    line = command(fast)
    assert line is not None
    assert line.startswith("onefold onestep ")
    assert "--method ratio" in line
    assert "--onestep.ratio.no-calibrated" in line
    config, out = configured(line, monkeypatch)
    assert fit_to_data(config, fast.open_data()[0]) == fast.config
    assert out == fast.folder
    assert facts(fast)["started from"].startswith("the run (SHA-256 ")


def test_there_is_none_for_what_came_from_python(tmp_path: Path):
    data = np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 2
    made = train(tiny(training__images=16), tmp_path / "python", data=data, quiet=True)
    assert command(made) is None
    assert command(load_run(made.folder)) is None


def test_the_facts(run: Run):
    found = facts(run)
    assert found["trained on"] == "digits: 1,437 images to train on, 360 images to test with"
    assert found["step"] == "16 images, muon, float32, seed 0"
    single = replace(run, config=run.config.with_changes({"training.batch": 1}))
    assert facts(single)["step"] == "1 image, muon, float32, seed 0"
    assert found["length"].startswith("32 images seen, ")
    assert str(run.folder.parent) not in " ".join(found.values())
    assert (seconds_of(run) or 0) > 0
    assert read_records(run) == {}
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "no-record.json").write_text("{}")
    assert read_records(run) == {}
