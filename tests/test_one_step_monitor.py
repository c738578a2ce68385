"""The monitor of a one-step run: its numbers by hand, what it leaves alone, and the alarm on made-up logs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import onefold
from helpers_one_step import begun, critic_of, digits, newest_of, one_step, one_step_from, teacher_of
from helpers_runs import differing, log, tensors, tiny
from onefold import alarm, metrics
from onefold.alarm import BOUNDS, ONESTEP_CURE, departure
from onefold.data import open_dataset, read_all
from onefold.errors import TrainingAborted
from onefold.networks.base import Network
from onefold.pixels import to_uint8
from onefold.sampling import Sampler
from onefold.training import loop, one_step_monitor
from onefold.training.config import Config
from onefold.training.one_step_monitor import LEVELS, NOISES, PROBE, OneStepMonitor, auc, calibration
from onefold.training.run import Run, open_data
from onefold.training.state import TrainingState
from onefold.training.step import training_step

logits = st.lists(st.integers(-4, 4) | st.floats(-30, 30, width=32), min_size=1, max_size=20)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor([float(value) for value in values])


# --- auc and calibration ----------------------------------------------------------------------------------------------


@given(logits, logits)
def test_auc_is_the_share_of_pairs_in_the_right_order(positive: list[float], negative: list[float]):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    found = auc(tensor(positive), tensor(negative))
    assert found == pytest.approx(sum(wins) / len(wins))
    assert found + auc(tensor(negative), tensor(positive)) == pytest.approx(1)
    assert auc(2 * tensor(positive), 2 * tensor(negative)) == pytest.approx(found), "the order alone counts"


def test_auc_of_what_is_well_known():
    up, down = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0])
    assert (auc(up, down), auc(down, up), auc(up, up), auc(torch.zeros(3), torch.zeros(5))) == (1, 0, 0.5, 0.5)


@given(st.lists(st.tuples(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32)), min_size=1, max_size=20))
def test_calibration_is_the_mean_distance_in_each_of_ten_bins(pairs: list[tuple[float, float]]):
    positive, negative = (tensor([pair[k] for pair in pairs]) for k in (0, 1))
    said = [
        (torch.tensor(v).double().sigmoid().item(), true)
        for pair in pairs
        for v, true in zip(pair, (1, 0), strict=True)
    ]
    error = 0.0
    for k in range(10):
        inside = [(p, true) for p, true in said if (k / 10 <= p < (k + 1) / 10) or (k == 9 and p == 1)]
        if inside:
            mean, share = (sum(each[j] for each in inside) / len(inside) for j in (0, 1))
            error += len(inside) / len(said) * abs(mean - share)
    found = calibration(positive, negative)
    assert 0 <= found <= 1
    if all(abs(10 * p - round(10 * p)) > 1e-9 or p in (0, 1) for p, _ in said):  # not on the edge of two bins
        assert found == pytest.approx(error, abs=1e-9)


def test_calibration_by_hand():
    """Says ½ of all; says the truth; says the opposite; says 0.8 where it is right in 3 of 4."""
    assert calibration(torch.zeros(4), torch.zeros(4)) == 0
    assert calibration(torch.full((4,), 50.0), torch.full((4,), -50.0)) == pytest.approx(0, abs=1e-9)
    assert calibration(torch.full((4,), -50.0), torch.full((4,), 50.0)) == pytest.approx(1)
    surely = math.log(0.85 / 0.15)
    positive = torch.tensor([surely, surely, surely, -surely])
    assert calibration(positive, -positive) == pytest.approx(0.85 - 0.75)


# --- measurements -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop.curves, "write", lambda *arguments: None)
    monkeypatch.setenv("ONEFOLD_CACHE", str(tmp_path / "cache"))


def watched(config: Config, folder: Path, teacher: Network | None = None) -> tuple[OneStepMonitor, TrainingState]:
    """A monitor and a state whose generator is a network of its own."""
    data, test = open_data(config.data)
    state = begun(config, teacher)
    with torch.no_grad():
        for net in (state.network, *state.averages):
            for p in net.parameters():
                p.mul_(1.1)
    warmup = config.onestep.critic_warmup
    return OneStepMonitor(Run(folder, config), data, test, torch.device("cpu"), print, warmup=warmup), state


def looked(monitor: OneStepMonitor, state: TrainingState, images: int = 64) -> dict[str, Any]:
    state.counters.images = images
    return monitor.look(state, {"images": images}, print)["onestep"]


def test_samples_are_compared_with_the_training_images(tmp_path: Path):
    config = one_step(onestep__measured=50)
    monitor, state = watched(config, tmp_path)
    found = looked(monitor, state)

    data = open_dataset("digits")
    real, labels = read_all(data)
    chosen = np.linspace(0, len(data) - 1, 50).round().astype(int)
    seeds = range(2**40, 2**40 + 50)
    z = torch.cat(
        list(state.averages[-1].sample_latents(seeds, labels[chosen].tolist(), Sampler(1, "renoise", start=0.3)))
    )
    with torch.no_grad():
        made = to_uint8(state.averages[-1].decode(z))
    extractor = metrics.digits_classifier()
    expected = metrics.frechet_distance(extractor.features(real), extractor.features(made))
    assert found["frechet"] == pytest.approx(expected, rel=1e-4)
    assert found["class_accuracy"] == metrics.class_accuracy(extractor, made, labels[chosen])
    a, b = made.double() / 127.5 - 1, real.double() / 127.5 - 1
    assert found["mean_shift"] == pytest.approx(((a.mean() - b.mean()) / b.std()).item(), rel=1e-4)
    within = [x.flatten(1).std(1).mean().item() for x in (a, b)]
    assert found["contrast"] == pytest.approx(within[0] / within[1], rel=1e-4)
    assert "saturation" not in found
    held_out, _ = read_all(open_dataset("digits:test"), range(PROBE))
    with torch.no_grad():
        latents = teacher_of(state).encode(held_out / 127.5 - 1)
    assert found["diversity"] == pytest.approx((z.std(0).mean() / latents.std(0).mean()).item(), rel=1e-4)


def test_what_measures_is_float32_whatever_the_networks_compute_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Tensor, Tensor]] = []
    honest = metrics.Classifier.features

    def features(self: metrics.Classifier, images: Tensor, batch: int = 256) -> Tensor:
        found = honest(self, images, batch)
        seen.append((images, found))
        return found

    monitor, state = watched(one_step(training__precision="bfloat16"), tmp_path)
    monkeypatch.setattr(metrics.Classifier, "features", features)
    looked(monitor, state)
    ((images, found),) = seen
    assert torch.equal(found, honest(monitor.extractor, images))


def test_the_critic_is_asked_about_held_out_data_training_images_and_samples(tmp_path: Path):
    """At each level, with each noise. Of a ratio that knows them: its sign is that of what it is shown."""
    config = one_step(onestep__measured=50)
    monitor, state = watched(config, tmp_path)
    _, labels = read_all(open_dataset("digits:test"))
    ratio = critic_of(state).ratio
    assert ratio is not None
    seen: list[tuple[int, list[float], Tensor]] = []
    noises: list[Tensor] = []

    def asked(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((len(x_t), t.unique().tolist(), y))
        noises.append(x_t)
        return torch.full((len(x_t),), 3.0 if asked_about(len(seen) - 1) != "samples" else -3.0)

    ratio.forward = asked  # type: ignore[method-assign]
    found = looked(monitor, state)
    assert [count for count, _, _ in seen] == [50] * 3 * NOISES * 5
    assert [t for _, t, _ in seen] == [[pytest.approx(level)] for level in LEVELS for _ in range(3 * NOISES)]
    of_training = read_all(open_dataset("digits"), np.linspace(0, 1436, PROBE).round().astype(int))[1]
    of = {"held out": labels[:50], "training": of_training[:50], "samples": monitor.labels}
    for k, (_, _, y) in enumerate(seen):
        assert y.tolist() == of[asked_about(k)].tolist()
    assert found["auc"] == found["auc_seen"] == [1.0] * 5
    assert found["calibration"] == [pytest.approx(1 - 1 / (1 + math.exp(-3)), rel=1e-4)] * 5
    assert (found["logit_real"], found["logit_fake"]) == ([3.0] * 5, [-3.0] * 5)
    # All have the same noises at all levels: the difference of any two is that of their clean latents, times the level.
    points = torch.stack(noises).unflatten(0, (5, 3, NOISES))
    clean = (points - points[:, 2:]) / torch.tensor(LEVELS).view(5, 1, 1, 1, 1, 1)
    torch.testing.assert_close(clean, clean[:1, :, :1].expand_as(clean), atol=1e-3, rtol=1e-3)
    assert NOISES > 1
    assert not torch.allclose(points[:, :, 0], points[:, :, 1])


def asked_about(call: int) -> str:
    """What the ratio network's calls of a measurement are about, in turn; each has one for each noise."""
    return ("held out", "training", "samples")[call // NOISES % 3]


@pytest.mark.parametrize("measured", [20, 1000])
def test_a_probe_is_small(tmp_path: Path, measured: int, monkeypatch: pytest.MonkeyPatch):
    """However many samples are measured: each level takes so many values of each, with each noise, and no more."""
    monitor, state = watched(one_step(onestep__measured=measured), tmp_path)
    ratio, counted = critic_of(state).ratio, list[int]()
    assert ratio is not None
    honest = ratio.forward

    def asked(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        counted.append(len(x_t))
        return honest(x_t, t, y)

    monkeypatch.setattr(ratio, "forward", asked)
    looked(monitor, state)
    assert sum(counted) == len(LEVELS) * NOISES * 3 * min(PROBE, measured)
    assert NOISES * PROBE <= 512


def test_images_seen_are_told_from_those_held_out(tmp_path: Path):
    """By a ratio that knows the training images by heart: of all others it says that they are samples."""
    monitor, state = watched(one_step(onestep__measured=50), tmp_path)
    ratio, calls = critic_of(state).ratio, list[int]()
    assert ratio is not None

    def asked(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x_t))
        return torch.full((len(x_t),), 2.0 if asked_about(len(calls) - 1) == "training" else -2.0)

    ratio.forward = asked  # type: ignore[method-assign]
    found = looked(monitor, state)
    assert (found["auc"], found["auc_seen"]) == ([0.5] * 5, [1.0] * 5)
    assert found["logit_real"] == [-2.0] * 5, "all else is about data held out"
    assert found["calibration"] == [pytest.approx(0.5 - 1 / (1 + math.exp(2)), rel=1e-4)] * 5


@pytest.mark.parametrize("method", ["score", "dmd"])
def test_without_a_ratio_network_nothing_is_said_of_it(method: str, tmp_path: Path):
    found = looked(*watched(one_step(onestep__method=method), tmp_path))
    assert found.keys() == {"frechet", "class_accuracy", "mean_shift", "contrast", "diversity"}


def test_colours_have_a_saturation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Samples whose channels lie half as far apart as the data's: half of it."""
    images = np.random.default_rng(0).integers(100, 120, (80, 4, 4, 3), dtype=np.uint8)
    images[..., 0] += 60
    np.savez(tmp_path / "images.npz", images=images)
    changes = {"data__source": str(tmp_path / "images.npz"), "data__test": None, "onestep__measured": 20}
    shape = {"network__image_size": (4, 4), "network__channels": 3, "network__classes": 0}
    extractor = metrics.train_classifier(torch.from_numpy(images).permute(0, 3, 1, 2), None, classes=0, epochs=1)
    monkeypatch.setattr(one_step_monitor, "extractor_for", lambda data, say, device: extractor)
    monitor, state = watched(one_step(**changes, **shape), tmp_path)
    real, _ = read_all(open_data(monitor.run.config.data)[0])
    centre = real.float().mean(1, keepdim=True)
    paler = (centre + (real - centre) / 2).round() / 127.5 - 1
    monkeypatch.setattr(type(state.network), "decode", lambda self, z: paler[: len(z)])
    found = looked(monitor, state)
    assert found["saturation"] == pytest.approx(0.5, abs=0.05)
    assert found["mean_shift"] == pytest.approx(0, abs=0.05)


def test_nothing_that_training_reads_is_touched(tmp_path: Path):
    monitor, state = watched(one_step(), tmp_path)
    training_step(state, *digits(), monitor.run.config)
    before, generator = tensors(state), torch.get_rng_state()
    first = looked(monitor, state)
    assert {name.split(".")[0] for name in differing(before, tensors(state))} == {"best"}, "which no step reads"
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in state.network.parameters())
    assert all(p.requires_grad for p in critic_of(state).parameters())
    assert looked(monitor, state) == first
    best = state.modules["best"]
    assert differing(best.state_dict(), state.averages[-1].state_dict()) == []
    own = {p.data_ptr() for p in state.averages[-1].parameters()}
    assert not own & {p.data_ptr() for p in best.parameters()}, "it stays as it is when the average moves on"


