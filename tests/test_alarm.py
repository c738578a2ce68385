"""The collapse alarm on made-up logs and on small runs that do and do not collapse; the curves that show it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from helpers_runs import differing, log, newest, tiny
from onefold.alarm import collapse
from onefold.cli import run as command
from onefold.errors import TrainingAborted
from onefold.pictures import curves
from onefold.training import health
from onefold.training.checkpoint import checkpoints
from onefold.training.loop import train
from onefold.training.run import load_run

Log = list[dict[str, Any]]

NAIVE = {
    "objective__target": "gradient",
    "objective__loss": "velocity",
    "objective__through": True,
    "network__output": "velocity",
}
SMALL = {
    "training__images": 1280,
    "training__batch": 32,
    "training__warmup": 320,
    "training__ema_half_lives": (2000,),
    "training__log_every": 320,
    "training__health_every": 320,
    "training__checkpoint_every": 10_000,
    "objective__draws": 1,
}


def made_up(std: list[float | None], rank: list[float | None] | None = None, images: float | None = 36.0) -> Log:
    """Measurements at 100, 200, … images, with a line without one after each."""
    lines: Log = []
    for k, value in enumerate(std):
        values = {"latent_std": value, "effective_rank_whole": rank[k] if rank else 40.0, "image_rank_whole": images}
        lines += [{"images": 100 * (k + 1), "health": values}, {"images": 100 * (k + 1) + 50}]
    return lines


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (made_up([]), None),
        (made_up([0.1]), None),
        (made_up([0.7, 0.7, 0.7]), None),
        (made_up([0.7, 0.1]), None),
        (made_up([0.7, 0.1, 0.7]), None),
        (made_up([0.7, 0.1, 0.7, 0.1]), None),
        (made_up([0.1, 0.1, 0.7]), None),
        (made_up([0.21, 0.21]), None),
        (made_up([0.7, 0.19, 0.05]), "standard deviation over images is 0.05"),
        (made_up([0.7, 0.1, 0.1, 0.1]), "standard deviation"),
        (made_up([0.0, 0.0], [0.0, 0.0]), "standard deviation"),
        (made_up([0.7, 0.7, 0.7], [40.0, 17.9, 17.9]), "effective rank is 17.9, below 18"),
        (made_up([0.7, 0.7, 0.7], [40.0, 17.9, 18.1]), None),
        (made_up([0.7, 0.7, 0.7], [40.0, 18.1, 17.9]), None),
        (made_up([0.1, 0.7], [40.0, 1.0]), None),
        (made_up([None, None], [None, None]), None),
        (made_up([0.1, None]), None),
        (made_up([0.7, 0.7], [1.0, 1.0], images=None), None),
    ],
)
def test_two_measurements_below_a_threshold_are_a_collapse(lines: Log, word: str | None):
    reason = collapse(lines)
    assert (reason is None) if word is None else (reason is not None and word in reason), reason


def test_the_warm_up_is_not_judged():
    lines = made_up([0.1, 0.1, 0.1, 0.1])
    assert [collapse(lines[: 2 * k + 1], warmup=200) is not None for k in range(4)] == [False, False, True, True]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_onefold_does_not_set_it_off(tmp_path: Path, seed: int):
    config = tiny(**SMALL, training__seed=seed, training__on_collapse="stop")
    run = train(config, tmp_path / "run", quiet=True)
    assert not any("alarm" in line for line in run.history)
    assert min(line["health"]["latent_std"] for line in run.history[1:]) > 0.3


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_the_naive_objective_does(tmp_path: Path, norm: str, capsys: pytest.CaptureFixture[str]):
    """With `stop`: exit code 3 after a checkpoint, and again when it is resumed, since it does not recover."""
    run = tmp_path / "run"
    config = tiny(**SMALL, **NAIVE, network__latent_norm=norm, training__on_collapse="stop")
    with pytest.raises(TrainingAborted) as caught:
        train(config, run, quiet=True)
    first = load_run(run).history[-1]
    assert first["images"] < 1280
    assert "standard deviation" in first["alarm"]
    assert first["health"]["latent_std"] < 0.2
    assert str(run) in str(caught.value)
    assert f"{first['images']:,} images, saved" in str(caught.value)
    assert [path.name for path in checkpoints(run)] == [f"{first['images']:09d}"]
    assert (run / "model" / "model.safetensors").exists()
    assert (run / "curves.png").exists()

    assert command(["train", "--resume", "--out", str(run), "--quiet"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("onefold: ")
    assert error.count("\n") == 1
    assert load_run(run).history[-1]["images"] == first["images"] + 320


def collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All latents are collapsed from the third measurement on."""
    monkeypatch.setattr(health, "collapse", lambda lines, warmup: "reason" if len(lines) > 2 else None)


