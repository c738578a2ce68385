from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers_runs import fresh, tiny
from onefold.estimate import estimate
from onefold.recipes import RECIPES, recipe
from onefold.training.config import Config
from onefold.training.loop import training_step

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
    ],
    ids=["few tokens", "many tokens", "four draws", "no target", "perceptual"],
)
def test_a_training_step_has_the_estimated_operations(config: Config):
    """To 5 %: the estimate takes every backward pass for two forward ones, also that of the first layer."""
    state = fresh(config)
    x, y = images(config, 8)
    found = counted(lambda: training_step(state, x, y, config)) / 8
    assert estimate(config, seconds=0).flops_per_image == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    "sampler",
    [{"steps": 1}, {"steps": 5}, {"steps": 5, "guidance": 2.0}, {"steps": 5, "solver": "heun"}],
    ids=str,
)
@pytest.mark.parametrize("config", [FEW_TOKENS, MANY_TOKENS], ids=["few tokens", "many tokens"])
def test_a_sample_has_the_estimated_operations(config: Config, sampler: dict[str, object]):
    """To 5 %; Heun's method evaluates the network twice in each interval but the last."""
    config = config.with_changes({f"sampler.{name}": value for name, value in sampler.items()})
    network = fresh(config).published
    found = counted(lambda: network.sample(4, **sampler)) / 4
    assert estimate(config, seconds=0).flops_per_sample == pytest.approx(found, rel=0.05)


# --- parameters, memory, latents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("imagenet256-s", 42), ("imagenet256-m", 118), ("imagenet256-b", 205)])
def test_the_papers_sizes(name: str, millions: float):
    """Within 3 % of the networks of Wang & Zhang, 2025."""
    cost = estimate(recipe(name), seconds=0)
    assert cost.parameters == pytest.approx(millions * 1e6, rel=0.03)
    assert cost.share > 0.95
    assert cost.latent_ratio == 256 * 32 / (256 * 256 * 3)
    assert cost.images == 50 * 1_281_167


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("half_lives", [(32,), (32, 64, 128)])
def test_the_state_takes_the_estimated_memory(optimizer: str, half_lives: tuple[int, ...]):
    config = tiny(training__optimizer=optimizer, training__ema_half_lives=half_lives)
    state = fresh(config)
    training_step(state, *images(config, 16), config)
    values = [p for network in (state.network, *state.averages) for p in network.parameters()]
    values += state.network.parameters()  # the gradient has their size
    values += [value for each in state.optimizers for part in each.state.values() for value in part.values()]
    cost = estimate(config, seconds=0)
    assert cost.parameters == sum(p.numel() for p in state.network.parameters())
    assert cost.state_bytes == pytest.approx(sum(value.nbytes for value in values), rel=0.01)


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
    assert cost.seconds == pytest.approx(1_000 / cost.measured.images_per_second)


def test_a_measurement_uses_the_micro_batch():
    cost = estimate(tiny(training__micro_batch=4), seconds=0.01)
    assert cost.measured is not None
    assert cost.measured.micro_batch == 4


def test_an_unconditional_network_can_be_measured():
    assert estimate(tiny(network__classes=0), seconds=0.01).measured is not None