def test_the_best_is_the_first_of_the_least_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monitor, state = watched(one_step(), tmp_path)
    distances = iter([4.0, 5.0, 3.0, 3.0])
    honest = metrics.frechet_from_moments

    def distance(reference: metrics.Moments, made: metrics.Moments) -> float:
        return next(distances) if reference is monitor.selection else honest(reference, made)

    monkeypatch.setattr(metrics, "frechet_from_moments", distance)
    found = []
    for k in range(4):
        looked(monitor, state, 64 * (k + 1))
        found.append((state.counters.best, state.counters.best_images))
    assert found == [(4.0, 64), (4.0, 64), (3.0, 192), (3.0, 192)]


@pytest.mark.parametrize("selects", [False, True])
def test_an_average_is_selected_by_every_fifth_training_image(tmp_path: Path, selects: bool):
    """On samples of seeds that no evaluation has; what is logged is the distance to all."""
    config = one_step(onestep__measured=50, onestep__selects=selects)
    monitor, state = watched(config, tmp_path)
    found = looked(monitor, state)
    real, labels = read_all(open_dataset("digits"))
    chosen = labels[np.linspace(0, len(real) - 1, 50).round().astype(int)].tolist()
    sampler, extractor = Sampler(1, "renoise", start=0.3), metrics.digits_classifier()
    with torch.no_grad():
        latents = state.averages[-1].sample_latents(range(2**40, 2**40 + 50), chosen, sampler)
        made = extractor.features(torch.cat([to_uint8(state.averages[-1].decode(z)) for z in latents]))
    everything, fifth = (metrics.frechet_distance(extractor.features(part), made) for part in (real, real[::5]))
    assert everything != pytest.approx(fifth, rel=1e-3)
    assert found["frechet"] == pytest.approx(everything, rel=1e-4)
    assert state.counters.best == (pytest.approx(fifth, rel=1e-4) if selects else None)
    assert state.published is (state.modules["best"] if selects else state.averages[-1])
    assert ("best" in state.modules) == selects


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.curves, "write", lambda *arguments: None)
        return onefold.train(tiny(training__images=16), tmp_path_factory.mktemp("teacher") / "run", quiet=True)


