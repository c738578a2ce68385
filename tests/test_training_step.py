import inspect
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onefold
from helpers_runs import batch, differing, fresh, newest, on_towards, tensors, tiny
from onefold.cli import run as command
from onefold.errors import TrainingAborted
from onefold.objectives.losses import Losses
from onefold.training import latent_diffusion, loop
from onefold.training.checkpoint import checkpoints
from onefold.training.config import Config
from onefold.training.optimizer import Muon
from onefold.training.phases import phases_of
from onefold.training.state import Counters, TrainingState
from onefold.training.step import accumulate, training_step


def advanced(config: Config, steps: int = 3) -> TrainingState:
    """A state after some steps, so that momenta and averages hold something."""
    state = fresh(config)
    for k in range(steps):
        training_step(state, *batch(config.training.batch, start=100 * k), config)
    return state


def accumulated(state: TrainingState, config: Config) -> dict[str, Tensor]:
    """Leave the gradient of the next step's only part on the weights; what the loss tells."""
    (part,) = phases_of(config)[0].parts
    x, y = batch()
    draws = part.draw(len(x), state.rng(config.training.seed, x.device))
    return accumulate(state, part, x, y, draws, config.training)


def gradient(state: TrainingState) -> Tensor:
    return torch.cat([p.grad.flatten() for p in state.network.parameters() if p.grad is not None])


