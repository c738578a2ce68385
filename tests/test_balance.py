"""Balanced losses: their gradients have a stated multiple of the norm of the total's; and parts that make way."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import randomised
from helpers_one_step import begun, both_gradients, critic_of, digits, drawn, one_step, teacher_of
from helpers_runs import differing, tensors, tiny
from onefold.networks import Network
from onefold.objectives.density_ratio import ratio_gradient, ratio_loss
from onefold.objectives.losses import Losses, Span
from onefold.objectives.score_distillation import distillation
from onefold.schedule import Schedule
from onefold.training.phases import Part, Trained, phases_of
from onefold.training.state import Skips, TrainingState
from onefold.training.step import LARGEST_WEIGHT, accumulate, training_step

METHODS: dict[str, dict[str, Any]] = {
    "ratio": {},
    "score": {"onestep__method": "score"},
    "dmd": {"onestep__method": "dmd"},
}


# --- made-up losses ---------------------------------------------------------------------------------------------------


class Of(NamedTuple):
    span: Span

    def part(self, start: int, stop: int) -> Self:
        return self._replace(span=self.span.part(start, stop))


class Two(nn.Module):
    """Two vectors, of which a balanced loss may read one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(3))
        self.own = nn.Parameter(torch.zeros(2))


def accumulated(
    total: tuple[list[float], list[float]],
    balanced: Mapping[str, tuple[list[float], list[float] | None]],
    multiples: Mapping[str, float],
    micro: int | None = None,
    begin: int = 0,
) -> tuple[Two, dict[str, Tensor]]:
    """The module after the gradient of losses that are linear in its weights, on six images; and what is told.

    Balanced losses take images from `begin` on alone.
    """

    def unused(*arguments: Any) -> Any:
        raise AssertionError

    def loss(module: Two, x: Tensor, y: Tensor, draws: Of) -> Losses:
        of_total = module.shared @ torch.tensor(total[0]) + module.own @ torch.tensor(total[1])
        found = {}
        inside = max(0, draws.span.stop - max(begin, draws.span.start)) / 6
        for name, (shared, own) in balanced.items():
            value = module.shared @ torch.tensor(shared)
            value = value if own is None else value + module.own @ torch.tensor(own)
            found |= {name: (multiples[name], inside * value)} if inside else {}
        return Losses(draws.span.share * of_total, {}, found)

    part = Part((Trained("two", unused, Schedule()),), (), unused, loss)
    module = Two()
    modules: dict[str, nn.Module] = {"two": module}
    state = TrainingState(modules, {}, Skips(torch.device("cpu")))
    training = tiny(training__batch=6, training__micro_batch=micro).training
    told = accumulate(state, part, torch.zeros(6, 1), torch.zeros(6), Of(Span(0, 6, 6)), training)
    return module, told


numbers = st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=3, max_size=3)
pairs = st.tuples(numbers, numbers.map(lambda v: v[:2]))


def added(module: Two, g: Tensor) -> Tensor:
    """The gradient of the module beside that of the total."""
    assert module.shared.grad is not None
    assert module.own.grad is not None
    return torch.cat([module.shared.grad, module.own.grad]) - g


@given(pairs, pairs, st.floats(0, 4), st.sampled_from([None, 1, 4]), st.integers(0, 5))
def test_its_norm_is_a_multiple_of_the_total_s(total: Any, other: Any, multiple: float, micro: int, begin: int):
    """g + m ‖g‖ h/‖h‖, however many images it is about and however the batch is cut; at most g + 100 h."""
    g, h = (torch.tensor([*first, *second]) for first, second in (total, other))
    h = (6 - begin) / 6 * h
    module, told = accumulated(total, {"kept": other}, {"kept": multiple}, micro, begin)
    torch.testing.assert_close(told["kept_norm"], h.norm(), rtol=1e-4, atol=1e-5)
    norm = min(multiple * g.norm().item(), 100 * h.norm().item())
    expected = norm * h / h.norm() if h.norm() > 0 else h
    torch.testing.assert_close(added(module, g), expected, rtol=1e-3, atol=1e-4)
    if h.norm() > 0:
        assert told["kept_weight"].item() == pytest.approx(norm / h.norm().item(), rel=1e-3, abs=1e-4)


