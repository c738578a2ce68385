import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers_one_step import begun, digits, one_step
from helpers_runs import differing, fresh, tensors, tiny
from onefold import cli
from onefold import estimate as estimates
from onefold.commands import tables
from onefold.compute import can_compile
from onefold.errors import UserError
from onefold.estimate import estimate
from onefold.networks import Network
from onefold.recipes import RECIPES, recipe
from onefold.training.config import Config
from onefold.training.one_run import with_one_step
from onefold.training.phases import Phase, phases_of
from onefold.training.state import TrainingState
from onefold.training.step import training_step

CIFAR = {"width": 96, "depth": 2, "heads": 3}
FEW_TOKENS = recipe("digits", training={"optimizer": "adamw", "precision": "float32"}, objective={"draws": 1})
MANY_TOKENS = recipe("cifar10", network=CIFAR, training={"optimizer": "adamw", "precision": "float32"})


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products of `work`, as torch counts them.

    It does not know the fused attention of a CPU, so attention is computed by its definition here.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def images(config: Config, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    network = config.network
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((count, network.channels, *network.image_size), generator=generator) * 2 - 1
    return x, torch.arange(count) % max(1, network.classes)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        FEW_TOKENS,
        MANY_TOKENS,
        MANY_TOKENS.with_changes({"objective.draws": 4}),
        FEW_TOKENS.with_changes({"objective.target": "stopped"}),
        FEW_TOKENS.with_changes({"objective.perceptual_weight": 1.0}),
        FEW_TOKENS.with_changes({"network.architecture": "pixels"}),
    ],
    ids=["few tokens", "many tokens", "four draws", "no target", "perceptual", "pixels"],
)
def test_a_training_step_has_the_estimated_operations(config: Config):
    """To 5 %: the estimate takes every backward pass for two forward ones, also that of the first layer."""
    state = fresh(config)
    x, y = images(config, 8)
    found = counted(lambda: training_step(state, x, y, config)) / 8
    assert estimate(config, seconds=0).flops_per_image == pytest.approx(found, rel=0.05)


ONE_STEP: dict[str, dict[str, Any]] = {
    "ratio": {},
    "no penalty": {"onestep__ratio__penalty": 0.0},
    "half the depth": {"onestep__critic_blocks": 2},
    "all kept": {"onestep__upkeep_share": 1.0},
    "nothing kept": {"onestep__upkeep": 0.0},
    "two updates": {"onestep__critic_updates": 2},
    "score": {"onestep__method": "score"},
    "low rank": {"onestep__method": "score", "rank": 4},
    "low rank, adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5, "rank": 4},
    "guided": {"onestep__method": "score", "onestep__score__guidance": 2.0},
    "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5},
    "pixels": {"network__architecture": "pixels"},
    "three networks": {"network__architecture": "three_networks", "network__depth": 9},
}