class Poison:
    """The objective, but for calls (1, 2, …) of which `when` says true: their loss is multiplied by `value`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], value: float = float("nan")):
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.when, self.value, self.honest = when, value, latent_diffusion.self_distillation
        monkeypatch.setattr(latent_diffusion, "self_distillation", self)

    def __call__(self, network, target, x, y, draws, objective) -> Losses:
        self.calls.append((x.clone(), draws.eps.clone()))
        losses = self.honest(network, target, x, y, draws, objective)
        return losses._replace(total=losses.total * self.value) if self.when(len(self.calls)) else losses


# --- what a step is a function of -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_seed_and_images_make_the_same_step(optimizer: str):
    config = tiny(training__optimizer=optimizer)
    first, second = advanced(config), advanced(config)
    torch.manual_seed(7)  # the global generator has no part in it
    values = [training_step(state, *batch(), config) for state in (first, second)]
    assert differing(tensors(first), tensors(second)) == []
    assert first.counters == second.counters
    assert differing(*values) == []


def test_draws_differ_with_seed_position_and_rollbacks():
    state = fresh(tiny())

    def drawn(seed: int, images: int, rollbacks: int) -> float:
        state.counters.images, state.counters.rollbacks = images, rollbacks
        return torch.randn((), generator=state.rng(seed, torch.device("cpu"))).item()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 16, 0), (0, 0, 1)]
    assert len({drawn(*place) for place in places}) == len(places)
    assert drawn(0, 0, 0) == drawn(0, 0, 0)


def test_a_step_uses_those_draws(monkeypatch: pytest.MonkeyPatch):
    seen = Poison(monkeypatch, lambda call: False)
    for config, images in ((tiny(), 0), (tiny(), 16), (tiny(training__seed=1), 0)):
        state = fresh(config)
        state.counters.images = images
        training_step(state, *batch(), config)
    (_, a), (_, b), (_, c) = seen.calls
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_another_seed_starts_from_other_weights():
    assert "network.patches_in.weight" in differing(tensors(fresh(tiny())), tensors(fresh(tiny(training__seed=1))))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    advanced(tiny(), steps=1)
    assert torch.equal(torch.get_rng_state(), before)


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 5, 8, 15])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batches_are_one_batch(micro: int, optimizer: str):
    """5 and 15 do not divide the batch of 16: the last micro-batch is smaller and has to weigh less."""
    changes = {"training__optimizer": optimizer, "training__muon_rate": 2e-3}
    changes |= {"objective__draws": 2, "objective__flip": True}
    whole, cut = tiny(**changes), tiny(**changes, training__micro_batch=micro)
    one, two = advanced(whole), advanced(whole)

    parts, cut_parts = accumulated(one, whole), accumulated(two, cut)
    assert parts.keys() == cut_parts.keys() == {"reconstruction", "denoising"}
    for name, value in parts.items():
        torch.testing.assert_close(cut_parts[name], value, rtol=1e-5, atol=1e-7)
    assert (gradient(one) - gradient(two)).norm() <= 1e-5 * gradient(one).norm()

    one, two = advanced(whole), advanced(whole)
    training_step(one, *batch(), whole)
    training_step(two, *batch(), cut)
    assert one.counters == two.counters
    moved = tensors(one)
    for name, value in tensors(two).items():
        if name.startswith(("network", "average")):
            torch.testing.assert_close(value, moved[name], rtol=0, atol=1e-6, msg=name)


# --- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("micro", "bad_call"), [(None, 1), (5, 4)])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, value: float, micro: int | None, bad_call: int
):
    """The averages go on towards the weights that stand still."""
    config = tiny(training__optimizer=optimizer, training__micro_batch=micro)
    state = advanced(config)
    images = state.counters.images
    before = tensors(state) | on_towards(state, images + 16, config)
    assert differing(tensors(state), before)
    with monkeypatch.context() as patch:
        Poison(patch, lambda call: call == bad_call, value)
        values = training_step(state, *batch(), config)
    assert not torch.isfinite(values["gradient_norm"])
    assert differing(before, tensors(state)) == []
    assert all(p.grad is None for p in state.network.parameters())
    assert counted(state) == (images + 16, 1, 1)

    training_step(state, *batch(), config)
    assert counted(state) == (images + 32, 1, 0)
    assert "network.patches_in.weight" in differing(before, tensors(state))


def counted(state: TrainingState) -> tuple[int, int, int]:
    """Images, skipped steps, and how many of them in a row."""
    assert state.read_skips() == state.counters.skipped_in_row
    return state.counters.images, state.counters.skipped, state.counters.skipped_in_row


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_step_of_all_may_be_skipped(monkeypatch: pytest.MonkeyPatch, optimizer: str):
    """The next one is then what the first one would have been."""
    config = tiny(training__optimizer=optimizer)
    state, other = fresh(config), fresh(config)
    start = tensors(state)
    with monkeypatch.context() as patch:
        Poison(patch, lambda call: True)
        training_step(state, *batch(), config)
    assert differing(start, {name: value for name, value in tensors(state).items() if name in start}) == []
    other.counters.images = 16
    for each in (state, other):
        training_step(each, *batch(), config)
    assert differing(tensors(state), tensors(other)) == []
    assert (counted(state), counted(other)) == ((32, 1, 0), (32, 0, 0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_bad_number_of_the_gradient_is_enough(optimizer: str):
    config = tiny(training__optimizer=optimizer)
    state = advanced(config)
    before = tensors(state) | on_towards(state, state.counters.images + 16, config)
    only_one = torch.zeros_like(state.network.roles.weight)
    only_one[1, 3] = torch.nan
    state.network.roles.weight.register_hook(lambda gradient: gradient + only_one)
    training_step(state, *batch(), config)
    assert differing(before, tensors(state)) == []
    assert counted(state)[1:] == (1, 1)


def test_skipped_steps_do_not_enter_the_logged_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    Poison(monkeypatch, lambda call: call in (2, 3, 4))
    run = onefold.train(tiny(), tmp_path / "run", quiet=True)
    first, second = run.history[:2]
    assert first["skipped"] == 1
    assert second["skipped"] == 3
    assert 0 < first["reconstruction"] < 10
    assert "reconstruction" not in second, "both steps of this line were skipped"
    assert all(number is not None and number == number for line in run.history[2:] for number in line.values())


def test_ten_in_a_row_go_back_to_a_checkpoint_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A checkpoint after 15 steps, then a good one, ten bad ones, and again 15 good ones from the checkpoint.

    The host looks after every second step, when it writes a log line.
    """
    config = tiny(training__images=480, training__checkpoint_every=240)
    seen = Poison(monkeypatch, lambda call: 17 <= call <= 26)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert len(seen.calls) == 26 + 15
    counters = json.loads((checkpoints(run.folder)[-1] / "state.json").read_text())["counters"]
    assert counters == asdict(Counters(images=480, skipped=10, rollbacks=1))
    # The 16th step is repeated with the same images and other noise.
    (x, eps), (x_again, eps_again) = seen.calls[15], seen.calls[26]
    assert torch.equal(x, x_again)
    assert not torch.equal(eps, eps_again)