@given(pairs, pairs, st.floats(0.01, 4), st.integers(-20, 0), st.integers(-20, 0), st.sampled_from([None, 4]))
def test_what_has_nearly_no_gradient_has_no_large_weight(
    total: Any, other: Any, multiple: float, of_total: int, of_other: int, micro: int | None
):
    """At any size of either, the weight is m ‖g‖/‖h‖ or 100."""
    g, h = (
        torch.tensor([*first, *second]) * 10.0**size for (first, second), size in ((total, of_total), (other, of_other))
    )
    small = g[:3].tolist(), g[3:].tolist()
    module, told = accumulated(small, {"kept": (h[:3].tolist(), h[3:].tolist())}, {"kept": multiple}, micro)
    weight, norms = told["kept_weight"].item(), [each.double().norm().item() for each in (g, h)]
    assert 0 <= weight <= LARGEST_WEIGHT * (1 + 1e-5)
    if min(norms) > 1e-18:  # squares are still numbers of single precision
        assert weight == pytest.approx(min(LARGEST_WEIGHT, multiple * norms[0] / norms[1]), rel=1e-3)
    torch.testing.assert_close(added(module, g), weight * h, rtol=1e-3, atol=1e-5 * norms[0] + 1e-30)


def test_beside_a_total_without_gradient_it_counts_nothing():
    for other in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0]):
        module, told = accumulated(([0.0] * 3, [0.0] * 2), {"kept": (other, None)}, {"kept": 0.5})
        assert told["kept_weight"] == 0
        assert not added(module, torch.zeros(5)).any()


def test_the_norm_is_taken_in_the_weights_that_it_reaches_alone():
    """A total of norm 5 in these and 12 in the others."""
    module, told = accumulated(([3.0, 0.0, 4.0], [12.0, 0.0]), {"kept": ([0.0, 2.0, 0.0], None)}, {"kept": 0.5})
    assert module.shared.grad is not None
    torch.testing.assert_close(module.shared.grad, torch.tensor([3.0, 2.5, 4.0]))
    assert module.own.grad is not None
    torch.testing.assert_close(module.own.grad, torch.tensor([12.0, 0.0]))
    assert {name: value.item() for name, value in told.items()} == {"kept_norm": 2.0, "kept_weight": 1.25}


def test_several_are_each_a_multiple_of_the_total_alone():
    several = {"one": ([0.0, 1.0, 0.0], None), "two": ([0.0, 0.0, 9.0], None)}
    module, told = accumulated(([4.0, 0.0, 0.0], [0.0, 0.0]), several, {"one": 1.0, "two": 2.0})
    assert module.shared.grad is not None
    torch.testing.assert_close(module.shared.grad, torch.tensor([4.0, 4.0, 8.0]))
    assert told.keys() == {"one_norm", "one_weight", "two_norm", "two_weight"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["total", "kept"])
def test_neither_is_hidden_by_the_other_if_it_is_not_finite(where: str, bad: float):
    spoilt = {"total": [1.0, 0.0, 0.0], "kept": [1.0, 0.0, 0.0]} | {where: [bad, 0.0, 0.0]}
    module, _ = accumulated((spoilt["total"], [0.0, 0.0]), {"kept": (spoilt["kept"], None)}, {"kept": 1.0})
    assert module.shared.grad is not None
    assert not module.shared.grad.norm().isfinite()


# --- in one step ------------------------------------------------------------------------------------------------------


def apart(config: Any) -> TrainingState:
    """A state whose generator and critic have weights of their own, none of them zero."""
    state = begun(config)
    randomised(state.network, 2)
    randomised(critic_of(state), 3)
    return state


def gradient(network: Network) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    zero = torch.zeros(())
    return torch.cat([(a.get(name, zero) - b.get(name, zero)).flatten() for name in {**a, **b}])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [4, 512])
