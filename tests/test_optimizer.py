"""Muon against singular values and PyTorch's own, RMSPropW against AdamW, and who optimises what."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from conftest import randomised
from onefold.networks import NetworkConfig, OneFold
from onefold.schedule import Schedule
from onefold.training import optimizer as optimizer_module
from onefold.training.config import Config, TrainingConfig
from onefold.training.optimizer import (
    EPS,
    Muon,
    RMSPropW,
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


def one_by_one(x: Tensor, iterations: int = 5) -> Tensor:
    """The iteration as it is usually written, each on X, of a wide matrix."""
    x = x / x.norm()
    for _ in range(iterations):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def with_values(shape: tuple[int, int], smallest: float) -> Tensor:
    """A matrix whose singular values fall geometrically from 1."""
    u, s, v = torch.linalg.svd(matrix(shape).double(), full_matrices=False)
    return u @ torch.logspace(0, math.log10(smallest), len(s), dtype=s.dtype).diag() @ v


WIDE = pytest.mark.parametrize("shape", [(48, 48), (48, 64), (48, 72), (32, 160)])


@WIDE
@pytest.mark.parametrize("iterations", [1, 3, 4, 5])
def test_iterations_taken_together_are_those_one_by_one(shape: tuple[int, int], iterations: int):
    x = with_values(shape, 1e-3)
    expected = one_by_one(x, iterations)
    torch.testing.assert_close(orthogonalised(x[None], iterations)[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(orthogonalised(x.mT[None], iterations)[0], expected.mT, atol=1e-6, rtol=0)


@WIDE
@pytest.mark.parametrize("smallest", [0.3, 1e-2, 1e-3])
def test_in_bf16_they_lose_no_more(shape: tuple[int, int], smallest: float):
    """Than one by one, but for a hundredth: five on one A would lose all of what is small."""
    x = with_values(shape, smallest)
    expected, half = one_by_one(x), x.bfloat16()
    lost, lost_before = (
        (found.double() - expected).norm() / expected.norm()
        for found in (orthogonalised(half[None])[0], one_by_one(half))
    )
    assert lost < lost_before + 0.01


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


# --- without momentum ---


def both_kinds(beta: float = 0.9) -> list[tuple[list[nn.Parameter], Optimizer]]:
    """RMSPropW and AdamW with β₁ = 0 on equal weights, in two groups of which one decays."""

    def weights() -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
        params = [nn.Parameter(matrix(shape, k)) for k, shape in enumerate([(5, 7), (3, 3), (1, 20)])]
        return params, [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:], "weight_decay": 0.0}]

    (ours, groups), (theirs, others) = weights(), weights()
    plain = AdamW(others, lr=0.02, betas=(0.0, beta), eps=EPS, fused=True)
    return [(ours, RMSPropW(groups, lr=0.02, beta=beta, weight_decay=0.1)), (theirs, plain)]


def stepped(params: list[nn.Parameter], optimizer: Optimizer, k: int, scale: float = 1.0) -> None:
    """The k-th step; the last parameter has no gradient in every third."""
    for j, p in enumerate(params):
        p.grad = None if j == 2 and k % 3 == 0 else scale * matrix(tuple(p.shape), 10 * k + j)
    optimizer.step()


def equal(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1e-12, 1e-8, 1.0, 1e6])
def test_it_is_adamw_without_a_first_moment_to_the_bit(beta: float, scale: float):
    """Also where rates change, where gradients are missing, and where they are as small as eps."""
    (ours, optimizer), (theirs, plain) = both_kinds(beta)
    for k in range(7):
        for each in (optimizer, plain):
            set_rates([each], 1 / (k + 1))
        stepped(ours, optimizer, k, scale)
        stepped(theirs, plain, k, scale)
        assert equal(ours, theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg_sq"], plain.state[other]["exp_avg_sq"])
        assert optimizer.state[one]["step"] == plain.state[other]["step"]
        assert optimizer.state[one].keys() == {"step", "exp_avg_sq"}, "half of AdamW's state"


@pytest.mark.parametrize("bad", [False, True])
def test_it_skips_where_it_is_told_to_the_bit(bad: bool):
    """As the gradient scaler tells; neither weights, moments nor the count of steps change, not even by NaN."""
    (ours, optimizer), (theirs, plain) = both_kinds()
    for k in range(4):
        skip = k == 2
        for params, each in ((ours, optimizer), (theirs, plain)):
            before = (
                [p.detach().clone() for p in params],
                {(id(p), name): value.clone() for p in params for name, value in each.state[p].items()},
            )
            each.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
            stepped(params, each, k, torch.nan if skip and bad else 1.0)
            after = {(id(p), name): value for p in params for name, value in each.state[p].items()}
            assert all(torch.equal(p, old) for p, old in zip(params, before[0], strict=True)) == skip
            if skip:
                assert all(torch.equal(after[key], old) for key, old in before[1].items())
        assert equal(ours, theirs)
    assert all(optimizer.state[p]["step"] == count for p, count in zip(ours, (3, 3, 1), strict=True))


def test_a_guarded_step_skips_it_on_the_device():
    (ours, optimizer), (theirs, plain) = both_kinds()
    for value in (1.0, torch.nan, torch.inf, 1.0):
        for params, each in ((ours, optimizer), (theirs, plain)):
            module = nn.ParameterList(params)
            for j, p in enumerate(params):
                p.grad = value * matrix(tuple(p.shape), j)
            _, skipped = guarded_step(module, [each], clip=0.5)
            assert bool(skipped) == (not math.isfinite(value))
        assert equal(ours, theirs)
    assert all(optimizer.state[p]["step"] == 2 for p in ours)
    assert optimizer.found_inf is None  # type: ignore[attr-defined]


def test_it_goes_on_from_its_state_to_the_bit():
    """As a resumed run: through a file, with the state on no device yet."""
    (whole, optimizer), (_, _) = both_kinds()
    for k in range(3):
        stepped(whole, optimizer, k)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    (resumed, other), (_, _) = both_kinds()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for p, value in zip(resumed, whole, strict=True):
            p.copy_(value)
    for k in range(3, 6):
        stepped(whole, optimizer, k)
        stepped(resumed, other, k)
    assert equal(whole, resumed)
    assert all(not name.startswith("exp_avg") or name == "exp_avg_sq" for p in resumed for name in other.state[p])


def test_its_first_step_is_the_sign_of_the_gradient_however_small():
    """Which AdamW's eps would all but stop: gradients of a generator are means over many values."""
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1e-10, -1e-9, 1.0])
    RMSPropW([p], lr=0.5, beta=0.9, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.5, 0.5, -0.5]), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_has_no_momentum_is_optimised_by_it(kind: str):
    network = OneFold(NETWORK)
    schedule = Schedule(optimizer=kind, weight_decay=0.3, betas=(0.0, 0.95), learning_rate=0.01)
    first, *rest = build_optimizers(network, schedule)
    assert type(first) is RMSPropW
    assert [type(each) for each in rest] == ([Muon] if kind == "muon" else [])
    held = [id(p) for o in (first, *rest) for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    for group in first.param_groups:
        assert (group["lr"], group["beta"]) == (0.01, 0.95)
        for p in group["params"]:
            assert p.ndim > 1 or group["weight_decay"] == 0


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