def test_the_host_looks_every_ten_steps_at_the_latest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No log lines, checkpoints after 25 and 50 steps, looks after 30 and 40: there, 15 were skipped in a row."""
    config = tiny(training__images=800, training__checkpoint_every=400, training__log_every=100_000)
    seen = Poison(monkeypatch, lambda call: 26 <= call <= 40)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert len(seen.calls) == 40 + 25
    counters = json.loads((checkpoints(run.folder)[-1] / "state.json").read_text())["counters"]
    assert counters == asdict(Counters(images=800, skipped=15, rollbacks=1))


def test_ten_in_a_row_are_borne_if_a_good_one_follows_before_the_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = Poison(monkeypatch, lambda call: 17 <= call <= 29)
    config = tiny(training__images=480, training__checkpoint_every=240, training__log_every=100_000)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert len(seen.calls) == 30
    assert run.history[-1]["skipped"] == 13


def test_a_roll_back_is_made_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The state that training goes on with is the same modules, so that there are never two of them in memory."""
    Poison(monkeypatch, lambda call: 17 <= call <= 26)
    honest, seen = loop.training_step, []

    def step(state: TrainingState, *rest: Any) -> dict[str, Tensor]:
        seen.append((state.counters.rollbacks, [state, *state.modules.values(), *state.network.parameters()]))
        return honest(state, *rest)

    monkeypatch.setattr(loop, "training_step", step)
    onefold.train(tiny(training__images=480, training__checkpoint_every=240), tmp_path / "run", quiet=True)
    assert {rollbacks for rollbacks, _ in seen} == {0, 1}
    assert all(a is b for _, objects in seen for a, b in zip(objects, seen[0][1], strict=True))


@pytest.mark.parametrize("every", [240, 256])
def test_the_log_after_a_roll_back_has_each_line_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: int):
    """None that was abandoned and none twice: at 256 images there are a line and the checkpoint it goes back to."""
    Poison(monkeypatch, lambda call: 17 <= call <= 26)
    run = onefold.train(tiny(training__images=480, training__checkpoint_every=every), tmp_path / "run", quiet=True)
    assert [line["images"] for line in run.history] == list(range(32, 481, 32))
    assert run.history[-1]["skipped"] == 10


def test_a_roll_back_passes_over_a_checkpoint_that_a_signal_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Steps fail from the 17th on for good; a signal at the 20th saves. The last good one is that of the 15th."""
    config = tiny(training__images=960, training__checkpoint_every=240)
    seen = Poison(monkeypatch, lambda call: call > 16)
    honest, signal = loop.training_step, {20}

    def signalled(state: TrainingState, *rest: Any) -> dict[str, Tensor]:
        if len(seen.calls) + 1 in signal:
            os.kill(os.getpid(), 15)
        return honest(state, *rest)

    monkeypatch.setattr(loop, "training_step", signalled)
    with pytest.raises(loop.Interrupted):
        onefold.train(config, tmp_path / "run", quiet=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000000240", "000000320"]
    with pytest.raises(TrainingAborted):
        onefold.train(None, tmp_path / "run", resume=True, quiet=True)
    again = [k for k, (x, _) in enumerate(seen.calls) if k > 20 and torch.equal(x, seen.calls[15][0])]
    assert again, "it went back to 240 images, and saw the 16th batch again"


def test_a_roll_back_passes_over_checkpoints_made_while_steps_were_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Steps fail from the fifth on; at 96 images, in their midst, a checkpoint is due. The last good one is at 48."""
    seen = Poison(monkeypatch, lambda call: 5 <= call <= 14)
    onefold.train(tiny(training__images=320), tmp_path / "run", quiet=True)
    assert len(seen.calls) == 14 + (320 - 48) / 16
    assert torch.equal(seen.calls[14][0], seen.calls[3][0])


def test_ten_in_a_row_again_end_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = Poison(monkeypatch, lambda call: call > 16)
    with pytest.raises(TrainingAborted) as caught:
        onefold.train(tiny(training__images=960, training__checkpoint_every=240), tmp_path / "run", quiet=True)
    assert len(seen.calls) == 16 + 10 + 11, "it goes back by one step and looks after every second"
    assert "11 steps in a row had no finite gradient at 416 images" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    # What was good is still there, and published.
    assert checkpoints(tmp_path / "run")[-1].name == "000000240"
    assert all(torch.isfinite(value).all() for value in newest(tmp_path / "run").values())
    onefold.OneFold.from_pretrained(tmp_path / "run")


