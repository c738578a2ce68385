"""The training step of a one-step generator: what it changes, by what gradient, and where its weights start."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers_one_step import (
    begun,
    both_gradients,
    critic_gradient,
    critic_of,
    digits,
    drawn,
    one_step,
    parts_of,
    teacher_for,
    teacher_of,
)
from helpers_runs import differing, on_towards, tensors
from onefold.networks.pixel_network import PixelNetwork
from onefold.networks.three_networks import ThreeNetworks
from onefold.objectives import one_step as objective
from onefold.objectives.density_ratio import DIVERGENCES, NoiseDraws, ratio_gradient
from onefold.objectives.one_step import OneStepDraws
from onefold.objectives.score_distillation import distillation
from onefold.pixels import mirrored
from onefold.training.config import Config
from onefold.training.state import TrainingState
from onefold.training.step import training_step

METHODS = {
    "ratio": {},
    "score": {"onestep__method": "score"},
    "dmd": {"onestep__method": "dmd"},
    "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5},
}
KINDS = {
    "one": {},
    "three": {"network__architecture": "three_networks", "network__depth": 3},
    "pixels": {"network__architecture": "pixels"},
}


PAIRS = [("one", "ratio"), ("one", "adversarial"), ("three", "score"), ("pixels", "dmd")]


def advanced(config: Config, steps: int = 1) -> TrainingState:
    """A state at 64 images whose moments, averages and critic hold something; the generator has moved."""
    state, at_once = begun(config), config.with_changes({"onestep.critic_warmup": 0})
    for k in range(steps):
        training_step(state, *digits(start=100 * k), at_once)
    state.counters.images = 64
    return state


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those that there are."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def changed(before: dict[str, Tensor], state: TrainingState) -> set[str]:
    """What has changed, by the names of modules and of those that an optimizer is of."""
    return {name.split(".")[0] for name in differing(before, tensors(state))}


# --- who changes what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_each_gradient_reaches_its_own_network_alone(kind: str, method: str):
    config = one_step(**METHODS[method], **KINDS[kind])
    state = advanced(config)
    critic, teacher, (x, y) = critic_of(state), teacher_of(state), digits()
    critic_gradient(state, x, y, drawn(state, config), config)
    assert gradients(state.network) == gradients(teacher) == {}
    alone = gradients(critic)
    assert {name.split(".")[0] for name in alone} == {
        *(["ratio"] if critic.ratio is not None else []),
        *(["student"] if critic.student is not None else []),
    }
    assert all(value.abs().max() > 0 for name, value in alone.items() if name.endswith("entrance.weight"))
    assert ("ratio.scale.logarithm" in alone) == (critic.ratio is not None)
    critic.zero_grad()

    both_gradients(state, x, y, drawn(state, config), config)
    assert gradients(teacher) == {}
    together = gradients(critic)
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert flat(gradients(state.network)).abs().max() > 0
    assert gradients(state.network)["jump.vector"].abs().max() > 0
    assert all(gradients(average) == {} for average in state.averages)


@pytest.mark.parametrize("method", ["ratio", "adversarial"])
def test_while_the_critic_warms_up_the_generator_is_the_teacher(method: str):
    config = one_step(**METHODS[method], onestep__critic_warmup=48)
    state = begun(config)
    teacher = {name: value.clone() for name, value in teacher_of(state).state_dict().items()}
    for k in range(6):
        before = tensors(state)
        values = training_step(state, *digits(start=16 * k), config)
        moved = changed(before, state)
        assert {"critic", "optimizer of critic"} <= moved
        assert ("upkeep_norm" in values) == ("gradient_norm" in values) == (k >= 3)
        if k < 3:
            assert moved == {"critic", "optimizer of critic"}
            for copy in (state.network, *state.averages):
                assert differing(teacher, copy.state_dict()) == []
        else:
            assert moved == {
                "critic",
                "optimizer of critic",
                "network",
                "average-0",
                "average-1",
                "optimizer of network",
            }
        assert state.counters.images == 16 * (k + 1)
    assert differing(teacher, teacher_of(state).state_dict()) == []
    assert not any(p.requires_grad for p in teacher_of(state).parameters())


@pytest.mark.parametrize(("updates", "moving"), [(1, range(2, 10)), (3, [2, 5, 8]), (4, [3, 7])])
def test_the_generator_moves_at_each_of_so_many_steps(updates: int, moving: list[int]):
    config = one_step(**KINDS["pixels"], onestep__critic_updates=updates)
    state = begun(config)
    moved: list[int] = []
    for k in range(10):
        before = tensors(state)
        training_step(state, *digits(start=16 * k), config)
        found = changed(before, state)
        assert "critic" in found
        moved += [k] if "network" in found else []
    assert moved == list(moving)
    assert parts_of(state, config)[1].updates(16 * 9, 16, since=32) == len(moved)


def test_averages_have_half_lives_in_updates_of_the_generator():
    """32 and 64 images are two and four updates of a batch of 16; at first as many as there have been."""
    config = one_step(**KINDS["pixels"], onestep__critic_updates=2)
    state = begun(config)
    name = "body.trunk.blocks.0.attention.project_in.weight"
    expected = [state.network.state_dict()[name].double()] * 2
    n = 0
    for k in range(10):
        values = training_step(state, *digits(start=16 * k), config)
        if "gradient_norm" not in values:
            continue
        n += 1
        w = state.network.state_dict()[name].double()
        survivals = [0.5 ** (1 / min(half_life, n)) for half_life in (2, 4)]
        expected = [s * average + (1 - s) * w for s, average in zip(survivals, expected, strict=True)]
    assert n == 4
    for average, value in zip(state.averages, expected, strict=True):
        torch.testing.assert_close(average.state_dict()[name].double(), value, rtol=0, atol=1e-6)
    assert not torch.equal(*(average.state_dict()[name] for average in state.averages))
    assert state.published is state.averages[-1]


def test_the_critic_s_rate_follows_the_run_and_the_generator_s_begins_when_it_moves():
    """A fall over the last half: of 160 images for the critic, of the 96 that are left for the generator."""
    changes = {"onestep__critic_warmup": 64, "training__decay": 0.5, "training__warmup": 32}
    changes |= {"onestep__scale_rate": 2e-2}
    config = one_step(**KINDS["pixels"], **changes)
    state = begun(config)
    optimizers = [*state.optimizers["network"], *state.optimizers["critic"]]
    assert [optimizer.defaults["lr"] for optimizer in optimizers] == [1e-3, 1e-3, 2e-2], "the last is the scale's"
    ratio = critic_of(state).ratio
    assert ratio is not None
    assert [p is q for p, q in zip(optimizers[2].param_groups[0]["params"], ratio.scale.parameters(), strict=True)]
    rates: list[tuple[float, float]] = []
    for k in range(10):
        training_step(state, *digits(start=16 * k), config)
        groups = [optimizer.param_groups for optimizer in optimizers]
        assert all(len({group["lr"] for group in group_list}) == 1 for group_list in groups)
        assert groups[2][0]["lr"] / 2e-2 == pytest.approx(groups[1][0]["lr"] / 1e-3)
        rates.append((groups[0][0]["lr"] / 1e-3, groups[1][0]["lr"] / 1e-3))
    critic = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    generator = [0.5, 1, 1, 1, 2 / 3, 1 / 3]
    assert [rate for _, rate in rates] == pytest.approx(critic)
    assert [rate for rate, _ in rates][4:] == pytest.approx(generator)


def test_the_same_seed_and_images_make_the_same_step():
    config = one_step(**METHODS["adversarial"])
    first, second = advanced(config), advanced(config)
    torch.manual_seed(7)  # the global generator has no part in it
    values = [training_step(state, *digits(), config) for state in (first, second)]
    assert differing(tensors(first), tensors(second)) == []
    assert first.counters == second.counters
    assert differing(*values) == []


# --- the inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_inputs_are_noised_data_later_than_the_start(share: float, start: float):
    config = one_step(onestep__renoised=share, onestep__start=start)
    draws = drawn(begun(config), config, count=800)
    assert draws.renoised.float().mean().item() == pytest.approx(share, abs=0.06)
    assert draws.s.min() >= start - 1e-6
    assert draws.s.max() <= 1
    assert (draws.s[~draws.renoised] == torch.tensor(start)).all()
    if share:
        assert draws.s[draws.renoised].mean().item() == pytest.approx((1 + start) / 2, abs=0.05)


class Seen:
    """What the generator, the teacher and the critic are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, state: TrainingState) -> None:
        self.generator: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.upkeep: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.encoded: list[Tensor] = []
        self.critic: list[tuple[Tensor, Tensor, Tensor | None, NoiseDraws]] = []
        teacher, network = teacher_of(state), state.network
        generate, encode, together = network.generate, teacher.encode, network.decode_and_denoise
        loss = objective.ratio_loss

        def ratio_loss(ratio: nn.Module, *a: Any, **options: Any) -> Any:
            self.critic.append(a[:4])
            return loss(ratio, *a, **options)

        monkeypatch.setattr(network, "generate", lambda *a: self.generator.append(a) or generate(*a))
        monkeypatch.setattr(network, "decode_and_denoise", lambda *a: self.upkeep.append(a[1:]) or together(*a))
        monkeypatch.setattr(teacher, "encode", lambda x: self.encoded.append(x) or encode(x))
        monkeypatch.setattr(objective, "ratio_loss", ratio_loss)


