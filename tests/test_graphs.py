"""Steps recorded as CUDA graphs: what they need of optimizers and averages; on a GPU, that they are the same steps."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers_one_step import one_step, teacher_for
from helpers_runs import batch, tiny
from onefold.errors import UserError
from onefold.networks import build
from onefold.training import ema
from onefold.training.config import Config
from onefold.training.graphs import USUAL, Graphs, Kind, _scalars
from onefold.training.loop import train
from onefold.training.optimizer import build_optimizers, guarded_step, keep_rates_on, set_rates
from onefold.training.prepare import decide
from onefold.training.state import TrainingState
from onefold.training.step import Turn, training_step

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_on_the_device_give_the_same_steps(optimizer: str):
    config = tiny(training__optimizer=optimizer, training__weight_decay=0.1)
    networks = [build(config.network)]
    networks.append(copy.deepcopy(networks[0]))
    both = [build_optimizers(network, config.training) for network in networks]
    keep_rates_on(both[1], CPU)
    for factor in (1.0, 0.5, 0.25):
        gradients = [torch.randn_like(p) for p in networks[0].parameters()]
        for network, optimizers in zip(networks, both, strict=True):
            for p, gradient in zip(network.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            set_rates(optimizers, factor)
            guarded_step(network, optimizers, clip=1.0)
    for optimizer in both[1]:
        rates = [group["lr"] for group in optimizer.param_groups]
        assert all(isinstance(rate, torch.Tensor) for rate in rates)
        assert [float(rate) for rate in rates] == [pytest.approx(0.25 * optimizer.defaults["lr"])] * len(rates)
    for p, q in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_renewal_on_the_device_gives_the_same_average():
    network, start = build(tiny().network), build(tiny().network)
    averages = [copy.deepcopy(start), copy.deepcopy(start)]
    for average, renewal in zip(averages, (0.25, torch.tensor(0.25)), strict=True):
        ema.update(average, network, renewal)
    for a, b, p, q in zip(*(each.parameters() for each in (*averages, start, network)), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(b, 0.75 * p + 0.25 * q)


def test_a_step_is_not_lost_beside_a_long_half_life():
    """Of 3,000,000 images, of which a step of 16 renews 3.7e-6: from 0 towards 1, as exactly as float32 can."""
    config = tiny(training__ema_half_lives=(3_000_000,), training__ema_ramp=0.0)
    (renewal,) = Turn.at(TrainingState.fresh(config, CPU), config).renewals
    assert renewal == pytest.approx(-math.expm1(math.log(0.5) * 16 / 3_000_000), rel=1e-9)
    for number in (renewal, *_scalars([renewal], CPU)):
        average, network = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        for module, value in ((average, 0.0), (network, 1.0)):
            for p in module.parameters():
                torch.nn.init.constant_(p, value)
        ema.update(average, network, number)
        assert [p.item() for p in average.parameters()] == [pytest.approx(renewal, rel=1e-6)] * 2


def test_they_are_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"^training.graphs: needs a CUDA GPU, and one process; leave it at no$"):
        decide(tiny(training__graphs="yes"), CPU)


def test_a_run_goes_on_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = train(tiny(training__images=48), tmp_path / "run", quiet=True)
    described = run.folder / "config.json"
    described.write_text(described.read_text().replace('"graphs": "no"', '"graphs": "yes"'))
    train(None, run.folder, resume=True, images=80)
    assert "training.graphs needs a CUDA GPU and one process: steps are taken as usual" in "".join(capsys.readouterr())


def test_kinds_of_steps_can_be_told_apart():
    config = one_step(onestep__critic_warmup=32, onestep__critic_updates=2)
    state = TrainingState.fresh(config, CPU, teacher_for(config))
    found = []
    for images in (0, 16, 32, 48):
        state.counters.images = images
        found.append(Turn.at(state, config))
    assert len({(turn.parts, turn.whole) for turn in found}) == 3
    assert [turn.whole for turn in found[:2]] == [True, True]


STEPS = 12
CASES = {
    "adamw": tiny(),
    "muon": tiny(training__optimizer="muon"),
    "micro-batches": tiny(training__micro_batch=5),
    "one run": tiny(phases=("one_run",), network__jump_rank=2, onerun__begin=0),
    "score": one_step(onestep__method="score", onestep__critic_warmup=0),
    "ratio": one_step(onestep__method="ratio", onestep__critic_warmup=0),
    "several critic updates": one_step(onestep__critic_warmup=32, onestep__critic_updates=2),
    "dmd": one_step(onestep__method="dmd", onestep__critic_warmup=0),
}
CASES = {name: config.with_changes({"training.images": 400}) for name, config in CASES.items()}


def begun(config: Config, device: torch.device) -> TrainingState:
    return TrainingState.fresh(config, device, teacher_for(config) if config.phases == ("one_step",) else None)


def kinds(config: Config) -> Counter[Kind]:
    """Of the steps of a test, each with its number."""
    state, found = begun(config, CPU), Counter[Kind]()
    for k in range(STEPS):
        state.counters.images = k * config.training.batch
        turn = Turn.at(state, config)
        found[turn.parts, turn.whole] += 1
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_last_steps_of_every_case_are_recorded(name: str):
    """What a machine without a GPU can say of the test below: that it compares recorded steps."""
    lasting = [count for count in kinds(CASES[name]).values() if count > USUAL]
    assert len(lasting) == (2 if name == "several critic updates" else 1)
    assert sum(lasting) >= STEPS - 2, "but for two steps of warm-up"


@cuda
@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_the_same(name: str):
    config: Config = CASES[name].with_changes({"training.precision": "float32", "training.compile": "no"})
    device, graphs = torch.device("cuda"), Graphs(torch.device("cuda"))
    x, y = (part.to(device) for part in batch())
    ends: list[list[torch.Tensor]] = []
    for step in (training_step, graphs.step):
        state = begun(config, device)
        for _ in range(STEPS):
            values = step(state, x, y, config)
        weights = [p for module in state.modules.values() for p in module.parameters()]
        ends.append([*weights, *values.values(), state.skips.total])
        assert state.counters.images == STEPS * config.training.batch
    assert graphs._recorded.keys() == {kind for kind, count in kinds(config).items() if count > USUAL}
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
