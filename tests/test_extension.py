"""Runs that are made longer: `train(None, folder, resume=True, images=N)` and `--resume --images N`.

And what a configuration may say that is given with a run that goes on.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onefold
from data_images import noise
from helpers_runs import differing, log, newest, tiny
from onefold.cli import run as command
from onefold.errors import Interrupted, UserError
from onefold.files import locked
from onefold.schedule import Schedule
from onefold.training.checkpoint import checkpoints
from onefold.training.conversion import one_step_config
from onefold.training.loop import train
from onefold.training.run import load_run
from test_interruption import interrupt


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def stopped(folder: Path, at: int, images: int | None = None) -> None:
    """A run that is interrupted at `at` images, begun or resumed; made longer to `images` if resumed."""
    resumes = (folder / "config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, at)
        with pytest.raises(Interrupted):
            train(None if resumes else tiny(), folder, resume=resumes, images=images, quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> onefold.Run:
    return train(tiny(), tmp_path_factory.mktemp("finished") / "run", quiet=True)


@pytest.fixture
def run(finished: onefold.Run, tmp_path: Path) -> onefold.Run:
    """A copy of a run of 160 images, at its end."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return load_run(tmp_path / "run")


def test_a_finished_run_goes_on_with_the_longer_schedule(run: onefold.Run):
    before, lines, whole = newest(run.folder), log(run.folder), described(run.folder)
    longer = train(None, run.folder, resume=True, images=320, quiet=True)
    assert longer.length == load_run(run.folder).length == 320
    assert checkpoints(run.folder)[-1].name == "000000320"
    assert log(run.folder)[:5] == lines
    assert [line["images"] for line in run.history[5:]] == [192, 224, 256, 288, 320]
    assert [line["rate_factor"] for line in run.history[5:]] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert differing(before, newest(run.folder))

    # Nothing else is changed.
    now = described(run.folder)
    assert now.pop("extensions") == [{"at": 160, "from": 160, "to": 320}]
    assert whole.pop("extensions") == []
    whole["config"]["training"]["images"] = 320
    assert now == whole


def test_until_rates_differ_it_is_the_longer_run_from_the_start(tmp_path: Path):
    """A run of 160 images, stopped at 64: rates are warm, and fall from 80 on, or in a run of 320 from 160 on."""
    stopped(tmp_path / "run", at=64)
    longer = train(None, tmp_path / "run", resume=True, images=320, quiet=True)
    whole = train(tiny(training__images=320), tmp_path / "whole", quiet=True)
    assert differing(newest(whole.folder), newest(longer.folder)) == []
    assert log(whole.folder) == log(longer.folder)
    assert described(longer.folder)["extensions"] == [{"at": 64, "from": 160, "to": 320}]


def test_extended_and_interrupted_it_resumes_to_the_bit(run: onefold.Run, tmp_path: Path):
    shutil.copytree(run.folder, tmp_path / "cut")
    whole = train(None, run.folder, resume=True, images=320, quiet=True)
    stopped(tmp_path / "cut", at=208, images=320)
    assert load_run(tmp_path / "cut").length == 320
    stopped(tmp_path / "cut", at=240)
    cut = train(None, tmp_path / "cut", resume=True, quiet=True)
    assert differing(newest(whole.folder), newest(cut.folder)) == []
    assert log(whole.folder) == log(cut.folder)
    assert described(whole.folder) == described(cut.folder)


def test_every_extension_is_recorded(run: onefold.Run):
    for images in (192, 240):
        train(None, run.folder, resume=True, images=images, quiet=True)
    found = described(run.folder)["extensions"]
    assert found == [{"at": 160, "from": 160, "to": 192}, {"at": 192, "from": 192, "to": 240}]


