"""The recipe auto: what follows from the images and the speed of the device, and the command."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_images import noise
from onefold import planner
from onefold.cli import run as command
from onefold.data import as_dataset
from onefold.errors import UserError
from onefold.pictures.grids import SAMPLES
from onefold.planner import NEEDED, make_plan, patch_for
from onefold.training.config import Config, DataConfig
from onefold.training.phases import training_flops
from onefold.training.run import load_run


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "can_compile", lambda device: False)


def at_rate(monkeypatch: pytest.MonkeyPatch, operations_per_second: float) -> None:
    """A device of this speed, whatever it computes."""
    monkeypatch.setattr(planner, "_images_per_second", lambda config: operations_per_second / training_flops(config))


def planned(images: np.ndarray, minutes: float = 30.0, classes: int = 0, **options: bool) -> planner.Plan:
    labels = np.arange(len(images)) % classes if classes else None
    data = as_dataset(images if labels is None else (images, labels))
    return make_plan(data, DataConfig(source="mine.npz"), minutes=minutes, **options)


# --- the patch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tokens", "patch"),
    [((8, 8), 64, 2), ((16, 16), 64, 2), ((28, 28), 64, 4), ((32, 32), 64, 4), ((64, 64), 64, 8), ((64, 64), 256, 4)],
)
def test_patches_of_common_sizes(size: tuple[int, int], tokens: int, patch: int):
    assert patch_for(size, tokens) == patch


@given(st.integers(1, 512), st.integers(1, 512), st.sampled_from([64, 256]))
def test_a_patch_divides_the_image_into_few_tokens_and_is_the_smallest_that_does(height: int, width: int, tokens: int):
    try:
        patch = patch_for((height, width), tokens)
    except UserError:
        patches = range(2, 33)
    else:
        assert height % patch == width % patch == 0
        assert height * width // patch**2 <= tokens
        patches = range(2, patch)
    common = math.gcd(height, width)
    assert not [p for p in patches if common % p == 0 and height * width <= tokens * p**2]


def test_what_no_patch_cuts_is_one_line_with_the_remedy():
    with pytest.raises(UserError, match=r"^images of 31×37 cannot be cut .* OUT\.zip --size 24$"):
        patch_for((31, 37), 64)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_network_is_the_largest_that_sees_enough_images(monkeypatch: pytest.MonkeyPatch):
    images = noise(50, 16, 16, 3)
    before = 0.0
    for rate in (1e9, 1e11, 1e12, 1e14):
        at_rate(monkeypatch, rate)
        config = planned(images).config
        size = training_flops(config)
        assert size >= before
        before = size
        seen = 0.9 * 30 * 60 * rate
        assert seen / size >= NEEDED or config.network.width == planner.SIZES[0][0]
        assert config.training.images == pytest.approx(seen / size, rel=0.01, abs=20 * config.training.batch)
    assert config.network.width == planner.SIZES[-1][0]


def test_lengths_fit_the_time_and_the_first_picture_comes_soon(monkeypatch: pytest.MonkeyPatch):
    at_rate(monkeypatch, 1e11)
    short, long = planned(noise(50, 16, 16, 3), minutes=10), planned(noise(50, 16, 16, 3), minutes=60)
    for plan, minutes in ((short, 10), (long, 60)):
        assert plan.minutes == pytest.approx(minutes, rel=0.05)
        training = plan.config.training
        speed = 1e11 / training_flops(plan.config)
        assert training.sample_every / speed <= 120
        assert training.sample_every <= training.images / 9
        assert training.log_every / speed <= 60
        for name in ("images", "warmup", "log_every", "health_every", "sample_every", "checkpoint_every"):
            assert getattr(training, name) % training.batch == 0, name


@pytest.mark.parametrize("minutes", [1, 10, 60])
def test_pictures_take_a_small_part_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch, minutes: float):
    at_rate(monkeypatch, 1e10)
    config = planned(noise(50, 16, 16, 3), minutes=minutes).config
    evaluations = SAMPLES * (config.training.images // config.training.sample_every) * config.sampler.steps
    drawing = evaluations * config.network.kind.role_flops(config.network).denoise
    assert drawing <= 0.05 * config.training.images * training_flops(config)


def test_one_step_is_learned_in_the_same_time(monkeypatch: pytest.MonkeyPatch):
    at_rate(monkeypatch, 1e10)
    plain, both = (planned(noise(300, 8, 8, 1), classes=10, one_step=one_step) for one_step in (False, True))
    assert (plain.config.phases, both.config.phases) == ((), ("one_run",))
    arithmetic = [plan.config.training.images * training_flops(plan.config) for plan in (plain, both)]
    assert arithmetic[1] == pytest.approx(arithmetic[0], rel=0.02)
    assert both.config.training.images < plain.config.training.images
    assert both.minutes == pytest.approx(plain.minutes, rel=0.02)


def test_few_images_are_moved_and_warned_of(monkeypatch: pytest.MonkeyPatch):
    at_rate(monkeypatch, 1e11)
    few, many = planned(noise(100, 16, 16, 1)), planned(np.zeros((2_000, 16, 16, 1), np.uint8))
    assert few.config.objective.shift > 0 == many.config.objective.shift
    assert any("memorised" in reason for reason in few.reasons)
    assert not any("memorised" in reason for reason in many.reasons)
    assert not few.config.objective.flip, "nobody has said that left and right are alike"


def test_images_may_be_seen_once():
    config = Config().with_changes({"training.images": 100, "network.latent_channels": 1})
    data, device = as_dataset(noise(100, 8, 8, 1)), torch.device("cpu")
    reasons = planner._reasons(config, data, 1.0, device, minutes=2, expected=2)
    assert "100 images: each of the 100 training images 1 time" in reasons
    assert reasons[0].startswith("patch 2: images of 8×8 become 16 tokens of 1 channel each")


@pytest.mark.parametrize("one_step", [False, True])
def test_too_little_time_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch, one_step: bool):
    """Not that images are seen 0 times; and with the time that is named, each is seen once."""
    images = np.zeros((20_000, 16, 16, 1), np.uint8)
    monkeypatch.setattr(planner, "_images_per_second", lambda config: 100.0)
    short = planned(images, minutes=1, one_step=one_step)
    _, size, length, *others = short.reasons
    assert "the smallest network, which still sees fewer than 200,000 images; more --minutes let it see more" in size
    assert re.match(r"[\d,]+ images: fewer than the 20,000 training images, so that some are never seen; --min", length)
    needed = int(re.findall(r"--minutes ([\d,]+) would show all", length)[0].replace(",", ""))
    assert not others
    longer = planned(images, minutes=needed, one_step=one_step)
    assert longer.reasons[2].endswith("each of the 20,000 training images 1 time")
    assert planned(images, minutes=needed - 1, one_step=one_step).config.training.images < len(images)


def test_the_least_number_of_steps_may_take_longer_than_was_given(monkeypatch: pytest.MonkeyPatch):
    at_rate(monkeypatch, 1e7)
    plan = planned(noise(50, 16, 16, 3), minutes=1)
    assert plan.minutes > 2
    assert plan.config.training.images == 20 * plan.config.training.batch
    assert "20 steps, the least, take longer than --minutes 1" in plan.reasons


def test_channels_and_classes_are_those_of_the_data(monkeypatch: pytest.MonkeyPatch):
    at_rate(monkeypatch, 1e11)
    colour, grey = planned(noise(60, 32, 32, 3), classes=3).config.network, planned(noise(60, 8, 8, 1)).config.network
    assert (colour.channels, colour.classes, colour.patch, colour.latent_channels) == (3, 3, 4, 16)
    assert (grey.channels, grey.classes, grey.patch, grey.latent_channels) == (1, 0, 2, 4)


@pytest.mark.parametrize(
    ("minutes", "wrong"),
    [
        (0.0, "too short"),
        (-3.0, "too short"),
        (0.5, "too short"),
        (math.inf, "not a length of time"),
        (math.nan, "not a length of time"),
    ],
)
def test_no_time_is_refused(minutes: float, wrong: str):
    with pytest.raises(UserError, match=f"^--minutes: {minutes:g} is {wrong}; give at least 1$"):
        planned(noise(20, 8, 8, 1), minutes=minutes)


# --- the command ------------------------------------------------------------------------------------------------------


def short(data: object, source: DataConfig, **options: object) -> planner.Plan:
    config = planner._config(as_dataset(data), source, 2, (32, 1, 2), "cpu")
    training = {"training.images": 64, "training.batch": 16, "training.precision": "float32"}
    return planner.Plan(config.with_changes(training), ("because",), 1.0)


def test_the_command_plans_says_why_and_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    seen: dict[str, object] = {}

    def remembered(data: object, source: DataConfig, **options: object) -> planner.Plan:
        seen.update(options)
        return short(data, source)

    monkeypatch.setattr(planner, "make_plan", remembered)
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", images=noise(40, 8, 8, 3), labels=np.arange(40) % 2)
    words = ["train", "auto", "--data", "mine.npz", "--minutes=7", "--out", "run", "--training.seed", "3"]
    assert command(words) == 0
    said = capsys.readouterr().out
    assert "because" in said
    assert "expected: " in said
    assert seen["minutes"] == 7
    config: Config = load_run("run").config
    assert (config.recipe, config.data.source, config.training.seed, config.network.classes) == (
        "auto",
        str(tmp_path / "mine.npz"),
        3,
        2,
    )
    assert command(["train", "--resume", "--images", "96", "--out", "run", "--quiet"]) == 0
    assert load_run("run").history[-1]["images"] == 96


REFUSED = [
    (["auto"], "train auto: give your images with --data"),
    (["auto", "--data", "missing.zip"], "missing.zip: no such file or folder"),
    (["auto", "--data", "digits", "--minutes", "soon"], "--minutes: 'soon' is not a number"),
    (["auto", "--data", "digits", "--minutes", "0"], "--minutes: 0 is too short"),
    (["digits", "--minutes", "3"], "--minutes: belongs to the recipe auto"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_planned_is_one_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert command(["train", *words, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert not Path("run").exists()
