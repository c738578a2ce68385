"""The losses of critic and generator: parts of a batch add up, levels move with the step, divergences from outside."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import onefold
from conftest import randomised
from helpers_one_step import begun, critic_of, digits, drawn, one_step, one_step_from, parts_of, teacher_of
from helpers_runs import differing, newest, tiny
from onefold.errors import UserError
from onefold.objectives import DIVERGENCES
from onefold.objectives.density_ratio import Divergence
from onefold.objectives.losses import Losses
from onefold.training.config import Config
from onefold.training.state import TrainingState
from onefold.training.step import training_step

METHODS: dict[str, dict[str, Any]] = {
    "ratio": {},
    "score": {"onestep__method": "score"},
    "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5},
}


def apart(config: Config) -> TrainingState:
    """A state whose generator and critic have weights of their own, none of them zero."""
    state = begun(config)
    randomised(state.network, 2)
    randomised(critic_of(state), 3)
    return state


def gradient_of(loss: Tensor, module: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


# --- parts of a batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8)
@given(
    cuts=st.sets(st.integers(1, 15), max_size=6),
    share=st.sampled_from([0.0, 0.01, 0.2, 0.45, 1.0]),
    renoised=st.sampled_from([0.0, 0.5]),
)
def test_the_losses_of_parts_add_up(method: str, cuts: set[int], share: float, renoised: float):
    """Values and gradients; wherever the images that keep the codec lie, in one part, in all, or not in some."""
    changes = {"onestep__upkeep_share": share, "onestep__renoised": renoised, "objective__flip": True}
    config = one_step(**METHODS[method], **changes, objective__label_dropout=0.3)
    state, (x, y) = apart(config), digits()
    teacher, critic = teacher_of(state), critic_of(state)
    ends = list(pairwise([0, *sorted(cuts), 16]))
    for part in parts_of(state, config):
        draws, for_both = part.draw(16, torch.Generator().manual_seed(0)), len(part.trains) > 1
        modules = [state.modules[name] for name in part.modules]

        def losses(start: int, stop: int, part=part, modules=modules, draws=draws) -> Losses:
            return part.loss(*modules, x[start:stop], y[start:stop], draws.part(start, stop))

        whole, each = losses(0, 16), [losses(*span) for span in ends]
        total = torch.stack([losses.total for losses in each]).sum()
        torch.testing.assert_close(total, whole.total, rtol=1e-5, atol=1e-6)
        for module in (critic, state.network)[: len(part.trains)]:
            one, other = gradient_of(whole.total, module), gradient_of(total, module)
            assert (one - other).norm() <= 1e-4 * one.norm()
        told = {name for losses in each for name in losses.parts}
        assert told == whole.parts.keys()
        for name in told:
            found = sum(losses.parts.get(name, torch.zeros(())) for losses in each)
            torch.testing.assert_close(found, whole.parts[name], rtol=1e-4, atol=1e-6)
        if for_both:
            kept = {k * 16 // max(1, round(16 * share)) for k in range(max(1, round(16 * share)))} if share else set()
            having = [any(start <= k < stop for k in kept) for start, stop in ends]
            assert ["decoding" in losses.parts for losses in each] == having
            assert ["upkeep" in losses.balanced for losses in each] == having
            if share:
                found = [losses.balanced["upkeep"] for losses in (whole, *each) if losses.balanced]
                assert {multiple for multiple, _ in found} == {config.onestep.upkeep}
                upkeep, *others = (loss for _, loss in found)
                together = torch.stack(others).sum()
                torch.testing.assert_close(together, upkeep, rtol=1e-4, atol=1e-6)
                one, other = (gradient_of(loss, state.network) for loss in (upkeep, together))
                assert (one - other).norm() <= 1e-4 * one.norm()
        else:
            assert not any(losses.balanced for losses in each)
    assert all(p.grad is None for module in (teacher, critic, state.network) for p in module.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one_network", "three_networks", "pixels"])
def test_no_loss_has_a_way_to_the_teacher_nor_the_critic_s_to_the_generator(method: str, kind: str):
    """Nor the upkeep's to the critic; though all could be trained."""
    changes = {"network__architecture": kind, "network__depth": 3, "onestep__renoised": 0.5}
    config = one_step(**METHODS[method], **changes, onestep__upkeep_share=1.0)
    state, (x, y) = apart(config), digits()
    teacher, critic, generator = teacher_of(state).requires_grad_(True), critic_of(state), state.network
    alone, both = parts_of(state, config)

    def reached(loss: Tensor, module: nn.Module) -> bool:
        found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        return any(part is not None for part in found)

    draws = drawn(state, config)
    losses = alone.loss(critic, generator, teacher, x, y, draws)
    assert [reached(losses.total, module) for module in (critic, generator, teacher)] == [True, False, False]
    assert not losses.balanced
    losses = both.loss(critic, generator, teacher, x, y, draws)
    assert [reached(losses.total, module) for module in (critic, generator, teacher)] == [True, True, False]
    _, kept = losses.balanced["upkeep"]
    assert [reached(kept, module) for module in (critic, generator, teacher)] == [False, True, False]
    assert not any(part.requires_grad for part in losses.parts.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["one_network", "three_networks"])
