"""Muon against singular values and PyTorch's own, and who optimises what."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conftest import randomised
from onefold.networks import NetworkConfig, OneFold
from onefold.schedule import Schedule
from onefold.training import optimizer as optimizer_module
from onefold.training.config import Config, TrainingConfig
from onefold.training.optimizer import (
    Muon,
    build_optimizers,
    guarded_step,
    orthogonalised,
    set_rates,
)
from onefold.training.phases import phases_of

SHAPES = pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 12), (33, 7)])


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Muon ---


@SHAPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_singular_values_become_about_one_and_frames_stay(shape: tuple[int, int], scale: float):
    """… if they are at least 1 % of their norm: smaller ones take more iterations."""
    u, s, v = torch.linalg.svd(matrix(shape), full_matrices=False)
    x = scale * u @ s.clamp(min=0.01 * s.norm()).diag() @ v
    turned = u.T @ orthogonalised(x[None])[0] @ v.T  # diagonal, if the frames are kept
    values = turned.diagonal()
    torch.testing.assert_close(turned, values.diag(), atol=1e-3, rtol=0)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_one_iteration_is_the_quintic():
    s = torch.tensor([3.0, 2.0, 0.5])
    x = s / s.norm()
    expected = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(orthogonalised(s.diag()[None], 1)[0], expected.diag(), atol=1e-5, rtol=1e-5)


def test_a_zero_gradient_moves_nothing():
    assert (orthogonalised(torch.zeros(2, 3, 4)) == 0).all()


@SHAPES
def test_stacked_matrices_are_those_one_by_one(shape: tuple[int, int]):
    stack = torch.stack([matrix(shape, seed) * 10.0**seed for seed in range(4)])
    for one, together in zip(stack, orthogonalised(stack), strict=True):
        torch.testing.assert_close(orthogonalised(one[None])[0], together, atol=1e-5, rtol=1e-5)


def descend(make, shapes: list[tuple[int, int]], steps: int = 5) -> list[Tensor]:
    """Weights after some steps whose gradients are given numbers."""
    params = [nn.Parameter(matrix(shape, k)) for k, shape in enumerate(shapes)]
    optimizer = make(params)
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = matrix(tuple(p.shape), 100 * step + k + 7)
        optimizer.step()
    return [p.detach() for p in params]


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_muon_of_pytorch(shape: tuple[int, int], dtype: torch.dtype):
    """PyTorch iterates in bf16, hence the tolerance: 4 % of the way that the weights go."""
    theirs = pytest.importorskip("torch.optim").__dict__.get("Muon") or pytest.skip("torch before 2.9")
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    ours = descend(lambda p: Muon(p, dtype=dtype, **options), [shape])[0]
    expected = descend(lambda p: theirs(p, nesterov=True, adjust_lr_fn="original", **options), [shape])[0]
    way = (expected - matrix(shape)).norm()
    assert (ours - expected).norm() < 0.04 * way


def test_matrices_of_several_shapes_do_not_disturb_each_other():
    shapes = [(8, 8), (24, 8), (8, 8), (8, 24), (24, 8)]
    together = descend(lambda p: Muon(p, lr=0.1, weight_decay=0.1), shapes)
    for k, moved in enumerate(together):
        alone = descend_alone(k, shapes)
        torch.testing.assert_close(moved, alone, atol=1e-5, rtol=1e-5)


def descend_alone(k: int, shapes: list[tuple[int, int]]) -> Tensor:
    """The k-th matrix of `descend`, with all the others left without a gradient."""

    class Only(Muon):
        def step(self, closure=None) -> None:
            for j, p in enumerate(self.param_groups[0]["params"]):
                p.grad = p.grad if j == k else None
            super().step()

    moved = descend(lambda p: Only(p, lr=0.1, weight_decay=0.1), shapes)
    for j, shape in enumerate(shapes):
        assert j == k or torch.equal(moved[j], matrix(shape, j))  # nothing moves without a gradient, not by decay
    return moved[k]


def test_first_step_is_the_scaled_orthogonal_factor_after_decay():
    p = nn.Parameter(matrix((32, 8)))
    p.grad = matrix((32, 8), 1)
    Muon([p], lr=0.1, momentum=0.95, weight_decay=0.2).step()
    expected = (1 - 0.1 * 0.2) * matrix((32, 8)) - 0.1 * math.sqrt(32 / 8) * orthogonalised(p.grad[None])[0]
    torch.testing.assert_close(p.detach(), expected)


# --- steps that are skipped ---

NETWORK = NetworkConfig(width=16, depth=2, heads=2, latent_norm="layer_norm")


def held(network: OneFold, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Weights and the optimisers' state, copied."""
    found = {name: p.detach().clone() for name, p in network.named_parameters()}
    for k, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            found |= {f"{k}.{index}.{name}": value.clone() for name, value in values.items()}
    return found


def begun(kind: str, steps: int) -> tuple[OneFold, list[Optimizer]]:
    """A network after some guarded steps, and its optimisers."""
    network = randomised(OneFold(NETWORK))
    optimizers = build_optimizers(network, Schedule(optimizer=kind, weight_decay=0.1))
    for step in range(steps):
        pull(network, step)
        guarded_step(network, optimizers, clip=1e9)
    return network, optimizers