@pytest.mark.parametrize(("renoised", "start"), [(0.0, 0.3), (0.5, 0.3), (0.5, 0.0)])
def test_data_and_samples_have_the_same_labels_and_the_draws_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, renoised: float, start: float
):
    changes = {"onestep__renoised": renoised, "onestep__start": start, "objective__label_dropout": 0.3}
    config = one_step(**changes, objective__flip=True)
    state, (x, y) = advanced(config), digits()
    draws = drawn(state, config)
    assert 2 < draws.mirrored.sum() < 14
    assert 1 < draws.unlabelled.sum() < 12
    assert draws.renoised.any() == (renoised > 0)
    labels = torch.where(draws.unlabelled, 10, y)
    image = mirrored(x, draws.mirrored)
    z = teacher_of(state).encode(image)
    s = draws.s[:, None, None]
    inputs = torch.where(draws.renoised[:, None, None], s * z, 0.0) + (1 - s) * draws.eps
    fake = state.network.generate(inputs, draws.s, labels).detach()
    with monkeypatch.context() as patch:
        seen = Seen(patch, state)
        critic_gradient(state, x, y, draws, config)
        both_gradients(state, x, y, draws, config)
    assert len(seen.generator) == len(seen.critic) == 2
    for given in seen.generator:
        for found, expected in zip(given, (inputs, draws.s, labels), strict=True):
            assert found is not None
            torch.testing.assert_close(found, expected)
    assert [torch.equal(found, image) for found in seen.encoded] == [True] * 2, "once for each part"
    for real, made, told, noise in seen.critic:
        torch.testing.assert_close(real, z)
        torch.testing.assert_close(made, fake, rtol=1e-4, atol=1e-5)
        assert told is not None
        assert torch.equal(told, labels)
        assert noise is not draws.ratio  # cut into micro-batches, of which there is one
        assert all(torch.equal(a, b) for a, b in zip(noise, draws.ratio, strict=True))
    kept, t = [0, 8], draws.kept.t[:, None, None]  # an eighth of the batch
    ((z_t, level, told),) = seen.upkeep
    torch.testing.assert_close(z_t, (t * z + (1 - t) * draws.kept.eps)[kept])
    assert torch.equal(level, draws.kept.t[kept])
    assert told is not None
    assert torch.equal(told, labels[kept])