def test_the_upkeep_shares_no_graph_with_the_rest(method: str, kind: str):
    """Either may have its backward pass first, and what it kept in memory is free before the other begins."""
    changes = {"network__architecture": kind, "network__depth": 3, "onestep__upkeep_share": 1.0}
    config = one_step(**METHODS[method], **changes)
    state, (x, y) = apart(config), digits()
    part = parts_of(state, config)[1]
    modules, draws = [state.modules[name] for name in part.modules], drawn(state, config)
    trained = [p for module in modules[:2] for p in module.parameters()]

    def gradients(upkeep_first: bool) -> list[Tensor | None]:
        losses = part.loss(*modules, x, y, draws)
        both = [losses.balanced["upkeep"][1], losses.total]
        found = [torch.autograd.grad(loss, trained, allow_unused=True) for loss in both[:: 1 if upkeep_first else -1]]
        return [*found[0], *found[1]] if upkeep_first else [*found[1], *found[0]]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))


# --- levels -----------------------------------------------------------------------------------------------------------


def means_after(micro: int | None, steps: int = 3) -> Tensor:
    changes = {"onestep__ratio__level_normalised": True, "onestep__ratio__divergence": "forward_kl"}
    config = one_step(**changes, onestep__critic_warmup=0, training__micro_batch=micro)
    state = apart(config)
    for k in range(steps):
        training_step(state, *digits(start=16 * k), config)
    return critic_of(state).levels.means


@pytest.mark.parametrize("micro", [1, 5, 15])
def test_levels_move_once_per_step_whatever_the_micro_batch(micro: int):
    whole, cut = means_after(None), means_after(micro)
    assert ((whole - 1).abs() > 1e-4).any()
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_levels_wait_for_the_generator():
    """The critic alone does not ask them, and of two updates of the critic the one with the generator moves them."""
    config = one_step(onestep__ratio__level_normalised=True, onestep__critic_updates=2)
    state = apart(config)
    moved: list[bool] = []
    for k in range(6):
        before = critic_of(state).levels.means.clone()
        training_step(state, *digits(start=16 * k), config)
        moved.append(not torch.equal(before, critic_of(state).levels.means))
    assert moved == [False, False, False, True, False, True]


# --- divergences from outside -----------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """Twice Jensen–Shannon, under a name of its own."""
    known = DIVERGENCES["jensen_shannon"]
    twice = Divergence(lambda logit: 2 * known.generator_loss(logit), lambda logit: 2 * known.weight(logit))
    monkeypatch.setitem(DIVERGENCES, "twice_jensen_shannon", twice)
    return "twice_jensen_shannon"


def test_a_divergence_of_one_s_own_trains(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of which the generator's gradient is twice the one that it doubles; its run is resumed as it was."""
    monkeypatch.setattr("onefold.training.loop.curves.write", lambda *arguments: None)
    norms: list[Tensor] = []
    for divergence in ("jensen_shannon", own):
        config = one_step(onestep__ratio__divergence=divergence, onestep__critic_warmup=0, onestep__upkeep=0.0)
        norms.append(training_step(apart(config), *digits(), config)["gradient_norm"])
    torch.testing.assert_close(norms[1], 2 * norms[0], rtol=1e-3, atol=0)

    teacher = onefold.train(tiny(training__images=16), tmp_path / "teacher", quiet=True)
    short = {"training__images": 64, "training__keep_last": 9}
    config = one_step_from(teacher.folder, **short, onestep__ratio__divergence=own)
    run = onefold.train(config, tmp_path / "run", quiet=True)
    assert run.config.onestep.ratio.divergence == own
    assert differing(run.network.state_dict(), teacher.network.state_dict())
    whole = newest(run.folder)
    for path in (run.folder / "checkpoints" / "000000064").iterdir():
        path.unlink()
    assert onefold.train(None, run.folder, resume=True, quiet=True).images == 64
    assert differing(whole, newest(run.folder)) == []


def test_without_it_the_run_is_refused_by_its_name(own: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(DIVERGENCES, own)
    with pytest.raises(UserError, match=r"^ratio.divergence: 'twice_jensen_shannon' is not one of reverse_kl, "):
        one_step(onestep__ratio__divergence=own)
