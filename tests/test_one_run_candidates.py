"""The alternatives in benchmarks/one_run_candidates.py: their losses, gradients and arithmetic."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import one_run
import one_run_candidates as candidates
import onefold
import onestep_digits
from helpers_runs import batch, differing, fresh, tensors, tiny
from onefold.errors import UserError
from onefold.evaluation import evaluate
from onefold.networks import RatioNet
from onefold.networks.jump import Jump
from onefold.objectives import one_run as objective
from onefold.training.config import Config
from onefold.training.phases import PHASES, phases_of, training_flops
from onefold.training.state import TrainingState
from onefold.training.step import training_step

OTHERS = tuple(name for name in candidates.CANDIDATES if name != "score")
OWN = {phase: PHASES.pop(phase) for phase, _ in (candidates.CANDIDATES[name] for name in OTHERS)}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Its phases, which other tests do not know."""
    PHASES.update(OWN)
    yield
    for phase in OWN:
        del PHASES[phase]
    phases_of.cache_clear()


def small(name: candidates.Candidate, **changes: Any) -> Config:
    """Ten steps of 16 digits; beside the network, the others learn from the fourth on."""
    phase, own = candidates.CANDIDATES[name]
    own = own | {"onestep.critic_warmup": 32, "network.jump_rank": 3, "onerun.begin": 48, "onerun.measured": 40}
    return tiny(phases=(phase,)).with_changes(own | changes)


def trained(config: Config, steps: int) -> TrainingState:
    state = fresh(config)
    for step in range(steps):
        training_step(state, *batch(start=16 * step), config)
    return state


# --- energy -----------------------------------------------------------------------------------------------------------


def written_out(fake: Tensor, real: Tensor, of_fake: list[int], of_real: list[int], null: int) -> float:
    """Sample by sample, in units of the data's deviation."""
    unit = (real - real.mean(0)).square().sum(1).mean().sqrt()

    def mean(a: Tensor, others: list[Tensor]) -> float:
        return sum(((a - b).square().sum().sqrt() / unit).item() for b in others) / len(others)

    found: list[float] = []
    for i, label in enumerate(of_fake):
        near = [j for j, other in enumerate(of_real) if label in (other, null)]
        alike = [fake[j] for j, other in enumerate(of_fake) if other == label and j != i]
        if near and alike:
            twins = [[real[k] for k, other in enumerate(of_real) if other == of_real[j] and k != j] for j in near]
            of_data = sum(mean(real[j], own) if own else 0.0 for j, own in zip(near, twins, strict=True)) / len(near)
            found.append(2 * mean(fake[i], [real[j] for j in near]) - mean(fake[i], alike) - of_data)
    return sum(found) / len(found)


def test_the_energy_distance_is_that_of_its_definition():
    fake, real = torch.randn(7, 3), torch.randn(6, 3) + 1
    of_fake, of_real = [0, 0, 1, 1, 2, 5, 5], [0, 0, 0, 1, 1, 4]  # of 2 a single one, without data; 5: no class
    found = candidates.energy_distance(fake, real, torch.tensor(of_fake), torch.tensor(of_real), 5)
    assert found.item() == pytest.approx(written_out(fake, real, of_fake, of_real, 5), rel=1e-5)


def test_the_energy_distance_is_zero_on_average_and_knows_no_size():
    """Between two sets of one distribution; and whatever unit the data are measured in."""
    rng = torch.Generator().manual_seed(0)
    label = torch.zeros(400, dtype=torch.int64)
    a, b = (torch.randn(400, 4, generator=rng) for _ in range(2))
    same, apart = (candidates.energy_distance(a + shift, b, label, label, 1).item() for shift in (0, 0.5))
    assert abs(same) < 0.02 < apart
    assert candidates.energy_distance(9 * a, 9 * b, label, label, 1).item() == pytest.approx(same, abs=1e-5)


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_the_shared_weights_are_those_of_plain_training_to_the_bit(name: candidates.Candidate):
    """And what learns beside them begins when it should."""
    config = small(name)
    warm = 2 if name == "ratio" else 0
    plain, joined, states = fresh(tiny()), fresh(config), list[dict[str, Tensor]]()
    for step in range(7):
        for state, own in ((plain, tiny()), (joined, config)):
            training_step(state, *batch(start=16 * step), own)
        states.append(tensors(joined))
        shared = {key: value for key, value in states[-1].items() if key.startswith("average-") and ".jump" not in key}
        expected = {key: value for key, value in tensors(plain).items() if key.startswith("average-")}
        assert differing(shared, {key: value for key, value in expected.items() if ".jump" not in key}) == []
        for module in (trained.name for trained in phases_of(config)[0].parts[-1].trains):
            begins = 3 + (warm if module == "generator" else 0)
            own = [{key: value for key, value in each.items() if key.startswith(f"{module}.")} for each in states[-2:]]
            assert bool(differing(own[0], own[-1])) == (step >= begins), (module, step)
    assert joined.read_skips() == 0
    assert ("student" in joined.modules) == (name == "both")