def test_without_a_checkpoint_ten_in_a_row_end_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = Poison(monkeypatch, lambda call: call > 2)
    with pytest.raises(TrainingAborted):
        onefold.train(tiny(training__checkpoint_every=100_000, training__images=3200), tmp_path / "run", quiet=True)
    assert len(seen.calls) == 2 + 10
    assert checkpoints(tmp_path / "run") == []


def test_nine_in_a_row_are_borne(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = Poison(monkeypatch, lambda call: 6 <= call <= 14)
    run = onefold.train(tiny(training__images=320), tmp_path / "run", quiet=True)
    assert len(seen.calls) == 20
    assert run.history[-1]["skipped"] == 9


def test_the_command_exits_with_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Poison(monkeypatch, lambda call: True)
    sizes = {"network.width": 32, "network.depth": 1, "network.heads": 2, "training.images": 320, "training.batch": 16}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert command(["train", "digits", "--out", str(tmp_path / "run"), "--quiet", *options]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"onefold: {tmp_path / 'run'}: ")
    assert captured.out == ""


# --- rate, averages, precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("images", "factor"), [(0, 0.5), (16, 1.0), (80, 1.0), (96, 0.8), (144, 0.2), (160, 0.0)])
def test_the_learning_rate_follows_the_images(optimizer: str, images: int, factor: float):
    """Warm-up over 32 images, then 1, then a fall over the last half of 160."""
    config = tiny(training__optimizer=optimizer)
    state = fresh(config)
    state.counters.images = images
    training_step(state, *batch(), config)
    for each in state.optimizers["network"]:
        peak = 0.02 if isinstance(each, Muon) else 2e-3
        assert [group["lr"] for group in each.param_groups] == pytest.approx([peak * factor] * len(each.param_groups))
    assert config.training.rate_factor(images, 16) == pytest.approx(factor)


def test_a_rate_of_zero_moves_nothing():
    config = tiny()
    state = advanced(config)
    state.counters.images = 160
    before = {name: p.clone() for name, p in state.network.named_parameters()}
    training_step(state, *batch(), config)
    assert differing(before, dict(state.network.named_parameters())) == []


def test_averages_have_half_lives_in_images():
    config = tiny(training__ema_half_lives=(8, 32, 1000))
    state = fresh(config)
    expected = [state.network.patches_in.weight.detach().double() for _ in range(3)]
    for k in range(6):
        training_step(state, *batch(start=16 * k), config)
        images = 16 * (k + 1)
        for which, half_life in enumerate((8, 32, 1000)):
            survival = 0.5 ** (16 / min(half_life, 0.1 * images))
            w = state.network.patches_in.weight.detach().double()
            expected[which] = survival * expected[which] + (1 - survival) * w
    for average, value in zip(state.averages, expected, strict=True):
        torch.testing.assert_close(average.patches_in.weight.double(), value, rtol=0, atol=1e-6)
        assert not any(p.requires_grad for p in average.parameters())
    assert state.published is state.averages[-1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_precisions_train(optimizer: str):
    made = {}
    for precision in ("float32", "bfloat16"):
        config = tiny(training__optimizer=optimizer, training__precision=precision)
        state = advanced(config)
        before = tensors(state)
        values = training_step(state, *batch(), config)
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert all(torch.isfinite(value) for value in values.values())
        assert {value.dtype for value in tensors(state).values()} == {torch.float32}
        assert "network.trunk.blocks.0.swiglu.project_in.weight" in differing(before, tensors(state))
        made[precision] = values
    assert not torch.equal(made["float32"]["reconstruction"], made["bfloat16"]["reconstruction"]), "autocast acts"
    for name, value in made["float32"].items():
        torch.testing.assert_close(made["bfloat16"][name], value, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_fall_on_digits(optimizer: str):
    config = tiny(training__optimizer=optimizer, training__images=6400, training__batch=32)
    state = fresh(config)
    losses: list[tuple[float, float]] = []
    for k in range(40):
        values = training_step(state, *batch(32, start=32 * k), config)
        losses.append((values["reconstruction"].item(), values["denoising"].item()))
    first, last = torch.tensor(losses[:5]).mean(0), torch.tensor(losses[-5:]).mean(0)
    assert last[0] < 0.4 * first[0], losses
    assert last[1] < 0.8 * first[1], losses


def test_training_can_be_read_at_once():
    assert len(inspect.getsource(training_step).splitlines()) < 40
    assert len(inspect.getsource(loop.Trainer.train).splitlines()) < 25