def test_critic_and_generator_learn_at_the_same_points(monkeypatch: pytest.MonkeyPatch):
    """From one evaluation of each; a step of the critic alone has draws of its own."""
    config = one_step(onestep__critic_updates=2)
    state = advanced(config)
    seen = Seen(monkeypatch, state)
    values = [training_step(state, *digits(), config) for _ in range(2)]
    assert sorted("gradient_norm" in told for told in values) == [False, True]
    (first, *_), (second, *_) = seen.generator
    assert (first - second).abs().min() > 0
    (*_, noise), (*_, other) = seen.critic
    assert (noise.eps - other.eps).abs().min() > 0


def test_an_unconditional_generator_is_given_no_labels(monkeypatch: pytest.MonkeyPatch):
    config = one_step(network__classes=0, objective__label_dropout=0.5)
    state = advanced(config)
    seen = Seen(monkeypatch, state)
    training_step(state, *digits(), config)
    assert [given[2] for given in (*seen.generator, *seen.critic, *seen.upkeep)] == [None] * 3


def test_labels_and_mirrors_follow_the_objective():
    plain, other = one_step(objective__label_dropout=0.0), one_step(objective__label_dropout=1.0, objective__flip=True)
    draws = drawn(begun(plain), plain)
    assert not draws.unlabelled.any()
    assert not draws.mirrored.any()
    draws = drawn(begun(other), other)
    assert draws.unlabelled.all()
    assert draws.mirrored.any()


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_generator_has_the_gradient_of_the_divergence_s_loss(divergence: str, penalised: bool):
    """That of h(ℓ(x_t)) through ratio network and noise by plain automatic differentiation, per number of a latent.

    Samples in the penalty have none.
    """
    changes = {} if penalised else {"onestep__ratio__penalty": 0.0}
    config = one_step(onestep__ratio__divergence=divergence, onestep__upkeep_share=0.0, **changes)
    state, (x, y) = advanced(config), digits()
    draws, ratio = drawn(state, config), critic_of(state).ratio
    assert ratio is not None
    with torch.no_grad():
        ratio.head.out.weight.mul_(10)  # logits that matter
        ratio.scale.logarithm.uniform_(-0.7, 0.7)
    parts = both_gradients(state, x, y, draws, config)
    assert parts.keys() == {"ratio", "calibrated"} | ({"ratio_penalty"} if penalised else set())
    found = gradients(state.network)
    state.network.zero_grad()

    labels = torch.where(draws.unlabelled, 10, y)
    fake = state.network.generate((1 - 0.3) * draws.eps, torch.full((16,), 0.3), labels)
    t = draws.ratio.t[:, None, None]
    logits = ratio(t * fake + (1 - t) * draws.ratio.eps, draws.ratio.t, labels)
    assert logits.std() > 0.05
    taught = torch.tensor([0.0 if penalised and k % 8 == 0 else 1.0 for k in range(16)])
    ((taught * DIVERGENCES[divergence].generator_loss(logits)).mean() / fake[0].numel()).backward()
    expected = gradients(state.network)
    assert found.keys() == expected.keys()
    assert (flat(found) - flat(expected)).norm() < 1e-5 * flat(expected).norm()