def pull(network: OneFold, seed: int) -> None:
    """Give every parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_guarded_step_is_the_plain_one_to_the_bit(kind: str):
    guarded, plain = begun(kind, steps=2), begun(kind, steps=2)
    for network, _ in (guarded, plain):
        pull(network, seed=7)
    norm, skipped = guarded_step(*guarded, clip=0.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain[0].parameters(), 0.5))
    assert not skipped
    for optimizer in plain[1]:
        optimizer.step()
    assert same(held(*guarded), held(*plain))
    assert all(p.grad is None for p in guarded[0].parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["latents_in.bias", "trunk.blocks.1.swiglu.project_in.weight"])
def test_a_bad_gradient_changes_nothing_to_the_bit(kind: str, value: float, place: str):
    network, optimizers = begun(kind, steps=2)
    before = held(network, optimizers)
    pull(network, seed=7)
    gradient = network.get_parameter(place).grad
    assert gradient is not None
    gradient.view(-1)[0] = value
    norm, skipped = guarded_step(network, optimizers, clip=1.0)
    assert skipped
    assert not norm.isfinite()
    assert same(held(network, optimizers), before)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_good_gradient_can_be_skipped_too(kind: str):
    network, optimizers = begun(kind, steps=2)
    before = held(network, optimizers)
    for skip in (True, False):
        pull(network, seed=7)
        norm, skipped = guarded_step(network, optimizers, clip=1.0, skip=torch.tensor(skip))
        assert norm.isfinite()
        assert bool(skipped) == skip
        assert same(held(network, optimizers), before) == skip


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nothing_of_a_skipped_step_is_left_for_the_next(kind: str):
    (network, optimizers), other = begun(kind, steps=2), begun(kind, steps=2)
    pull(network, seed=7)
    guarded_step(network, optimizers, clip=1.0, skip=torch.tensor(True))
    for each, its in ((network, optimizers), other):
        pull(each, seed=8)
        for optimizer in its:
            optimizer.step()
    assert same(held(network, optimizers), held(*other))


def test_where_a_device_s_adamw_does_not_know_of_skips_the_host_asks(monkeypatch: pytest.MonkeyPatch):
    """As Metal's: `found_inf` is ignored there."""
    honest = torch._fused_adamw_

    def blind(*args: Any, found_inf: Tensor, **options: Any) -> None:
        honest(*args, found_inf=None, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", blind)
    network, optimizers = begun("adamw", steps=2)
    before = held(network, optimizers)
    pull(network, seed=7)
    guarded_step(network, optimizers, clip=1.0, skip=torch.tensor(True))
    assert not same(held(network, optimizers), before), "a device that does not know"
    monkeypatch.setattr(optimizer_module, "BLIND", {"cpu"})
    network, optimizers = begun("adamw", steps=2)
    pull(network, seed=7)
    guarded_step(network, optimizers, clip=1.0, skip=torch.tensor(True))
    assert same(held(network, optimizers), before)
    assert all(p.grad is None for p in network.parameters())


# --- who optimises what ---


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_of_one_optimizer(kind: str):
    network = OneFold(NETWORK)
    optimizers = build_optimizers(network, Schedule(optimizer=kind))
    assert [type(o).__name__ for o in optimizers] == (["AdamW"] if kind == "adamw" else ["AdamW", "Muon"])
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_decay_and_vectors_embeddings_and_offsets_do_not(kind: str):
    network = OneFold(NETWORK)
    config = Schedule(optimizer=kind, weight_decay=0.3, learning_rate=0.01, muon_rate=0.2, betas=(0.8, 0.9))
    names = {id(p): name for name, p in network.named_parameters()}
    for optimizer in build_optimizers(network, config):
        muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            assert group["lr"] == (0.2 if muon else 0.01)
            assert muon or group["betas"] == (0.8, 0.9)
            for p in group["params"]:
                name = names[id(p)]
                exempt = p.ndim == 1 or "offset" in name or name in ("roles.weight", "labels.weight")
                assert group["weight_decay"] == (0 if exempt else 0.3), name
                in_blocks = name.startswith("trunk.blocks") and ".project_" in name
                assert muon == (kind == "muon" and in_blocks), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_iterates_in_the_precision_of_the_run_and_keeps_float32(precision: str):
    network = randomised(OneFold(NETWORK))
    config = Config(training=TrainingConfig(optimizer="muon", precision=precision))
    _, muon = phases_of(config)[0].optimizers(network)
    assert muon.param_groups[0]["dtype"] == getattr(torch, precision)
    for p in muon.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    muon.step()
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {state["momentum"].dtype for state in muon.state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_steps_reach_every_parameter_that_has_a_gradient(kind: str):
    network = randomised(OneFold(NETWORK)).double()  # in which no change is rounded away
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in build_optimizers(network, Schedule(optimizer=kind)):
        optimizer.step()
    assert all((p != before[name]).all() for name, p in network.named_parameters())


# --- rates ---


def test_rates_are_set_without_memory():
    network = OneFold(NETWORK)
    schedule = Schedule(optimizer="muon", learning_rate=0.01, muon_rate=0.2)
    optimizers = build_optimizers(network, schedule)
    for factor in (0.5, 0.1, 0.0, 0.1, 1.0):
        set_rates(optimizers, factor)
        rates = {type(o): {group["lr"] for group in o.param_groups} for o in optimizers}
        assert rates == {torch.optim.AdamW: {0.01 * factor}, Muon: {0.2 * factor}}