def test_the_command_stops_with_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    collapsing(monkeypatch)
    small = {"network.width": 32, "network.depth": 1, "network.heads": 2, "training.compile": "no"}
    small |= {"training.images": 320, "training.batch": 16, "training.health-every": 32, "training.log-every": 64}
    options = [f"--{name}={value}" for name, value in small.items()]
    run = tmp_path / "run"
    assert command(["train", "digits", "--out", str(run), "--quiet", "--on-collapse", "stop", *options]) == 3
    assert "reason" in capsys.readouterr().err
    assert checkpoints(run)[-1].name == "000000096"
    assert load_run(run).config.training.on_collapse == "stop"


@pytest.mark.parametrize(("choice", "said"), [("warn", 1), ("ignore", 0)])
def test_a_warning_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], choice: str, said: int
):
    collapsing(monkeypatch)
    config = tiny(training__health_every=32, training__on_collapse=choice, training__checkpoint_every=10_000)
    run = train(config, tmp_path / "run", quiet=True)
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("reason") == said
    assert ["alarm" in line for line in run.history] == [False, False, True, True, True]
    assert run.history[-1]["images"] == 160


def test_a_resumed_run_is_measured_and_judged_as_if_it_had_not_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The drift looks back at the measurement before the interruption, and so does the alarm."""
    collapsing(monkeypatch)
    monkeypatch.setattr(curves, "write", lambda lines, path: None)  # slow, and without a part in it
    whole = train(tiny(training__health_every=16, training__keep_last=9), tmp_path / "whole", quiet=True)
    for stopped in (48, 144):
        run = tmp_path / f"run{stopped}"
        shutil.copytree(whole.folder, run)
        for path in checkpoints(run):
            if int(path.name) > stopped:
                shutil.rmtree(path)
        resumed = train(None, run, resume=True, quiet=True)
        assert log(run) == log(whole.folder)
        assert differing(newest(run), newest(whole.folder)) == []
        assert resumed.history[-1]["health"]["drift"] is not None


# --- curves -----------------------------------------------------------------------------------------------------------


def drawn(lines: Log, path: Path) -> np.ndarray | None:
    curves.write(lines, path)
    return np.asarray(Image.open(path).convert("RGB"), dtype=int) if path.exists() else None


def test_curves_need_two_measurements(tmp_path: Path):
    lines = [{"images": 100 * k, "reconstruction": 0.5, "denoising": 0.5} for k in range(1, 9)]
    assert drawn(lines, tmp_path / "curves.png") is None
    assert drawn(lines + made_up([0.5]), tmp_path / "curves.png") is None
    assert drawn(made_up([0.5, 0.6]), tmp_path / "curves.png") is not None


def test_curves_of_all_that_there_is(tmp_path: Path):
    run = train(tiny(training__health_every=32, objective__perceptual_weight=0.1), tmp_path / "run", quiet=True)
    whole = drawn(run.history, tmp_path / "whole.png")
    few = drawn(made_up([0.5, 0.6]), tmp_path / "few.png")
    assert whole is not None
    assert few is not None
    assert (whole.shape[1], few.shape[1]) == (3 * 440, 2 * 440), "a panel has its width, however many there are"
    assert whole.shape[0] == 3 * few.shape[0], "three rows of panels, or one"


def test_curves_of_one_step_show_the_upkeep_and_mark_nothing_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One panel has all roles that are kept up; none has the mark of a best value."""
    assert not hasattr(curves.Panel, "best")
    shown: dict[str, list[str]] = {}
    honest = curves._draw

    def draw(ax: Any, panel: curves.Panel, history: Any) -> None:
        honest(ax, panel, history)
        shown[panel.title] = ax.get_legend_handles_labels()[1]

    monkeypatch.setattr(curves, "_draw", draw)
    kept = {"decoding": 0.1, "encoding": 0.2, "denoiser": 0.3}
    lines = [{"images": 100 * k, "onestep": {"frechet": 5.0 - k}, **kept} for k in range(1, 4)]
    assert drawn(lines, tmp_path / "curves.png") is not None
    assert shown["drift of the other roles"] == ["decoding", "encoding", "denoiser"]
    assert not any("least" in labels for labels in shown.values())
    shown.clear()
    assert drawn([{k: v for k, v in line.items() if k not in ("decoding", "encoding")} for line in lines],
                 tmp_path / "other.png") is not None  # fmt: skip
    assert shown["drift of the other roles"] == ["denoiser"], "networks that share no codec"