def test_upkeep_weighs_alike_whatever_the_method_and_the_size_of_the_latents(channels: int, method: str):
    """Latents of 64 numbers and of 8,192; though the losses' own gradients differ by orders of magnitude."""
    changes = {"network__latent_channels": channels, "onestep__upkeep": 0.5}
    changes |= {"onestep__ratio__penalty": 0.0} if method == "ratio" else {}
    config = one_step(**METHODS[method], **changes)
    state, (x, y) = apart(config), digits()
    draws = drawn(state, config)
    assert draws.eps[0].numel() == 16 * channels
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in {"whole": config, "alone": config.with_changes({"onestep.upkeep": 0.0})}.items():
        told = both_gradients(state, x, y, draws, part)
        found[name] = gradient(state.network)
        critic_of(state).zero_grad()
        assert ("upkeep_norm" in told) == (name == "whole")
    added = difference(found["whole"], found["alone"]).norm()
    reached = {name: value for name, value in found["alone"].items() if not name.startswith("jump.")}
    assert added.item() == pytest.approx(0.5 * difference(reached, {}).norm().item(), rel=2e-3)

    cut = config.with_changes({"training.micro_batch": 5})
    both_gradients(state, x, y, draws, cut)
    other = gradient(state.network)
    assert difference(found["whole"], other).norm() <= 1e-5 * difference(found["whole"], {}).norm()


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("method", ["score", "dmd"])
def test_the_guided_teacher_is_the_combination_of_its_predictions(method: str, w: float):
    """f(∅) + w (f(y) − f(∅)); the student is not guided, and at w = 1 the teacher is asked once."""
    changes = {"onestep__score__guidance": w, "onestep__upkeep": 0.0, "objective__label_dropout": 0.3}
    config = one_step(**METHODS[method], **changes)
    state, (x, y) = apart(config), digits()
    teacher, student = teacher_of(state), critic_of(state).student
    assert student is not None
    draws = drawn(state, config)
    assert 0 < draws.unlabelled.sum() < 16
    sizes: list[int] = []
    honest = teacher.denoise
    with pytest.MonkeyPatch.context() as patch:

        def asked(z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            sizes.append(len(z_t))
            return honest(z_t, t, y)

        patch.setattr(teacher, "denoise", asked)
        both_gradients(state, x, y, draws, config)
    assert sizes == [16 if w == 1 else 32]
    found = gradient(state.network)

    labels, t = torch.where(draws.unlabelled, 10, y), draws.score.t[:, None, None]
    fake = state.network.generate(0.7 * draws.eps, torch.full((16,), 0.3), labels)
    with torch.no_grad():
        x_t = t * fake + (1 - t) * draws.score.eps
        without = teacher.denoise(x_t, draws.score.t, torch.full((16,), 10))
        wanted = without + w * (teacher.denoise(x_t, draws.score.t, labels) - without)
        pull = student.denoise(x_t, draws.score.t, labels) - wanted
        if method == "dmd":
            pull = pull / (fake - wanted).abs().mean((1, 2), keepdim=True)
    (pull * fake).mean().backward()
    expected = gradient(state.network)
    assert difference(found, expected).norm() <= 1e-4 * difference(expected, {}).norm()


@pytest.mark.parametrize("weight", [0.25, 2.0])
@pytest.mark.parametrize("method", ["score", "dmd"])
def test_a_discriminator_s_gradient_is_added_with_its_weight(method: str, weight: float):
    """To that of the scores; of the critic's own losses, each counts once."""
    changes = {"onestep__score__adversarial": weight, "onestep__upkeep": 0.0, "onestep__ratio__penalty": 0.0}
    config = one_step(**METHODS[method], **changes)
    state, (x, y) = apart(config), digits()
    critic, draws = critic_of(state), drawn(state, config)
    told = both_gradients(state, x, y, draws, config)
    assert told.keys() == {"ratio", "calibrated", "student"}
    found, own = gradient(state.network), {n: p.grad for n, p in critic.named_parameters() if p.grad is not None}

    ratio, student = critic.ratio, critic.student
    assert ratio is not None
    assert student is not None
    labels = torch.where(draws.unlabelled, 10, y)
    fake = state.network.generate(0.7 * draws.eps, torch.full((16,), 0.3), labels)
    denoisers, normalised = (teacher_of(state).denoise, student.denoise), method == "dmd"
    error, pull = distillation(*denoisers, fake, labels, draws.score, normalised=normalised)
    pull = pull + weight * ratio_gradient(ratio, fake, labels, draws.ratio, config.onestep.ratio)
    (pull.detach() * fake).mean().backward()
    expected = gradient(state.network)
    assert difference(found, expected).norm() <= 1e-4 * difference(expected, {}).norm()

    z = teacher_of(state).encode(x)
    losses, _ = ratio_loss(ratio.logit, z, fake.detach(), labels, draws.ratio, config.onestep.ratio, scale=ratio.scale)
    critic.zero_grad()
    (error + losses).backward()
    for name, p in critic.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(own[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


# --- parts that make way ----------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 6), st.integers(1, 60))
def test_one_makes_way_for_the_other_in_each_step(batch: int, start: int, every: int, steps: int):
    def unused(*arguments: Any) -> Any:
        raise AssertionError

    other = Part((Trained("a", unused, Schedule()),), (), unused, unused, start=start, every=every)
    part = Part((Trained("a", unused, Schedule()),), (), unused, unused, unless=other)
    turns = [(part.has_turn(k * batch, batch), other.has_turn(k * batch, batch)) for k in range(steps)]
    assert all(one != two for one, two in turns)
    expected = [k * batch >= start and (k + 1) % every == 0 for k in range(steps)]
    assert [two for _, two in turns] == expected


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 16, 40])
def test_the_critic_learns_in_each_step_and_the_generator_in_its_turns(updates: int, warmup: int):
    """Once in each step, from one loss; the generator at every first, second or third after the warm-up."""
    changes = {"network__architecture": "pixels", "onestep__ratio__level_normalised": True}
    config = one_step(**changes, onestep__critic_updates=updates, onestep__critic_warmup=warmup)
    state, called = begun(config), list[str]()
    phase = phases_of(config)[0]
    turns = [k for k in range(9) if 16 * k >= warmup and (k + 1) % updates == 0]
    for k in range(9):
        before = tensors(state)
        values = training_step(state, *digits(start=16 * k), config)
        called.append("both" if "gradient_norm" in values else "critic")
        moved = Counter(name.split(".")[0] for name in differing(before, tensors(state)))
        assert moved["critic"] > 0
        assert (moved["network"] > 0) == (moved["average-0"] > 0) == (k in turns)
    assert called == ["both" if k in turns else "critic" for k in range(9)]
    steps = {
        name: {value["step"].item() for each in optimizers for value in each.state.values()}
        for name, optimizers in state.optimizers.items()
    }
    assert steps == {"critic": {9}, "network": {len(turns)}}
    first, both = phase.parts
    assert both.updates(16 * 8, 16, since=warmup) == len(turns)
    assert first.updates(16 * 8, 16) == 9


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 6), st.integers(0, 60))
def test_updates_are_counted_from_where_a_schedule_begins(batch: int, since: int, every: int, steps: int):
    """Also of a module that two parts train, one in the place of the other."""

    def unused(*arguments: Any) -> Any:
        raise AssertionError

    def part(start: int, unless: Part | None = None) -> Part:
        return Part((Trained("a", unused, Schedule()),), (), unused, unused, start=start, every=every, unless=unless)

    late = part(since)
    turns = sum(late.has_turn(k * batch, batch) for k in range(steps + 1))
    assert late.updates(steps * batch, batch, since) == turns
    instead = Part((Trained("a", unused, Schedule()),), (), unused, unused, unless=late)
    assert instead.updates(steps * batch, batch) == steps + 1


def test_draws_of_a_part_of_the_batch_are_those_of_the_whole():
    """Also in the tuples within."""
    config = one_step(onestep__renoised=0.5)
    draws = drawn(begun(config), config)
    part = draws.part(3, 7)
    assert part.span == Span(3, 7, 16)
    for name in ("eps", "renoised", "s", "mirrored", "unlabelled", "offset"):
        assert torch.equal(getattr(part, name), getattr(draws, name)[3:7])
    for name in ("ratio", "score", "kept"):
        pairs = zip(getattr(part, name), getattr(draws, name), strict=True)
        assert all(torch.equal(one, whole[3:7]) for one, whole in pairs)
    assert not torch.equal(draws.ratio.eps, draws.kept.eps)
    assert not torch.equal(draws.ratio.t, draws.score.t)
