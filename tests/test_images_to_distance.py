"""benchmarks/images_to_distance.py: what an arm is worth, and the parts that the package does not have."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import images_to_distance as benchmark
from helpers_runs import batch, fresh, tensors, tiny
from onefold.networks import NETWORKS
from onefold.networks.trunk import Trunk
from onefold.objectives.losses import Losses
from onefold.training.config import Config
from onefold.training.phases import PHASES, phases_of, training_flops
from onefold.training.step import training_step

PHASES_OF_ITS_OWN = {name: PHASES.pop(name) for name in ("aligned_to_images", "aligned_to_cleaner_latents")}
NETWORKS_OF_ITS_OWN = {name: NETWORKS.pop(name) for name in list(NETWORKS) if name.startswith("one_network_with")}
OF_ITS_OWN = ("registers", "aligned-images", "aligned-latents")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Its networks and phases, which other tests do not know."""
    PHASES.update(PHASES_OF_ITS_OWN)
    NETWORKS.update(NETWORKS_OF_ITS_OWN)
    yield
    for name in PHASES_OF_ITS_OWN:
        del PHASES[name]
    for name in NETWORKS_OF_ITS_OWN:
        del NETWORKS[name]
    phases_of.cache_clear()


def small(arm: str, **changes: object) -> Config:
    sizes = {"network.depth": 4, "objective.draws": 2, "training.optimizer": "adamw"}
    return tiny().with_changes({**sizes, **benchmark.ARMS[arm], **changes})


# --- worth ------------------------------------------------------------------------------------------------------------


def test_worth_is_read_from_the_line_of_the_plain_runs():
    plain = {count: [30 / math.sqrt(count)] for count in (100, 200, 400)}
    assert benchmark.worth(30 / math.sqrt(300), plain) == pytest.approx(300)
    assert benchmark.worth(30 / math.sqrt(1600), plain) == pytest.approx(1600), "beyond them, too"
    noisy = {100: [4.0, 5.0], 400: [2.0, 2.5]}
    assert benchmark.worth(math.sqrt(5.0), noisy) == pytest.approx(400), "the line passes through geometric means"


@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_every_arm_changes_what_it_says_and_no_length(arm: str):
    plain, config = (benchmark.configured(name, 3, 640, {}) for name in ("plain", arm))
    assert config.training.images == 640
    assert config.training.seed == 3
    assert (config == plain) == (arm == "plain")
    assert config.network.tokens * config.network.latent_channels > 0


def test_sizes_are_factors_and_shared_settings_hold_for_all():
    shared = {"network.latent_channels": 8, "network.width": 64}
    assert benchmark.configured("half-channels", 0, 640, shared).network.latent_channels == 4
    coarse = benchmark.configured("coarser-patch", 0, 640, shared).network
    assert (coarse.patch, coarse.latent_channels, coarse.width, coarse.tokens) == (4, 32, 64, 4)
    shared = {"network.patch": 4, "network.latent_channels": 8, "network.image_size": (28, 28)}
    coarse = benchmark.configured("coarser-patch", 0, 640, shared).network
    assert (coarse.patch, coarse.latent_channels) == (7, 24), "392 latent values become 384"


# --- registers --------------------------------------------------------------------------------------------------------


def test_registers_are_read_by_the_other_tokens_and_leave_before_the_exit():
    torch.manual_seed(0)
    trunk = benchmark.RegisteredTrunk(32, 2, 2, 3, 4)
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.3)
    h, modulation = torch.randn(2, 12, 32, requires_grad=True), torch.randn(2, 6, 32)
    out = trunk(h, modulation)
    assert out.shape == h.shape
    assert [state.shape for state in trunk.hidden(h, modulation)] == [h.shape] * 2
    torch.testing.assert_close(trunk.norm(trunk.hidden(h, modulation)[-1]), out)
    out[:, 5].sum().backward()
    assert trunk.registers.grad is not None
    assert trunk.registers.grad.norm(dim=1).min() > 0, "each is attended to"


def test_registers_have_no_place():
    trunk, plain = benchmark.RegisteredTrunk(32, 2, 2, 3, 4), Trunk(32, 2, 2, 3, 4)
    assert torch.equal(trunk.table[:, benchmark.REGISTERS :], plain.table), "places stay as they are"
    assert torch.equal(trunk.table[0, : benchmark.REGISTERS], torch.ones_like(trunk.table[0, : benchmark.REGISTERS]))
    assert not trunk.table[1, : benchmark.REGISTERS].any(), "and registers are turned by no angle"


# --- representation loss ----------------------------------------------------------------------------------------------


