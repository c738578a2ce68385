"""What phases of one's own may bring along: other optimizers, losses through other modules, modules of any kind."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from helpers_runs import batch, differing, fresh, tensors, tiny
from onefold.errors import UserError
from onefold.files import write_tensors
from onefold.networks import Network, build
from onefold.objectives.losses import Losses
from onefold.pictures import curves
from onefold.training import checkpoint
from onefold.training.checkpoint import checkpoints
from onefold.training.latent_diffusion import SelfDistillationPhase
from onefold.training.optimizer import Muon, guarded_step
from onefold.training.phases import Part, Trained, phases_of, register
from onefold.training.step import training_step

pytestmark = pytest.mark.usefixtures("phases_as_before")


# --- optimizers of any kind -------------------------------------------------------------------------------------------


class Blunt(AdamW):
    """A subclass with a step that does not read `found_inf`."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad


@pytest.mark.parametrize(
    "kind",
    [Adam, RMSprop, Blunt, Muon, lambda weights, lr: AdamW(weights, lr=lr, fused=True)],
    ids=["Adam", "RMSprop", "subclass", "Muon", "fused"],
)
def test_no_optimizer_steps_on_a_gradient_that_is_not_finite(kind: Any):
    module = nn.Linear(8, 8, bias=False)
    optimizer = kind(module.parameters(), lr=0.1)
    for value, moves in ((float("nan"), False), (1.0, True), (float("inf"), False)):
        before = module.weight.detach().clone()
        module.weight.grad = torch.full_like(module.weight, value)
        guarded_step(module, [optimizer], 1.0)
        assert torch.equal(module.weight, before) != moves
        assert module.weight.isfinite().all()


