"""The parts of a step, with modules of one number: their turns, and what a gradient that is not finite skips."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from helpers_runs import tiny
from onefold.objectives.losses import Losses, Span
from onefold.schedule import Schedule
from onefold.training import step
from onefold.training.phases import Part, Trained
from onefold.training.state import Skips, TrainingState

NAMES = ("a", "b", "c")


class Noise(NamedTuple):
    number: Tensor
    span: Span

    def part(self, start: int, stop: int) -> Self:
        return self._replace(span=self.span.part(start, stop))


class One(nn.Module):
    """A weight, which its loss lowers by 1 at rate 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


@pytest.fixture
def bad() -> set[str]:
    """Names of the parts whose gradient is not finite."""
    return set()


@pytest.fixture
def finished() -> list[tuple[str, bool]]:
    """Which parts have been finished, and whether they were skipped."""
    return []


class Steps:
    """Steps of 4 images with made-up parts; tells what moved in each."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        trained = {trained.name: trained for part in parts for trained in part.trains}
        modules: dict[str, nn.Module] = {name: One() for name in trained}
        optimizers = {name: each.optimizers(modules[name]) for name, each in trained.items()}
        self.state = TrainingState(modules, optimizers, Skips(torch.device("cpu")))
        self.config = tiny(training__batch=4, training__micro_batch=3)

    def take(self) -> str:
        before = {name: module.weight.item() for name, module in self.state.modules.items()}
        self.values = step.training_step(self.state, torch.zeros(4, 1, 8, 8), torch.zeros(4).long(), self.config)
        after = {name: module.weight.item() for name, module in self.state.modules.items()}
        assert all(after[name] in (before[name], before[name] - 1) for name in after)
        return "".join(name for name in after if after[name] != before[name])


@pytest.fixture
def steps(bad: set[str], finished: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def part(name: str, **options: Any) -> Part:
        def draw(batch: int, rng: torch.Generator) -> Noise:
            return Noise(torch.rand((), generator=rng), Span(0, batch, batch))

        def loss(module: One, x: Tensor, y: Tensor, draws: Noise) -> Losses:
            factor = math.nan if name in bad else 1.0
            value = draws.span.share * factor * module.weight
            return Losses(value, {name: draws.span.share * draws.number})

        def finish(modules: Any, skipped: Tensor) -> None:
            finished.append((name, bool(skipped)))

        def optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
            return [SGD(module.parameters(), lr=1.0, fused=True)]  # fused: it reads `found_inf`

        schedule = Schedule(warmup=0, decay=0.0, clip=10.0)
        trained = Trained(name, optimizers, schedule, norm=f"{name}_norm")
        return Part((trained,), (), draw, loss, finish=finish, **options)

    def begin(**options: dict[str, Any]) -> Steps:
        parts = [part(name, **options.get(name, {})) for name in NAMES]
        monkeypatch.setattr(step, "phases_of", lambda config: [SimpleNamespace(start=0, parts=parts)])
        return Steps(parts)

    return begin


# --- what is skipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "moved"), [("a", ""), ("b", "a"), ("c", "ab"), ("ac", ""), ("", "abc")])
def test_a_bad_gradient_skips_its_part_and_those_after_it(
    steps: Any, bad: set[str], finished: list[tuple[str, bool]], which: str, moved: str
):
    taken = steps()
    assert taken.take() == "abc"
    bad.update(which)
    finished.clear()
    assert taken.take() == moved
    assert finished == [(name, name not in moved) for name in NAMES], "and each is told so"
    for name in NAMES:
        assert taken.values[f"{name}_norm"].isfinite() == (name not in which), "gradients are told as they are"
    assert taken.state.read_skips() == (1 if which else 0)
    bad.clear()
    assert taken.take() == "abc", "the next step is as good as any"
    assert (taken.state.read_skips(), taken.state.counters.skipped) == (0, 1 if which else 0)
    assert taken.state.counters.images == 12


def test_each_part_draws_for_itself_and_tells_the_share_of_each_micro_batch(steps: Any):
    taken = steps()
    taken.take()
    rng = TrainingState({}, {}, Skips(torch.device("cpu"))).rng(taken.config.training.seed, torch.device("cpu"))
    expected = [torch.rand((), generator=rng).item() for _ in NAMES]
    assert [taken.values[name].item() for name in NAMES] == pytest.approx(expected)
    assert len(set(expected)) == 3


# --- turns ------------------------------------------------------------------------------------------------------------


def test_parts_begin_and_take_turns(steps: Any):
    taken = steps(b={"start": 8}, c={"start": 4, "every": 3})
    assert [taken.take() for _ in range(9)] == ["a", "a", "abc", "ab", "ab", "abc", "ab", "ab", "abc"]


def test_a_row_of_bad_steps_ends_with_a_whole_one_alone(steps: Any, bad: set[str]):
    """Of parts that have begun: before that, a step without them is whole."""
    taken = steps(c={"start": 8, "every": 2})
    rows: list[int] = []
    for which in ("a", "", "a", "c", "", "c", "", ""):
        bad.clear()
        bad.update(which)
        taken.take()
        rows.append(taken.state.read_skips())
    assert rows == [1, 0, 1, 2, 2, 3, 3, 0]


@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 6), st.integers(1, 60))
def test_updates_are_those_of_a_simulated_loop(batch: int, start: int, every: int, steps: int):
    def unused(*arguments: Any) -> Any:
        raise AssertionError

    part = Part((Trained("a", unused, Schedule()),), (), unused, unused, start=start, every=every)
    made, images = 0, 0
    for number in range(1, steps + 1):
        turn = number % every == 0 and images >= start
        made += turn
        assert part.has_turn(images, batch) == turn
        assert part.updates(images, batch, start) == made
        images += batch