@pytest.mark.parametrize(("share", "kept"), [(0.125, [0, 8]), (0.5, [0, 2, 4, 6, 8, 10, 12, 14]), (0.01, [0])])
@pytest.mark.parametrize("micro", [None, 5])
def test_the_penalty_is_the_mean_over_its_share_of_the_batch(share: float, kept: list[int], micro: int | None):
    """Of the squared slopes at data and at samples, of the network's own value; spread over the batch."""
    config = one_step(onestep__ratio__penalty_share=share, training__micro_batch=micro)
    state, (x, y) = advanced(config), digits()
    draws, ratio = drawn(state, config), critic_of(state).ratio
    assert ratio is not None
    with torch.no_grad():
        ratio.head.out.weight.mul_(10)
        labels, z = torch.where(draws.unlabelled, 10, y)[kept], teacher_of(state).encode(x)[kept]
        fake = state.network.generate(0.7 * draws.eps[kept], torch.full((len(kept),), 0.3), labels)
        t, (_, eps, direction) = draws.ratio.t[kept], (part[kept] for part in draws.ratio)
        slopes: list[Tensor] = []
        for at in (z, fake):
            x_t = t[:, None, None] * at + (1 - t[:, None, None]) * eps
            slopes.append((ratio.logit(x_t + 0.05 * direction, t, labels) - ratio.logit(x_t, t, labels)) / 0.05)
    expected = torch.stack(slopes).square().sum() / len(kept)
    for compute in (critic_gradient, both_gradients):
        told = compute(state, x, y, draws, config)
        torch.testing.assert_close(told["ratio_penalty"], expected, rtol=1e-2, atol=1e-5)


def upkeep_of(state: TrainingState, x: Tensor, y: Tensor, draws: OneStepDraws, kept: list[int]) -> dict[str, Tensor]:
    """Errors of the other roles by plain words, for chosen images."""
    image = torch.stack([x[k].flip(-1) if draws.mirrored[k] else x[k] for k in kept])
    teacher, network, t = teacher_of(state), state.network, draws.kept.t[kept]
    z, labels = teacher.encode(image), torch.where(draws.unlabelled, 10, y)[kept]
    z_t = t[:, None, None] * z + (1 - t[:, None, None]) * draws.kept.eps[kept]
    errors = {"denoiser": (network.denoise(z_t, t, labels) - teacher.denoise(z_t, t, labels)).square().mean()}
    if network.shares_codec:
        errors["decoding"] = (network.decode(z) - image).abs().mean()
        errors["encoding"] = (network.encode(image) - z).square().mean()
    return errors