def test_no_curves_without_values(tmp_path: Path):
    line = {"images": 16, "health": {"psnr": None}}
    curves.write([line, {**line, "images": 32}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


# --- a loss through another module ------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Scores latents."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 1)


class Judged(SelfDistillationPhase):
    """The network's loss goes through the judge, whose own loss is tiny."""

    @cached_property
    def parts(self) -> Sequence[Part]:
        judge = Trained("judge", adamw, self.schedule, norm="judge_norm")
        network = Trained("network", self.optimizers, self.schedule, self.schedule.ema_half_lives)
        return (
            Part((judge,), ("network",), self.draw, self.judge_loss),
            Part((network,), ("average-0", "judge"), self.draw, self.network_loss),
        )

    def modules(self, network: Network) -> dict[str, nn.Module]:
        return super().modules(network) | {"judge": Judge()}

    def judge_loss(self, judge: Judge, network: Network, x: Tensor, y: Tensor, draws: Any) -> Losses:
        return Losses(draws.span.share * 1e-9 * judge.scores(network.encode(x)).mean(), {})

    def network_loss(self, network: Network, target: Network, judge: Judge, x: Tensor, y: Tensor, draws: Any) -> Losses:
        losses = self.loss(network, target, x, y, draws)
        return Losses(losses.total + draws.span.share * 1e6 * judge.scores(network.encode(x)).mean(), losses.parts)


def adamw(module: nn.Module) -> list[Optimizer]:
    return [AdamW(module.parameters(), lr=1e-3, fused=True)]


def test_a_loss_leaves_no_gradient_in_other_modules():
    register("judged")(Judged)
    config = tiny(phases=("judged",), training__micro_batch=8)
    state = fresh(config)
    for _ in range(3):
        values = training_step(state, *batch(), config)
        assert values["judge_norm"] < 1e-6
    assert all(p.grad is None for module in state.modules.values() for p in module.parameters())


def test_parts_with_different_optimizers_for_one_module_are_refused():
    class Twice(Judged):
        @cached_property
        def parts(self) -> Sequence[Part]:
            judge, network = super().parts
            return judge, network, replace(network, trains=(replace(network.trains[0], optimizers=adamw),))

    class Again(Judged):
        @cached_property
        def parts(self) -> Sequence[Part]:
            return (*super().parts, super().parts[1])

    register("twice")(Twice)
    with pytest.raises(UserError, match=r"^phase 'twice': two parts train 'network' with different optimizers; "):
        phases_of(tiny(phases=("twice",)))
    register("again")(Again)
    assert len(phases_of(tiny(phases=("again",)))[0].parts) == 3


# --- modules of any kind ----------------------------------------------------------------------------------------------


class Queue(nn.Module):
    """Has buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.randn(3))


class Tied(nn.Module):
    """Has one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


class Odd(SelfDistillationPhase):
    def modules(self, network: Network) -> Mapping[str, nn.Module]:  # type: ignore[override]
        return super().modules(network) | {"queue": Queue(), "tied": Tied(), "nothing": nn.Identity()}


def test_modules_with_buffers_only_and_tied_weights_are_saved_and_restored(tmp_path: Path):
    register("odd")(Odd)
    config = tiny(phases=("odd",))
    state, other = fresh(config), fresh(config)
    training_step(state, *batch(), config)
    for name in ("queue", "tied"):
        for value in state.modules[name].state_dict().values():
            value += 1
    path = checkpoint.save(state, config, tmp_path)
    assert load_file(path / "tied.safetensors").keys() == state.modules["tied"].state_dict().keys()
    checkpoint.restore(other, config, path)
    assert differing(tensors(state), tensors(other)) == []
    tied = other.modules["tied"]
    assert isinstance(tied, Tied)
    assert tied.first.weight is tied.second.weight


def test_a_network_of_tied_weights_is_written_by_both_names(tmp_path: Path):
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors({"a": weight, "b": weight.T}, tmp_path / "tied.safetensors")
    written = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(written["a"], weight)
    assert torch.equal(written["b"], weight.T)


# --- checkpoints after a roll-back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [80]), (2, [48, 80]), (9, [16, 48, 80])])
def test_after_a_roll_back_the_future_given_up_is_deleted(tmp_path: Path, keep_last: int, kept: list[int]):
    config = tiny(training__keep_last=9, training__keep_every=112)
    state = fresh(config)
    for images in (16, 48, 96, 112):
        state.counters.images = images
        checkpoint.save(state, config, tmp_path)
    state.counters.images = 80
    checkpoint.save(state, config.with_changes({"training.keep_last": keep_last}), tmp_path)
    assert [int(path.name) for path in checkpoints(tmp_path)] == kept


# --- label vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "rows"),
    [
        (("b", "a", "x"), ("a", "b"), {0: 1, 1: 0, -1: -1}),
        (("p", "q"), ("a", "b"), {-1: -1}),
        (3, 2, {-1: -1}),
        (3, 3, {0: 0, 1: 1, 2: 2, -1: -1}),
    ],
)
def test_the_row_of_no_class_is_copied(ours: Any, theirs: Any, rows: dict[int, int]):
    def with_classes(classes: Any) -> Any:
        names = () if isinstance(classes, int) else classes
        count = classes if isinstance(classes, int) else len(classes)
        return tiny(network__classes=count, network__class_names=names)

    config, source = with_classes(ours), build(with_classes(theirs).network)
    found = phases_of(config)[0].begin_from(source).state_dict()["labels.weight"]
    original = source.state_dict()["labels.weight"]
    same = {(k, j) for k in range(len(found)) for j in range(len(original)) if torch.equal(found[k], original[j])}
    assert same == {(k % len(found), j % len(original)) for k, j in rows.items()}


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_a_notebook_cell_may_register_its_phase_twice():
    def cell() -> type[SelfDistillationPhase]:
        class Cell(SelfDistillationPhase):
            pass

        return register("cell")(Cell)

    config = tiny(phases=("cell",))
    first = cell()
    assert type(phases_of(config)[0]) is first
    second = cell()
    assert type(phases_of(config)[0]) is second is not first
    with pytest.raises(UserError, match=r"^phase 'cell': is already registered"):
        register("cell")(Odd)