@pytest.mark.parametrize("name", OTHERS)
def test_the_average_receives_no_gradient_and_the_others_do(name: candidates.Candidate):
    config = small(name, **{"objective.label_dropout": 0.5})
    state = trained(config, 6)
    part = phases_of(config)[0].parts[-1]
    draws = part.draw(16, torch.Generator().manual_seed(3))
    losses = part.loss(*(state.modules[module] for module in part.modules), *batch(), draws)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is None for p in state.averages[0].parameters())
    for each in part.trains:
        grads = [p.grad for p in state.modules[each.name].parameters()]
        assert sum(grad is not None and bool(grad.any()) for grad in grads) >= len(grads) - 1, each.name


def test_both_is_the_loss_of_one_run_and_a_tenth_of_the_energy():
    config = small("both")
    state = trained(config, 6)
    part, (x, y) = phases_of(config)[0].parts[-1], batch()
    draws = part.draw(16, torch.Generator().manual_seed(3))
    both = part.loss(*(state.modules[module] for module in part.modules), x, y, draws)
    student, generator = (state.modules[name] for name in ("student", "generator"))
    assert isinstance(student, Jump)
    assert isinstance(generator, Jump)
    score = objective.one_run(student, generator, state.averages[0], y, draws, config.onerun)
    assert both.parts["energy"] > 0
    torch.testing.assert_close(both.total, score.total + 0.1 * both.parts["energy"])
    assert {name: both.parts[name] for name in score.parts} == score.parts


def test_a_ratio_begins_as_a_head_on_the_average_as_it_is_then():
    average = trained(small("ratio"), 2).averages[0]
    ratio, whole = candidates.Ratio(average), RatioNet.of(average)
    whole.head = ratio.head
    x_t, t, y = torch.randn(4, 16, 4), torch.rand(4), torch.tensor([0, 3, 9, 10])
    torch.testing.assert_close(ratio.logit(average, x_t, t, y), whole.logit(x_t, t, y))


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_has_the_stated_operations(name: candidates.Candidate):
    """Those beside plain training, to 3 %, of one in which all learn, as torch counts them (see `test_estimate`)."""
    sizes = {"network.depth": 4, "network.width": 64, "training.optimizer": "adamw"}
    config = small(name, **sizes, **{"onerun.begin": 0, "onestep.critic_warmup": 0})
    state = trained(config, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training_step(state, *batch(), config)
    plain = training_flops(tiny().with_changes(sizes))
    assert counter.get_total_flops() / 16 - plain == pytest.approx(training_flops(config) - plain, rel=0.03)


# --- the script -------------------------------------------------------------------------------------------------------


def test_equal_arithmetic_is_fewer_images_of_what_costs_more():
    assert candidates.equal_images("score", 6_400) == 6_400
    images = candidates.equal_images("both", 64_000)
    assert images < 64_000
    found = [candidates.configured(name, 0, count) for name, count in (("score", None), ("both", images))]
    totals = [config.training.images * training_flops(config) for config in found]
    assert totals[0] == pytest.approx(totals[1], rel=2e-3)


def test_a_finished_run_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def few(run: Any, **options: Any) -> Any:
        return evaluate(run, images=20, **options)

    monkeypatch.setattr(onestep_digits, "evaluate", few)
    monkeypatch.setattr(onestep_digits, "SEEDS", (0,))
    monkeypatch.setattr(onefold, "recipe", lambda name: tiny(onerun__measured=40))
    options: dict[str, Any] = {"brief": True, "out": tmp_path, "json_file": tmp_path / "found.json"}
    options["change"] = ("onestep.critic_warmup=32",)
    candidates.main("ratio", **options)
    found = (tmp_path / "found.json").read_text(encoding="utf-8")
    record = json.loads(found)
    assert record["candidate"] == "ratio"
    assert list(record["rows"]) == ["1 step"]
    assert record["flops_per_image"] > training_flops(tiny())
    monkeypatch.setattr(one_run, "measured", None)
    candidates.main("ratio", **options)
    assert (tmp_path / "found.json").read_text(encoding="utf-8") == found


def test_a_study_s_folder_is_refused(tmp_path: Path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r": holds a study; choose another --out$"):
        candidates.main("score", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