def test_on_the_command_line(run: onefold.Run, capsys: pytest.CaptureFixture[str]):
    assert command(["train", "--resume", "--images", "192", "--out", str(run.folder), "--quiet"]) == 0
    assert checkpoints(run.folder)[-1].name == "000000192"
    assert command(["train", "--resume", "--images", "192", "--out", str(run.folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--images: 192 do not make {run.folder} longer, which has 192; give more" in error


def test_a_one_step_run_is_made_longer(tmp_path: Path):
    small = {"training.images": 96, "onestep.critic_warmup": 32, "onestep.selects": False}
    config = one_step_config(tiny()).with_changes(small)
    run = train(config, tmp_path / "run", network=onefold.OneFold(config.network), quiet=True)
    longer = train(None, run.folder, resume=True, images=160, quiet=True)
    assert checkpoints(longer.folder)[-1].name == "000000160"
    assert described(run.folder)["extensions"] == [{"at": 96, "from": 96, "to": 160}]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 159, 160])
def test_a_run_is_not_made_shorter(run: onefold.Run, images: int):
    before = described(run.folder)
    with pytest.raises(UserError, match=rf"^--images: {images} do not make .* longer, which has 160; give more$"):
        train(None, run.folder, resume=True, images=images, quiet=True)
    assert described(run.folder) == before


def test_several_phases_are_refused(tmp_path: Path):
    config = tiny(network__architecture="three_networks", network__depth=3)
    run = train(config, tmp_path / "run", quiet=True)
    before = described(run.folder)
    with pytest.raises(UserError, match=r"^--images: .* has several phases and cannot be made longer") as caught:
        train(None, run.folder, resume=True, images=320, quiet=True)
    assert "\n" not in str(caught.value)
    assert described(run.folder) == before


def test_a_phase_with_a_schedule_of_its_own_does_not_get_longer(tmp_path: Path):
    """`training.images` is not its length then."""
    small = {"training.images": 96, "onestep.critic_warmup": 32, "onestep.selects": False}
    config = one_step_config(tiny()).with_changes(small)
    config = config.with_changes({"onestep.schedule": Schedule(images=96, warmup=0)})
    run = train(config, tmp_path / "run", network=onefold.OneFold(config.network), quiet=True)
    with pytest.raises(UserError, match=r"^--images: 160 do not make .* longer, which has 96"):
        train(None, run.folder, resume=True, images=160, quiet=True)
    assert described(run.folder)["extensions"] == []


def test_a_new_run_has_its_length_in_its_configuration(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^images: makes a run longer that is resumed; a new one has training\.images$"
    ):
        train(tiny(), tmp_path / "run", images=320, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_process_trains_stays_as_it_is(run: onefold.Run):
    before = described(run.folder)
    with locked(run.folder), pytest.raises(UserError, match="another process is working in this folder"):
        train(None, run.folder, resume=True, images=320, quiet=True)
    assert described(run.folder) == before


# --- a configuration that is given with it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training__seed": 1}, "training.seed: 1, but the run in {} has 0; config=None goes on with that, or start"),
        ({"objective__draws": 2}, "objective.draws: 2, but the run in {} has 1"),
        ({"network__width": 64}, "network.width: 64, but the run in {} has 32"),
        ({"training__precision": "bfloat16"}, "training.precision: 'bfloat16', but the run in {} has 'float32'"),
        (
            {"training__images": 320},
            "training.images: 320, but the run in {} has 160; config=None goes on with that, i",
        ),
        ({"data__source": "digits:test"}, "data.source: 'digits:test', but the run in {} has 'digits'"),
    ],
    ids=str,
)
def test_other_settings_are_refused(run: onefold.Run, change: dict[str, Any], told: str):
    before = described(run.folder)
    with pytest.raises(UserError) as error:
        train(tiny(**change), run.folder, resume=True, quiet=True)
    assert str(error.value).startswith(told.format(run.folder))
    assert described(run.folder) == before


def test_the_run_s_own_settings_are_no_others(run: onefold.Run):
    """As they were given, before the run has decided, and before or after it is made longer; and as they are kept."""
    before = newest(run.folder)
    undecided = tiny(training__precision="auto")
    for config in (tiny(), undecided, run.config):
        train(config, run.folder, resume=True, quiet=True)
    assert differing(before, newest(run.folder)) == []
    assert train(tiny(), run.folder, resume=True, images=176, quiet=True).length == 176
    for config in (tiny(), tiny(training__images=176), run.config):
        assert train(config, run.folder, resume=True, quiet=True).length == 176
    longer = tiny(training__images=180)  # no whole batches
    assert train(longer, run.folder, resume=True, images=180, quiet=True).length == 192
    assert train(None, run.folder, resume=True, images=208, quiet=True).length == 208
    assert train(longer, run.folder, resume=True, quiet=True).length == 208


def test_data_and_network_from_python_are_no_other_settings(tmp_path: Path):
    config, data = tiny(training__images=16), (noise(40, 4, 4, 1), np.arange(40) % 3)
    network = onefold.OneFold(dataclasses.replace(tiny().network, image_size=(4, 4), classes=3, depth=2))
    run = train(config, tmp_path / "run", data=data, network=network, quiet=True)
    assert run.config.network.depth == 2
    assert train(config, run.folder, resume=True, data=data, quiet=True).images == 16