def test_curves_of_numbers_that_are_missing(tmp_path: Path):
    lines = made_up([0.5, None, 0.6], [None, None, None], images=None)
    lines[0]["health"]["channel_std"] = [0.4, None]
    lines[2]["health"]["channel_std"] = [0.4, 0.6]
    assert drawn(lines, tmp_path / "curves.png") is not None


def test_an_alarm_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda ax: None)  # it makes way for the line, and so moves
    lines = made_up([0.5, 0.6, 0.1, 0.1])
    calm = drawn(lines, tmp_path / "calm.png")
    alarmed = drawn([*lines[:6], {**lines[6], "alarm": "reason"}, lines[7]], tmp_path / "alarmed.png")
    assert calm is not None
    assert alarmed is not None
    changed = np.abs(alarmed - calm).max(-1) > 60
    assert 1 < changed.any(0).sum() <= 6, "a vertical line in each of two panels"
    assert changed.any(1).sum() > 30


def test_the_clock_goes_by_the_speeds_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """10, 10 and 20 images a second: 10, 20 and 25 seconds; beyond the log as fast as at its end."""
    lines = made_up([0.5, 0.6, 0.7], images=None)
    timed = [
        {**line, "images": 100 * (k + 1), "images_per_second": 20.0 if k >= 2 else 10.0} for k, line in enumerate(lines)
    ]
    clock = curves.Clock.of(timed[:3])
    assert clock is not None
    assert clock.unit == "seconds"
    images, times = np.array([0, 0.05, 0.15, 0.2, 0.3, 0.5]), np.array([0, 5, 15, 20, 25, 35])
    np.testing.assert_allclose(clock.time(images), times)
    np.testing.assert_allclose(clock.seen(times), images)
    slow = [{"images": 3600 * k, "images_per_second": 1.0} for k in (1, 2, 3)]
    hours = curves.Clock.of(slow)
    assert hours is not None
    assert (hours.unit, hours.times.tolist()) == ("hours", [0, 1, 2, 3])
    assert curves.Clock.of([timed[0], {**timed[1], "images_per_second": None}]) is None
    assert curves.Clock.of([]) is None
    honest, times = Axes.secondary_xaxis, list[Axes]()
    monkeypatch.setattr(Axes, "secondary_xaxis", lambda ax, *args, **kw: times.append(ax) or honest(ax, *args, **kw))
    assert drawn(timed, tmp_path / "times.png") is not None
    assert len(times) == 2, "one above each panel of the first row"
    assert drawn(lines, tmp_path / "plain.png") is not None
    assert len(times) == 2, "none without speeds"


def test_chosen_panels_alone_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles: list[str] = []
    monkeypatch.setattr(curves, "_draw", lambda ax, panel, history: titles.append(panel.title))
    lines = made_up([0.5, 0.6])
    curves.write(lines, tmp_path / "all.png")
    assert len(titles) > 1
    chosen = [panel for panel in curves.PANELS if panel.title == titles[1]]
    titles.clear()
    curves.write(lines, tmp_path / "curves.png", chosen)
    assert titles == [chosen[0].title]