def test_the_network_with_a_projector_denoises_as_one_network_to_the_bit():
    network, plain = (fresh(small(arm)).network for arm in ("aligned-images", "plain"))
    assert isinstance(network, benchmark.WithProjector)
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("projector")}
    plain.load_state_dict(own)
    z, z_t, t, y = torch.randn(3, 16, 4), torch.randn(5, 16, 4), torch.rand(5), torch.arange(5)
    found, expected = network.decode_and_denoise(z, z_t, t, y), plain.decode_and_denoise(z, z_t, t, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert network.middle is not None
    torch.testing.assert_close(network.middle, network.denoising_hidden(z_t, t, y)[1])  # the second of four blocks


@pytest.mark.parametrize("arm", ["aligned-images", "aligned-latents"])
def test_the_representation_loss_teaches_the_blocks_below_and_no_average(arm: str):
    config = small(arm)
    state = fresh(config)
    for module in (state.network, state.modules["average-0"]):
        torch.manual_seed(1)
        for p in module.parameters():
            p.data.normal_(std=0.2)
    part, (x, y) = phases_of(config)[0].parts[0], batch()
    draws = part.draw(16, torch.Generator().manual_seed(0))
    losses = part.loss(state.network, state.modules["average-0"], x, y, draws)
    assert isinstance(losses, Losses)
    plain = super(benchmark.AlignedPhase, phases_of(config)[0]).loss(
        state.network, state.modules["average-0"], x, y, draws
    )
    alone = losses.total - plain.total
    assert alone.item() == pytest.approx(benchmark.ALIGNMENT * losses.parts["alignment"].item(), rel=1e-4)
    alone.backward()
    network = state.network
    assert isinstance(network, benchmark.WithProjector)
    below = [p.grad for p in network.trunk.blocks[1].parameters() if p.ndim == 2]
    assert all(grad is not None and grad.norm() > 1e-4 for grad in below)
    assert all(p.grad is not None and p.grad.norm() > 1e-4 for p in network.projector.parameters())
    above = [p.grad for p in network.trunk.blocks[3].parameters()]
    assert all(grad is None or grad.norm() < 1e-5 for grad in above), "the difference of two equal losses has rounding"
    assert all(p.grad is None for p in state.modules["average-0"].parameters())


def test_what_is_predicted_is_the_image_or_the_latent_with_half_the_noise():
    """At t = 1 there is no noise to halve."""
    config = small("aligned-latents")
    phase, network = phases_of(config)[0], fresh(config).network
    assert isinstance(phase, benchmark.AlignedPhase)
    assert isinstance(network, benchmark.WithProjector)
    x, y = batch(4)
    draws = phase.parts[0].draw(4, torch.Generator().manual_seed(0))
    draws = draws._replace(t=torch.ones_like(draws.t))
    labels = torch.where(draws.unlabelled, 10, y[:, None]).flatten()
    z = network.encode(x).repeat_interleave(2, 0)
    expected = network.denoising_hidden(z, torch.ones(8), labels)[-2]
    torch.testing.assert_close(phase._wanted(network, x, y, draws), expected)
    half = phase._wanted(network, x, y, draws._replace(t=torch.zeros_like(draws.t)))
    middle = (z + draws.eps.flatten(0, 1)) / 2
    torch.testing.assert_close(half, network.denoising_hidden(middle, torch.full((8,), 0.5), labels)[-2])


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["plain", *OF_ITS_OWN])
def test_a_step_has_the_stated_operations(arm: str):
    config = small(arm, **{"network.width": 64})
    state = fresh(config)
    training_step(state, *batch(), config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training_step(state, *batch(), config)
    assert counter.get_total_flops() / 16 == pytest.approx(training_flops(config), rel=0.05)


@pytest.mark.parametrize("arm", OF_ITS_OWN)
def test_a_step_trains_its_own_parts(arm: str):
    config = small(arm)
    state = fresh(config)
    before = tensors(state)
    training_step(state, *batch(), config)
    after = tensors(state)
    own = [name for name in before if name.startswith("network.") and ("registers" in name or "projector" in name)]
    assert own
    assert all(not torch.equal(before[name], after[name]) for name in own)


def test_a_finished_run_is_measured_once_and_the_record_has_every_row(tmp_path: Path):
    out, json_file = tmp_path / "runs", tmp_path / "record.json"
    tiny_settings = ("network.width=32", "network.depth=2", "network.heads=2", 'training.device="cpu"')
    change = (*tiny_settings, "training.batch=16", "sampler.steps=2", 'training.compile="no"')

    def go() -> None:
        benchmark.main(budget=64, images=100, arms=("registers",), change=change, out=out, json_file=json_file)

    go()
    record = json.loads(json_file.read_text())
    assert list(record["arms"]) == ["plain", "registers"]
    assert list(record["plain"]) == ["64", "32", "128"]
    row = record["arms"]["registers"]
    assert row["arithmetic"][0] > 1
    assert row["worth per operation"][0] == pytest.approx(row["worth"][0] / row["arithmetic"][0])
    written = {path: path.stat().st_mtime_ns for path in out.rglob("benchmark.json")}
    assert len(written) == 4
    go()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("benchmark.json")} == written
    assert json.loads(json_file.read_text()) == record