@pytest.mark.parametrize("multiple", [0.25, 3.0])
@pytest.mark.parametrize(("kind", "method"), [*PAIRS, ("one", "score"), ("one", "dmd"), ("pixels", "ratio")])
def test_upkeep_has_a_stated_multiple_of_the_generator_s_gradient(kind: str, method: str, multiple: float):
    """For a quarter of the batch, spread over it: D(z) at the image, E(x) and f(z_t, t) at the teacher's."""
    changes = {"objective__flip": True, "objective__reconstruction": "l1", "onestep__upkeep_share": 0.25}
    config = one_step(**METHODS[method], **KINDS[kind], **changes, onestep__upkeep=multiple)
    state, (x, y) = advanced(config, 2), digits()  # in the first step, the student is the teacher
    draws = drawn(state, config)
    assert draws.mirrored[[0, 4, 8, 12]].any()
    parts = both_gradients(state, x, y, draws, config)
    whole = gradients(state.network)
    state.network.zero_grad()
    both_gradients(state, x, y, draws, config.with_changes({"onestep.upkeep_share": 0.0}))
    alone = gradients(state.network)
    state.network.zero_grad()

    errors = upkeep_of(state, x, y, draws, [0, 4, 8, 12])
    for name, error in errors.items():
        assert error > 0, "the generator has moved"
        torch.testing.assert_close(parts[name], error.detach(), rtol=1e-4, atol=1e-7)
    assert errors.keys() <= parts.keys()
    torch.stack([*errors.values()]).sum().backward()
    own = gradients(state.network)
    of_generator = flat({name: value for name, value in alone.items() if name in own}).norm()
    weight = multiple * of_generator / flat(own).norm()
    torch.testing.assert_close(parts["upkeep_norm"], flat(own).norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(parts["upkeep_weight"], weight, rtol=1e-4, atol=0)
    zero = torch.zeros(())
    added = {name: value - alone.get(name, zero) for name, value in whole.items()}
    assert flat(added).norm().item() == pytest.approx(multiple * of_generator.item(), rel=1e-3)
    for name, value in added.items():
        expected = weight * own.get(name, torch.zeros_like(value))
        assert (value - expected).norm() <= 1e-3 * flat(added).norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_upkeep_reaches_neither_teacher_nor_critic(kind: str):
    """Even if they could be trained: what the critic learns is the same to the bit with and without it."""
    config = one_step(**KINDS[kind], onestep__upkeep_share=1.0, onestep__upkeep=100.0)
    state, (x, y) = advanced(config), digits()
    draws, found = drawn(state, config), []
    teacher_of(state).requires_grad_(True)
    for each in (config, config.with_changes({"onestep.upkeep": 0.0})):
        parts = both_gradients(state, x, y, draws, each)
        assert ("upkeep_norm" in parts) == ("denoiser" in parts) == (each is config)
        assert gradients(teacher_of(state)) == {}
        found.append(gradients(critic_of(state)))
        critic_of(state).zero_grad()
    assert differing(*found) == []


@pytest.mark.parametrize("kind", ["three", "pixels"])
def test_there_are_no_codec_terms_where_no_codec_is_shared(kind: str):
    config = one_step(**KINDS[kind], onestep__upkeep_share=1.0)
    state, (x, y) = advanced(config), digits()
    parts = both_gradients(state, x, y, drawn(state, config), config)
    assert parts.keys() == {"ratio", "calibrated", "ratio_penalty", "denoiser", "upkeep_norm", "upkeep_weight"}
    if isinstance(state.network, ThreeNetworks):
        found = {name.split(".")[0] for name in gradients(state.network)}
        assert found == {"denoiser", "time", "labels", "modulation", "jump"}
        for name, value in teacher_of(state).state_dict().items():
            if name.startswith(("encoder.", "decoder.", "latent_")):
                for copy in (state.network, *state.averages):
                    assert torch.equal(copy.state_dict()[name], value), name


@pytest.mark.parametrize(("kind", "method"), [("one", "ratio"), ("pixels", "adversarial")])
@pytest.mark.parametrize("micro", [1, 5, 15])
def test_micro_batches_are_one_batch(micro: int, method: str, kind: str):
    """5 and 15 do not divide the batch of 16: the last micro-batch is smaller and has to weigh less."""
    changes = {"onestep__renoised": 0.3, "objective__flip": True, **METHODS[method], **KINDS[kind]}
    whole, cut = one_step(**changes), one_step(**changes, training__micro_batch=micro)
    state, (x, y) = advanced(whole), digits()
    draws, critic = drawn(state, whole), critic_of(state)
    for compute, modules in ((critic_gradient, [critic]), (both_gradients, [critic, state.network])):
        values = {}
        for config in (whole, cut):
            parts = compute(state, x, y, draws, config)
            values[config] = parts, [flat(gradients(module)) for module in modules]
            for module in modules:
                module.zero_grad()
        (parts, ones), (cut_parts, others) = values.values()
        for one, other in zip(ones, others, strict=True):
            assert (one - other).norm() <= 1e-5 * one.norm()
        assert parts.keys() == cut_parts.keys()
        for name in parts:
            torch.testing.assert_close(cut_parts[name], parts[name], rtol=1e-4, atol=1e-7)


# --- gradients that are not finite ------------------------------------------------------------------------------------


def poisoned(parameter: Tensor, value: float) -> Callable[[], None]:
    """One number of its gradient is bad; gives what takes that back."""
    bad = torch.zeros_like(parameter)
    bad.view(-1)[0] = value
    return parameter.register_hook(lambda gradient: gradient + bad).remove


@pytest.mark.parametrize(("method", "value"), [("ratio", math.inf), ("ratio", math.nan), ("adversarial", math.nan)])
def test_a_critic_s_gradient_that_is_not_finite_changes_neither_weights_nor_moments(method: str, value: float):
    """Neither the critic's nor the generator's; the averages go on towards the weights that stand still."""
    config = one_step(**METHODS[method], onestep__ratio__level_normalised=True)
    state = advanced(config)
    start, turns = tensors(state), parts_of(state, config)[1].updates(64, 16, since=32)
    name = "ratio.backbone.entrance.bias" if method == "ratio" else "student.latents_in.bias"
    cure = poisoned(critic_of(state).get_parameter(name), value)
    for k in (1, 2):
        values = training_step(state, *digits(), config)
        assert not values["critic_norm"].isfinite()
        before = start | on_towards(advanced(config), 16 * (turns + k - 1), config, steps=k)
        assert differing(before, tensors(state)) == []
        assert differing(start, before)
        assert gradients(state.network) == gradients(critic_of(state)) == {}
        assert (state.read_skips(), state.counters.skipped, state.counters.images) == (k, k, 64 + 16 * k)
    cure()
    training_step(state, *digits(), config)
    assert (state.read_skips(), state.counters.skipped) == (0, 2)
    assert {"critic", "network"} <= changed(before, state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("whose", "moved"), [("decoding", True), ("generating", True), ("ratio", False)])
def test_no_step_is_taken_on_a_balanced_gradient_that_is_not_finite(whose: str, moved: bool, value: float):
    """Whichever of the two is not: `patches_out` serves the upkeep alone, `jump` the generator alone."""
    config = one_step()
    state = advanced(config)
    before = tensors(state)
    names = {"decoding": "patches_out.bias", "generating": "jump.vector"}
    of_ratio = critic_of(state).get_parameter("ratio.head.out.bias")
    cure = poisoned(state.network.get_parameter(names[whose]) if whose in names else of_ratio, value)
    values = training_step(state, *digits(), config)
    assert values["gradient_norm"].isfinite() != moved
    assert values["critic_norm"].isfinite() == moved
    found = changed(before, state) - {"average-0", "average-1"}
    assert found == ({"critic", "optimizer of critic"} if moved else set())
    assert state.read_skips() == 1
    cure()
    training_step(state, *digits(), config)
    assert "network" in changed(before, state)


def test_good_steps_of_a_critic_alone_do_not_end_a_row_of_bad_ones():
    """Of every second step, which alone moves the generator, the gradient is bad: nothing would ever be learned."""
    config = one_step(onestep__critic_updates=2)
    state = advanced(config)
    poisoned(state.network.get_parameter("latents_out.bias"), math.nan)
    steps = [training_step(state, *digits(), config) for _ in range(6)]
    bad = sum("gradient_norm" in parts for parts in steps)
    assert bad == 3
    assert (state.read_skips(), state.counters.skipped) == (bad, bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_s_gradient_that_is_not_finite_changes_the_critic_alone(value: float):
    config = one_step(onestep__ratio__level_normalised=True)
    state = advanced(config)
    before = tensors(state) | on_towards(state, 16 * parts_of(state, config)[1].updates(64, 16, since=32), config)
    cure = poisoned(state.network.get_parameter("latents_out.bias"), value)
    training_step(state, *digits(), config)
    moved = differing(before, tensors(state))
    assert {name.split(".")[0] for name in moved} == {"critic", "optimizer of critic"}
    assert "critic.levels.means" not in moved
    assert (state.read_skips(), state.counters.skipped) == (1, 1)
    cure()
    training_step(state, *digits(), config)
    assert (state.read_skips(), state.counters.skipped) == (0, 1)
    assert {"critic", "network"} <= changed(before, state)
    assert "critic.levels.means" in differing(before, tensors(state))


# --- where weights start ----------------------------------------------------------------------------------------------


def parts_alike(module: nn.Module, other: nn.Module) -> tuple[set[bool], set[bool]]:
    """Whether the weights inside the trunk and its modulation, and those outside, are the other's."""
    found: tuple[set[bool], set[bool]] = (set(), set())
    for name, value in module.named_parameters():
        inside = any(part in f".{name}" for part in (".trunk.", ".modulation."))
        found[not inside].add(torch.equal(value, other.get_parameter(name)))
    return found


ALIKE = {"teacher": (True, True), "random": (False, False), "trunk": (True, False), "ends": (False, True)}


@pytest.mark.parametrize("weights", ALIKE)
def test_the_generator_starts_from_so_much_of_the_teacher(weights: str):
    inside, outside = ALIKE[weights]
    config = one_step(**KINDS["pixels"], onestep__generator=weights)
    state = begun(config)
    assert isinstance(state.network, PixelNetwork)
    for net in (state.network, *state.averages):
        assert parts_alike(net, teacher_of(state)) == ({inside}, {outside})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ALIKE)
def test_the_critic_starts_from_so_much_of_the_teacher(weights: str, kind: str):
    inside, outside = ALIKE[weights]
    state = begun(one_step(**KINDS[kind], **METHODS["adversarial"], onestep__critic=weights))
    teacher, critic = teacher_of(state), critic_of(state)
    ratio, student = critic.ratio, critic.student
    assert ratio is not None
    assert student is not None
    assert parts_alike(ratio.backbone, teacher.backbone()) == ({inside}, {outside})
    assert parts_alike(student, teacher) == ({inside}, {outside})


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_the_critics_that_it_needs(method: str):
    critic = critic_of(begun(one_step(**METHODS[method])))
    assert (critic.ratio is not None) == (method in ("ratio", "adversarial"))
    assert (critic.student is not None) == (method != "ratio")


def test_random_weights_follow_from_the_run_s_seed():
    changes = {**KINDS["pixels"], **METHODS["adversarial"], "onestep__critic": "random", "onestep__generator": "random"}
    config = one_step(**changes)
    teacher = teacher_for(config)
    first, again = begun(config, teacher), begun(config, teacher)
    other = begun(one_step(**changes, training__seed=1), teacher)
    assert differing(tensors(first), tensors(again)) == []
    assert {name.split(".")[0] for name in differing(tensors(first), tensors(other))} == {
        *("network", "average-0", "average-1", "critic")
    }
    generator, student = first.network.state_dict(), critic_of(first).student
    assert student is not None
    assert not torch.equal(generator["exit.weight"], student.state_dict()["exit.weight"])


def test_the_ratio_network_may_have_the_first_blocks_alone():
    config = one_step(network__depth=2, onestep__critic_blocks=1)
    state = begun(config)
    ratio = critic_of(state).ratio
    assert ratio is not None
    assert ratio.config.depth == 1
    assert differing(ratio.backbone.state_dict(), teacher_of(state).backbone(1).state_dict()) == []


@pytest.mark.parametrize("who", ["generator", "critic"])
def test_with_norms_alone_matrices_of_the_blocks_stay_as_they_are(who: str):
    config = one_step(**KINDS["pixels"], **METHODS["adversarial"], **{f"onestep__{who}_trains": "norms"})
    state = begun(config)
    modules = {"generator": state.network, "critic": critic_of(state)}
    before = {name: p.clone() for name, p in modules[who].named_parameters()}
    matrices = {n for n in before if ".blocks." in n and n.endswith(("project_in.weight", "project_out.weight"))}
    assert len(matrices) == (4 if who == "generator" else 8)
    other = {name: p.clone() for name, p in modules["critic" if who == "generator" else "generator"].named_parameters()}
    for k in range(5):
        training_step(state, *digits(start=16 * k), config)
    after, unused = dict(modules[who].named_parameters()), {"student.jump.vector", "student.jump.arrival"}
    assert set(differing(before, after)) == set(before) - matrices - unused
    now = dict(modules["critic" if who == "generator" else "generator"].named_parameters())
    assert set(differing(other, now)) == set(other) - unused, "the other is trained whole"
    if who == "generator":
        for average in state.averages:
            assert matrices.isdisjoint(differing(before, dict(average.named_parameters())))


# --- methods ----------------------------------------------------------------------------------------------------------


def fresh_samples(state: TrainingState, draws: OneStepDraws) -> Tensor:
    with torch.no_grad():
        start = torch.full((len(draws.eps),), 0.3)
        return state.network.generate(0.7 * draws.eps, start, torch.zeros(len(draws.eps)).long())


def slope_at(state: TrainingState, fake: Tensor, y: Tensor, draws: OneStepDraws, config: Config) -> Tensor:
    """The gradient of the generator's loss at its samples, by the functions that training has it from otherwise."""
    critic, teacher, options = critic_of(state), teacher_of(state), config.onestep
    slope = torch.zeros_like(fake)
    if critic.ratio is not None:
        weight = options.score.adversarial if critic.student is not None else 1.0
        slope = weight * ratio_gradient(critic.ratio, fake, y, draws.ratio, options.ratio)
    if critic.student is not None:
        denoisers, normalised = (teacher.denoise, critic.student.denoise), options.method == "dmd"
        _, pull = distillation(*denoisers, fake.requires_grad_(), y, draws.score, normalised=normalised)
        assert pull is not None
        slope = slope + pull
    return slope.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_critic_learns_and_a_generator_follows_it(method: str):
    """The critic alone for 25 steps; then, with the critic held, the generator goes down the critic's gradient."""
    changes = {**METHODS[method], "onestep__upkeep_share": 0.0, "training__clip": 1e6, "training__decay": 0.0}
    alone = one_step(**changes, training__images=9600, onestep__critic_warmup=9000, onestep__critic_rate=3e-3)
    state = begun(alone)
    values = [training_step(state, *digits(start=16 * k), alone) for k in range(25)]
    for name in {"ratio", "student"} & values[0].keys():
        first, last = (torch.stack([value[name] for value in part]).mean() for part in (values[:3], values[-3:]))
        assert last < 0.9 * first, name

    changes |= {"training__learning_rate": 1e-4, "onestep__critic_rate": 1e-12, "onestep__scale_rate": 1e-12}
    held = one_step(**changes, training__images=9600, onestep__critic_warmup=0)
    trained = parts_of(state, held)[1].trains
    state.optimizers = {each.name: each.optimizers(state.modules[each.name]) for each in trained}
    critic, draws = critic_of(state), drawn(state, held, count=64)
    none = torch.zeros(64).long()
    before = fresh_samples(state, draws)
    slope = slope_at(state, before.clone(), none, draws, held)
    for k in range(5):
        training_step(state, *digits(start=16 * k), held)
    moved = fresh_samples(state, draws) - before
    assert {values["step"].item() for values in state.optimizers["network"][0].state.values()} == {5}
    cosine = (slope * moved).sum() / slope.norm() / moved.norm()
    assert cosine < -0.1, "against the gradient"
    if method == "ratio":
        t, noise = draws.ratio.t[:, None, None], draws.ratio.eps
        assert critic.ratio is not None
        both = [critic.ratio(t * x + (1 - t) * noise, t.flatten(), none).mean() for x in (before, before + moved)]
        assert both[1] > both[0], "samples look more like data"


def test_a_step_can_be_read_at_once():
    assert len(inspect.getsource(training_step).splitlines()) < 40