@pytest.mark.parametrize("kind", ONE_STEP)
def test_a_step_of_one_step_training_has_the_estimated_operations(kind: str):
    """To 5 %: of an update of the generator, with those of the critic."""
    sizes = {"network__depth": 4, "network__width": 64, "onestep__critic_warmup": 0}
    config = one_step(**{**sizes, **ONE_STEP[kind]})
    state, updates = begun(config), config.onestep.critic_updates
    found = counted(lambda: [training_step(state, *digits(), config) for _ in range(updates)]) / (16 * updates)
    assert phases_of(config)[0].flops() == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [{}, {"onerun.guidance": 2.0}, {"network.jump_exit": False}, {"training.micro_batch": 8}, {"onerun.updates": 1}],
    ids=str,
)
def test_a_step_of_one_run_has_the_estimated_operations(changes: dict[str, Any]):
    """To 5 %: with generator, student and exit."""
    sizes = {"network__depth": 4, "network__width": 64, "training__optimizer": "adamw", "onerun__begin": 0}
    config = with_one_step(tiny(**sizes)).with_changes(changes)
    state = fresh(config)
    training_step(state, *images(config, 16), config)  # one in which the student is still the denoiser
    found = counted(lambda: training_step(state, *images(config, 16), config)) / 16
    assert estimate(config, seconds=0).flops_per_image == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    "sampler",
    [
        {"steps": 1},
        {"steps": 5},
        {"steps": 5, "guidance": 2.0},
        {"steps": 5, "guidance": 2.0, "guidance_interval": (0.2, 0.6)},
        {"steps": 5, "solver": "heun"},
        {"steps": 5, "solver": "heun", "guidance": 2.0, "guidance_interval": (0.5, 1.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config",
    [FEW_TOKENS, MANY_TOKENS, FEW_TOKENS.with_changes({"network.architecture": "pixels"})],
    ids=["few tokens", "many tokens", "pixels"],
)
def test_a_sample_has_the_estimated_operations(config: Config, sampler: dict[str, object]):
    """To 5 %; Heun's method evaluates the network twice in each interval but the last."""
    config = config.with_changes({f"sampler.{name}": value for name, value in sampler.items()})
    network = fresh(config).published
    found = counted(lambda: network.sample(4, **sampler)) / 4
    assert estimate(config, seconds=0).flops_per_sample == pytest.approx(found, rel=0.05)


def learned(network: Network) -> list[torch.Tensor]:
    """What has a gradient: not the generator's own weights, which are trained elsewhere or not at all."""
    return [p for name, p in network.named_parameters() if not name.startswith("jump")]


# --- parameters, memory, latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("imagenet256-s", 42), ("imagenet256-m", 118), ("imagenet256-b", 205)])
def test_the_papers_sizes(name: str, millions: float):
    """Within 3 % of the networks of Wang & Zhang, 2025."""
    cost = estimate(recipe(name), seconds=0)
    assert cost.parameters == pytest.approx(millions * 1e6, rel=0.03)
    assert cost.share > 0.95
    assert cost.latent_ratio == 256 * 32 / (256 * 256 * 3)
    assert 0 <= cost.images - 50 * 1_281_167 < 1024, "in whole batches"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("half_lives", [(32,), (32, 64, 128)])
def test_the_state_takes_the_estimated_memory(optimizer: str, half_lives: tuple[int, ...]):
    config = tiny(training__optimizer=optimizer, training__ema_half_lives=half_lives)
    state = fresh(config)
    training_step(state, *images(config, 16), config)
    values = [p for network in (state.network, *state.averages) for p in network.parameters()]
    values += learned(state.network)  # the gradient has their size
    values += [value for each in state.optimizers["network"] for part in each.state.values() for value in part.values()]
    cost = estimate(config, seconds=0)
    assert cost.parameters == sum(p.numel() for p in state.network.parameters())
    assert cost.state_bytes == pytest.approx(sum(value.nbytes for value in values), rel=0.01)


@pytest.mark.parametrize(
    "changes", [{}, {"network__architecture": "pixels"}, {"training__optimizer": "adamw"}], ids=str
)
def test_the_state_of_one_run_takes_the_estimated_memory(changes: dict[str, Any]):
    """Student, generator and exit have weights and second moments; their gradients come when the network's are gone."""
    config = with_one_step(tiny(network__jump_rank=3, onerun__begin=0, **changes))
    state = fresh(config)
    for _ in range(2):
        training_step(state, *images(config, 16), config)
    values = [p for module in state.modules.values() for p in module.parameters()]
    kept = [value for each in state.optimizers.values() for optimizer in each for value in optimizer.state.values()]
    values += [value for each in kept for value in each.values()]
    values += learned(state.network)
    assert estimate(config, seconds=0).state_bytes == pytest.approx(sum(value.nbytes for value in values), rel=0.003)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_counted(name: str):
    cost = estimate(recipe(name), seconds=0)
    assert cost.measured is None
    assert cost.seconds is None
    assert cost.flops_per_image > cost.parameters
    assert 0 < cost.latent_ratio <= 1


# --- measurement ------------------------------------------------------------------------------------------------------


def test_a_measurement_takes_its_time_and_says_what_it_did():
    config = tiny(training__images=1_000)
    cost = estimate(config, seconds=0.05)
    assert cost.measured is not None
    assert (cost.measured.device, cost.measured.precision) == ("cpu", "float32")
    assert cost.measured.images_per_second > 0
    assert cost.measured.peak_memory > 1e7
    assert cost.seconds == pytest.approx(1_008 / cost.measured.images_per_second)


def test_a_measurement_uses_the_micro_batch():
    cost = estimate(tiny(training__micro_batch=4), seconds=0.01)
    assert cost.measured is not None
    assert cost.measured.micro_batch == 4


def test_a_step_of_many_passes_pays_the_optimizer_once(monkeypatch: pytest.MonkeyPatch):
    """64 images in passes of 16: one step of 16 in 5 s and three more passes in 3 s each are 14 s."""
    clock = iter([0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 8.0, 9.0])
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: next(clock))
    cost = estimate(tiny(training__batch=64, training__micro_batch=16), seconds=1.0)
    assert cost.measured is not None
    assert (cost.measured.batch, cost.measured.micro_batch) == (64, 16)
    assert cost.measured.images_per_second == pytest.approx(64 / 14)


def test_three_networks_are_measured_in_both_stages(monkeypatch: pytest.MonkeyPatch):
    """4 images/s in the first quarter of the run and 1 image/s in the rest are 1 / (¼ · ¼ + ¾ · 1)."""
    times = {"autoencoder": 0.25, "diffusion": 1.0}
    seen: list[str] = []

    def timed(state: object, x: object, y: object, config: object, phase: Phase, *rest: object) -> list[float]:
        seen.append(phase.name)
        return [times[phase.name]]

    monkeypatch.setattr(estimates, "_seconds_per_image", timed)
    three = tiny(network__architecture="three_networks", network__depth=3, training__batch=1, training__images=1_000)
    cost = estimate(three.with_changes({"stages.autoencoder": 0.25}), seconds=0.01)
    assert seen == ["autoencoder", "diffusion"]
    assert cost.measured is not None
    assert cost.measured.images_per_second == pytest.approx(1 / (0.25 * 0.25 + 0.75))


def test_one_run_is_measured_without_and_with_its_generator(monkeypatch: pytest.MonkeyPatch):
    """4 images/s in the first 35 % of the run, and 1 image/s in the rest."""
    seen: list[int] = []

    def timed(*arguments: Any) -> list[float]:
        seen.append(arguments[-1])
        return [1.0 if arguments[-1] else 0.25]

    monkeypatch.setattr(estimates, "_seconds_per_image", timed)
    cost = estimate(with_one_step(tiny(training__batch=1, training__images=1_000)), seconds=0.01)
    assert seen == [0, 350]
    assert cost.measured is not None
    assert cost.measured.images_per_second == pytest.approx(1 / (0.25 * 0.35 + 0.65))


@pytest.mark.parametrize(
    ("times", "median", "spread", "busy"),
    [
        ([2.0], 2, 1, False),
        ([2.0, 2, 2, 2, 30], 2, 1, False),  # a single slow step says nothing
        ([2.0, 3, 2, 3, 2, 3, 2], 2, 1.5, True),
    ],
)
def test_the_median_of_the_steps_counts_and_a_wide_spread_is_said(
    times: list[float], median: float, spread: float, busy: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(estimates, "_seconds_per_image", lambda *arguments: times)
    cost = estimate(tiny(), seconds=0.01)
    assert cost.measured is not None
    assert cost.measured.images_per_second == pytest.approx(1 / median)
    assert cost.measured.spread == pytest.approx(spread)
    console = Console(file=io.StringIO(), width=200)
    tables.show_estimate(console, "tiny", tiny(), cost)
    assert (", on this machine, as busy as it is now" in console.file.getvalue()) == busy


def test_each_step_is_timed_for_itself(monkeypatch: pytest.MonkeyPatch):
    """Steps of 16 in 1, 9 and 2 s, one pass each: the median counts, and the first, which allocates, does not."""
    clock = iter([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 12.0, 99.0])
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: next(clock))
    cost = estimate(tiny(), seconds=20.0)
    assert cost.measured is not None
    assert cost.measured.images_per_second == pytest.approx(16 / 2)
    assert cost.measured.spread == pytest.approx(5.5 / 1.5)


def test_each_section_takes_real_steps(monkeypatch: pytest.MonkeyPatch):
    seen: dict[bool, set[int]] = {False: set(), True: set()}

    def step(state: TrainingState, x: torch.Tensor, y: torch.Tensor, config: Config) -> dict[str, torch.Tensor]:
        images = state.counters.images
        told = training_step(state, x, y, config)
        seen["student" in told].add(images)
        return told

    monkeypatch.setattr(estimates, "training_step", step)
    assert estimate(with_one_step(tiny(training__images=640)), seconds=0.01).measured is not None
    assert seen == {False: {0}, True: {224}}


def test_every_stage_of_three_networks_takes_real_steps(monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()

    def step(state: TrainingState, x: torch.Tensor, y: torch.Tensor, config: Config) -> dict[str, torch.Tensor]:
        seen.add(state.counters.images)
        return training_step(state, x, y, config)

    monkeypatch.setattr(estimates, "training_step", step)
    config = tiny(network__architecture="three_networks", network__depth=3, training__images=640)
    assert estimate(config, seconds=0.01).measured is not None
    assert seen == {0, 320}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own modules
@pytest.mark.usefixtures("shapes_unchecked")
def test_a_compiled_measurement_says_so():
    if not can_compile(torch.device("cpu")):
        pytest.skip("nothing can be compiled here")
    cost = estimate(tiny(network__depth=1, training__compile="yes"), seconds=0.01)
    assert cost.measured is not None
    assert cost.measured.compiled


def test_an_unconditional_network_can_be_measured():
    assert estimate(tiny(network__classes=0), seconds=0.01).measured is not None


# --- the largest micro-batch ------------------------------------------------------------------------------------------


def peaks(monkeypatch: pytest.MonkeyPatch, *values: int) -> None:
    """Peaks of memory before, after half of the micro-batch, after all of it, and after the steps."""
    left = list(values)
    monkeypatch.setattr(estimates, "peak_memory", lambda device: left.pop(0))


def measured(
    monkeypatch: pytest.MonkeyPatch, *values: int, micro_batch: int = 6, **changes: Any
) -> estimates.Measurement:
    peaks(monkeypatch, *values)
    monkeypatch.setattr(estimates, "available_memory", lambda device: 10_000)
    monkeypatch.setattr(estimates, "_batches_held", lambda config, batch: 0)
    return estimates.measure(tiny(training__micro_batch=micro_batch, **changes), 0.01)


def test_the_largest_micro_batch_fills_nine_tenths_of_the_memory():
    """(0.9 · 10,000 − 3,000) / 100 = 60 images more than the 20 that were measured."""
    assert estimates.largest_micro_batch(20, 3_000, 100.0, 10_000) == 80
    assert estimates.largest_micro_batch(20, 3_000, 101.0, 10_000) == 79


def test_batches_take_memory_beside_the_pass():
    """64 images of 3 × 8 × 8 as floats and a copy of these, as bytes, and 2 · 3 batches of bytes read ahead."""
    config = tiny(network__channels=3, data__workers=3)
    assert estimates._batches_held(config, 64) == 64 * 192 * (4 + 4 + 1 + 6)


def test_what_was_measured_fits():
    assert estimates.largest_micro_batch(20, 9_500, 100.0, 10_000) == 20


def test_memory_grows_from_half_the_images_to_all(monkeypatch: pytest.MonkeyPatch):
    """3 images peak at 2,000 and 6 at 2,600; the steps, with the optimizer, at 3,000."""
    found = measured(monkeypatch, 500, 2_000, 2_600, 3_000)
    assert found.peak_memory == 3_000
    assert found.bytes_per_image == 200
    assert found.largest_micro_batch == 6 + (9_000 - 3_000) // 200


def test_a_recording_keeps_the_activations_of_a_step_besides(monkeypatch: pytest.MonkeyPatch):
    """6 images of 200 each are there twice: at 3,000 + 1,200, and each further image takes 400."""
    monkeypatch.setattr(estimates, "check_graphs", lambda training, device: None)  # there are none on a CPU
    found = measured(monkeypatch, 500, 2_000, 2_600, 3_000, training__graphs="yes")
    assert found.graphs
    assert (found.peak_memory, found.bytes_per_image) == (4_200, 400)
    assert found.largest_micro_batch == 6 + (9_000 - 4_200) // 400


def test_a_recording_is_refused_where_there_is_none():
    config = tiny(training__graphs="yes")
    assert estimate(config, seconds=0).measured is None, "counting needs no GPU"
    with pytest.raises(UserError, match=r"^training.graphs: needs a CUDA GPU, and one process; leave it at no$"):
        estimate(config, seconds=0.01)


def test_an_odd_micro_batch(monkeypatch: pytest.MonkeyPatch):
    assert measured(monkeypatch, 500, 2_000, 2_600, 3_000, micro_batch=5).bytes_per_image == 200


@pytest.mark.parametrize("values", [(2_000, 2_000, 2_600, 3_000), (500, 2_000, 2_000, 3_000)], ids=str)
def test_growth_that_an_earlier_peak_hides_is_not_told(monkeypatch: pytest.MonkeyPatch, values: tuple[int, ...]):
    found = measured(monkeypatch, *values)
    assert found.bytes_per_image is None
    assert found.largest_micro_batch is None


def test_one_image_shows_no_growth(monkeypatch: pytest.MonkeyPatch):
    assert measured(monkeypatch, 3_000, micro_batch=1).largest_micro_batch is None


def test_unknown_memory_has_no_largest_micro_batch(monkeypatch: pytest.MonkeyPatch):
    peaks(monkeypatch, 500, 2_000, 2_600, 3_000)
    monkeypatch.setattr(estimates, "available_memory", lambda device: None)
    found = estimates.measure(tiny(training__micro_batch=6), 0.01)
    assert found.bytes_per_image == 200
    assert found.largest_micro_batch is None


def test_growth_leaves_the_weights_alone():
    config = tiny()
    state, before = fresh(config), tensors(fresh(config))
    estimates._memory_growth(state, *images(config, 4), config)
    assert differing(before, tensors(state)) == []
    assert all(p.grad is None for p in state.network.parameters())


def test_the_growth_foretells_the_peak_of_four_times_the_images():
    """In a process of its own, where nothing before hides the growth: from 32 images, the peak of 128 within 30 %."""
    script = (
        "from onefold.estimate import measure; from onefold.recipes import recipe\n"
        "options = {'device': 'cpu', 'precision': 'float32', 'batch': 128}\n"
        "few, many = (measure(recipe('digits', training=options | {'micro_batch': n}), 0.0) for n in (32, 128))\n"
        "print(few.peak_memory, few.bytes_per_image, many.peak_memory)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    few, each, many = map(float, answer.stdout.split())
    assert many == pytest.approx(few + 96 * each, rel=0.3)


def test_a_container_may_have_a_limit(tmp_path: Path):
    assert estimates._free_in_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 250\nfile 50\ninactive_file 40\nactive_file 10\n")
    assert estimates._free_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert estimates._free_in_container(tmp_path) == 740, "40 bytes are a cached file"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_available_memory_is_what_is_held_and_what_is_free(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cpu")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = estimates.available_memory(device)
    assert found is not None
    assert 0 < found < total
    monkeypatch.setattr(estimates, "_free_in_container", lambda: 1_000)
    limited = estimates.available_memory(device)
    assert limited is not None
    assert 1_000 < limited < found, "what is held counts beside the limit's rest"


def test_the_command_counts_one_run(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["estimate", "digits", "--seconds", "0"]) == 0
    assert "(50 steps)" in capsys.readouterr().out
    assert cli.run(["estimate", "digits", "--one-step", "--seconds", "0"]) == 0
    assert "(1 step)" in capsys.readouterr().out


def test_the_table_says_what_more_devices_would_take():
    measured = estimates.Measurement("cpu", "float32", False, True, 6, 6, 1.0, 3_000, 200 * 2**20, 36)
    config = tiny(training__images=64 * 3_600)
    cost = replace(estimate(config, seconds=0), measured=measured)
    console = Console(file=io.StringIO(), width=200)
    tables.show_estimate(console, "tiny", config, cost)
    shown = console.file.getvalue()
    assert "2.7 days for 230,400 images" in shown
    assert "8.0 hours on 8, 60.0 minutes on 64, if communication cost nothing" in shown
    assert "the whole batch (there is room for 36 images), 200.0 MiB each" in shown
    assert "recorded steps are faster than these" in shown
    cost = replace(cost, measured=replace(measured, graphs=False, batch=1, micro_batch=1, largest_micro_batch=1))
    tables.show_estimate(console := Console(file=io.StringIO(), width=200), "tiny", config, cost)
    shown = console.file.getvalue()
    assert "1 image, 1 in a pass" in shown
    assert "there is room for 1 image)" in shown
    assert "recorded" not in shown