def test_a_run_that_is_watched_trains_as_one_that_is_not(teacher: Run, tmp_path: Path):
    """But for what is published: neither weights nor the rest of the log know how often it was measured."""
    states: list[dict[str, Tensor]] = []
    for every in (32, 10_000):
        config = one_step_from(teacher.folder, training__health_every=every, training__images=96)
        run = onefold.train(config, tmp_path / str(every), quiet=True)
        found = newest_of(run.folder)
        states.append({name: value for name, value in found.items() if "best." not in name and name[:6] != "model "})
    assert differing(*states) == []
    often, once = ([{k: v for k, v in line.items() if k not in ("onestep", "alarm")} for line in log(tmp_path / name)]
                   for name in ("32", "10000"))  # fmt: skip
    assert often == once
    assert [bool(line.get("onestep")) for line in log(tmp_path / "32")] == [True] * 3
    assert [bool(line.get("onestep")) for line in log(tmp_path / "10000")] == [False, False, True]


# --- the alarm --------------------------------------------------------------------------------------------------------

GOOD = {"mean_shift": 0.1, "contrast": 1.0, "saturation": 1.0, "diversity": 0.9}


def made_up(*measured: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Measurements at 100, 200, … images, with a line without one after each."""
    lines: list[dict[str, Any]] = []
    for k, values in enumerate(measured):
        lines += [{"images": 100 * (k + 1), **({"onestep": {**GOOD, **values}} if values is not None else {})}]
        lines += [{"images": 100 * (k + 1) + 50}]
    return lines


LOW = {"diversity": 0.5}


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (made_up(), None),
        (made_up(LOW), None),
        (made_up({}, {}, {}), None),
        (made_up({}, LOW), None),
        (made_up(LOW, {}), None),
        (made_up(LOW, {}, LOW), None),
        (made_up(LOW, LOW, {}), None),
        (made_up({}, LOW, LOW), "diversity is 0.5, outside 0.6 to 1.5"),
        (made_up(LOW, LOW, LOW), "diversity"),
        (made_up(LOW, None, LOW), "diversity"),
        (made_up(LOW, {"diversity": 1.7}), "diversity is 1.7, outside 0.6 to 1.5"),
        (made_up(LOW, {"contrast": 0.1}), None),
        (made_up(LOW, {**LOW, "contrast": 0.1}), "diversity"),
        (made_up({"contrast": 0.1, **LOW}, {"contrast": 0.1, **LOW}), "contrast"),
    ],
)
def test_two_measurements_beyond_one_bound_are_a_departure(lines: list[dict[str, Any]], word: str | None):
    reason = departure(lines)
    assert (reason is None) if word is None else (reason is not None and word in reason), reason


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("side", [0, 1])
def test_each_bound_is_one_of_its_own(name: str, side: int):
    bound = BOUNDS[name][side]
    out, inside = ((bound + 0.01 * sign) for sign in ((1, -1) if side else (-1, 1)))
    assert departure(made_up({name: bound}, {name: bound})) is None
    assert departure(made_up({name: inside}, {name: inside})) is None
    found = departure(made_up({name: out}, {name: out}))
    assert found == f"{name} is {out:.3g}, outside {BOUNDS[name][0]:g} to {BOUNDS[name][1]:g}"
    lines = made_up({name: out}, {name: out})
    for line in lines:
        line.get("onestep", {}).pop(name, None)
    assert departure(lines) is None, "what is not measured does not depart"


def test_what_was_measured_before_the_generator_moved_does_not_count():
    lines = made_up(LOW, LOW, LOW, LOW)
    found = [departure(lines[: 2 * k], warmup=200) is not None for k in range(5)]
    assert found == [False, False, False, False, True]


@given(st.lists(st.sampled_from([{}, LOW, {"contrast": 2.0}, None]), max_size=8), st.integers(0, 8))
def test_a_resumed_run_judges_as_an_uninterrupted_one(measured: list[dict[str, Any] | None], cut: int):
    """The alarm is a function of the log alone, of which lines before the last two measurements do not matter."""
    whole = made_up(*measured)
    judged = [departure(whole[: k + 1]) for k in range(len(whole))]
    again = [departure([*whole[:cut], *whole[cut : k + 1]]) for k in range(cut, len(whole))]
    assert judged[cut:] == again
    known = [k for k, line in enumerate(whole) if "onestep" in line][-2:]
    if len(known) == 2:
        assert departure(whole[known[0] :]) == departure(whole)


OUT = {"diversity": (5.0, 6.0)}


def test_an_alarm_is_said_once_in_one_line_and_logged(
    teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Measured at 32 images, when the generator has not moved, and at 64, 96 and 128."""
    monkeypatch.setattr(alarm, "BOUNDS", OUT)
    monkeypatch.setattr(loop.ImageProgress, "say", lambda self, line: print(line))
    config = one_step_from(teacher.folder, training__health_every=32, training__images=128)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert ["alarm" in line for line in run.history] == [False, False, True, True]
    (said,) = capsys.readouterr().out.splitlines()
    assert said == (
        f"{run.folder}: the generator departs from the data at 96 images: {run.history[2]['alarm']}; {ONESTEP_CURE}"
    )
    assert run.history[2]["alarm"].startswith("diversity is ")


def test_an_alarm_may_stop_the_run(teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(alarm, "BOUNDS", OUT)
    changes = {"training__health_every": 32, "training__on_collapse": "stop"}
    with pytest.raises(TrainingAborted, match=r"run: the generator departs from the data at 96 images, saved: div"):
        onefold.train(one_step_from(teacher.folder, **changes), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "000000096" / "COMPLETE").exists()


def test_an_alarm_may_be_logged_alone(
    teacher: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(alarm, "BOUNDS", OUT)
    changes = {"training__health_every": 32, "training__on_collapse": "ignore", "training__images": 96}
    run = onefold.train(one_step_from(teacher.folder, **changes), tmp_path / "run", quiet=True)
    assert "alarm" in run.history[-1]
    assert capsys.readouterr().out == ""
