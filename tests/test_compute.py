"""What a network computes on: device, precision, compiled sampling, and what is chosen by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import randomised
from helpers_runs import tiny
from onefold import compute
from onefold.compute import precision_for_speed_up, products, resolve_precision, sampling_context, speed_up
from onefold.errors import UserError
from onefold.networks import NetworkConfig, OneFold
from onefold.sampling import Sampler, noises
from onefold.training import loop
from onefold.training.prepare import decide

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture
def network() -> OneFold:
    return randomised(OneFold(NetworkConfig(width=32, depth=2, heads=2))).eval()


def samples(network: OneFold, count: int = 5, **changes: object) -> np.ndarray:
    with sampling_context(network, CPU, **changes):
        return network.sample(count, steps=STEPS).astype(int)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.usefixtures("shapes_unchecked")
def test_compiled_samples_are_the_plain_ones(network: OneFold):
    """Within one level of 256, for any number of images without compiling again, and plain again afterwards."""
    if not compute.can_compile(CPU):
        pytest.skip("nothing can be compiled here")
    plain, before = samples(network), graphs()
    with sampling_context(network, CPU, compiled=True):
        fast, compiled = network.sample(5, steps=STEPS).astype(int), graphs()
        few, more = network.sample(3, steps=STEPS), network.sample(9, steps=STEPS)
        assert graphs() == compiled > before
    assert np.abs(fast - plain).max() <= 1
    assert np.abs(few - plain[:3]).max() <= 1
    assert np.abs(more[:5] - plain).max() <= 1
    assert all(block._compiled_call_impl is None for trunk in network.trunks for block in trunk.blocks)
    assert np.array_equal(samples(network), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(("precision", "depths"), [("float32", (2, 4)), ("bfloat16", (1, 3))])
def test_a_deeper_network_compiles_no_more(precision: str, depths: tuple[int, int]):
    """All blocks are the same code, under autocast the first one too; in float32 its input is a view, another kind."""
    if not compute.can_compile(CPU):
        pytest.skip("nothing can be compiled here")
    numbers: list[int] = []
    for depth in depths:
        torch.compiler.reset()  # what was compiled for the other must be compiled again
        deep, before = randomised(OneFold(NetworkConfig(width=64, depth=depth, heads=2))).eval(), graphs()
        samples(deep, compiled=True, precision=precision)
        numbers.append(graphs() - before)
    assert numbers[1] == numbers[0] > 0


def test_the_network_is_moved_to_the_device(network: OneFold, monkeypatch: pytest.MonkeyPatch):
    moved: list[torch.device] = []
    monkeypatch.setattr(network, "to", moved.append)
    samples(network)
    assert moved == [CPU]


def test_bf16_samples_are_close(network: OneFold):
    """A bf16 number has 8 bits, so that pixels differ by a few levels and not by many."""
    apart = np.abs(samples(network, 64, precision="bfloat16") - samples(network, 64))
    assert 0 < apart.mean() < 2
    assert apart.max() < 40


def test_the_context_tells_the_precision(network: OneFold, monkeypatch: pytest.MonkeyPatch):
    for times, expected in ((0.0, "float32"), (1.9, "float32"), (2.0, "bfloat16")):
        monkeypatch.setattr(compute, "speed_up", lambda device, times=times: times)
        with sampling_context(network, CPU, precision="auto") as taken:
            assert taken == resolve_precision("auto", CPU) == expected
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == getattr(torch, expected)


def test_tf32_lasts_as_long_as_its_context():
    before = torch.get_float32_matmul_precision()
    with products("tf32", torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before == "highest"
    for precision in ("float32", "bfloat16"):
        with products(precision, torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == before


def test_tf32_is_refused_where_there_is_none(network: OneFold):
    with pytest.raises(UserError, match=r"^training\.precision: tf32 is a format of NVIDIA GPUs, not of cpu"):
        decide(tiny(training__precision="tf32"), CPU)
    with pytest.raises(UserError, match=r"^precision: tf32 .* choose float32 or bfloat16"):
        samples(network, precision="tf32")


def test_a_training_in_tf32_is_so_in_all_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    plain = loop.training_step

    def step(*arguments: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return plain(*arguments)

    monkeypatch.setattr(compute, "check_precision", lambda option, precision, device: None)
    monkeypatch.setattr(loop, "training_step", step)
    loop.train(tiny(training__precision="tf32", training__images=32), tmp_path / "run", quiet=True)
    assert seen == ["high", "high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_are_measured():
    before = torch.get_rng_state()
    assert speed_up(CPU) > 0
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on as if nothing had happened"
    assert precision_for_speed_up(0.0) == "float32"


def test_long_trainings_are_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "can_compile", lambda device: True)
    found = [decide(tiny(training__images=n), CPU).training.compile for n in (160, 10**9)]
    assert found == ["no", "yes"]


@pytest.mark.parametrize(("load", "told"), [(0.1, False), (1000.0, True)])
def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch, load: float, told: bool):
    said: list[str] = []
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    decide(tiny(), CPU, said.append)
    assert any("OMP_NUM_THREADS=1" in line for line in said) == told


def test_where_nothing_compiles(network: OneFold, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "can_compile", lambda device: False)
    assert decide(tiny(training__images=10**9), CPU).training.compile == "no"
    with pytest.raises(UserError, match=r"^training\.compile: torch\.compile does not work here"):
        decide(tiny(training__compile="yes"), CPU)
    with pytest.raises(UserError, match=r"^--compile: torch\.compile does not work here"):
        samples(network, compiled=True)


def test_what_was_chosen_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "speed_up", lambda device: 5.25)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    lines: list[str] = []
    config = tiny(training__precision="auto", training__compile="no")
    found = decide(config, CPU, lines.append)
    assert found.training.precision == "bfloat16"
    assert len(lines) == 1
    assert lines[0].startswith(
        "cpu, bfloat16 (bfloat16 products are 5.2 times as fast here as float32 ones), not compiled"
    )
    decide(found, CPU, lines.append)
    assert lines[1].startswith("cpu, bfloat16 (as wanted)")


def test_a_network_keeps_the_sampler_of_its_training(network: OneFold, tmp_path: Path):
    network.sampler = Sampler(steps=1, solver="renoise")
    network.save_pretrained(tmp_path)
    found = OneFold.from_pretrained(tmp_path)
    assert found.sampler == network.sampler
    made = network.generate(next(noises([0, 1], (16, 4))), torch.zeros(2), torch.tensor([0, 1]))
    assert np.array_equal(found.sample(2), network.pictures([made]))
    assert not np.array_equal(found.sample(2), network.sample(2, steps=2))
    (tmp_path / "sampler.json").unlink()
    assert OneFold.from_pretrained(tmp_path).sampler == Sampler()
    (tmp_path / "sampler.json").write_text('{"steps": 0}')
    with pytest.raises(UserError, match=r"sampler\.json: steps: 0 is not positive"):
        OneFold.from_pretrained(tmp_path)


def test_blocks_are_compiled_without_a_fusion_of_wrong_gradients(network: OneFold, monkeypatch: pytest.MonkeyPatch):
    if not hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        pytest.skip("this PyTorch does not have it")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: seen.append(options))
    compute.compile_blocks(network, dynamic=False)
    assert seen == 2 * [{"dynamic": False, "options": {"triton.mix_order_reduction": False}}]
