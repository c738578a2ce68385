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
from onefold import settings
from onefold.errors import UserError
from onefold.networks import NETWORKS
from onefold.networks.trunk import Trunk
from onefold.objectives.losses import Losses
from onefold.training.config import Config
from onefold.training.phases import PHASES, phases_of, training_flops
from onefold.training.step import training_step

PHASES_OF_ITS_OWN = {name: PHASES.pop(name) for name in ("aligned_to_images", "aligned_to_cleaner_latents")}
NETWORKS_OF_ITS_OWN = {name: NETWORKS.pop(name) for name in list(NETWORKS) if name.startswith("one_network_with")}
OF_ITS_OWN = ("registers", "aligned-images", "aligned-latents")


def scrambled(module: torch.nn.Module, seed: int = 1) -> None:
    """Random weights everywhere: an untrained trunk is the identity, whose blocks are all alike."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.data.normal_(std=0.2)


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


def test_worth_is_read_between_the_plain_runs():
    plain = {count: 30 / math.sqrt(count) for count in (200, 100, 400)}
    for images in (100, 130, 200, 300, 400):
        assert benchmark.worth(30 / math.sqrt(images), plain) == pytest.approx(images)
    assert benchmark.worth(30 / math.sqrt(1600), plain) == pytest.approx(400), "that or more"
    assert benchmark.worth(30 / math.sqrt(10), plain) == pytest.approx(100), "that or less"
    bent = {100: 8.0, 200: 4.0, 400: 1.0}
    assert benchmark.worth(4.0, bent) == pytest.approx(200), "the plain recipe is worth as many images as it saw"
    assert benchmark.worth(2.0, bent) == pytest.approx(200 * math.sqrt(2))


def test_plain_runs_that_come_no_nearer_say_so():
    with pytest.raises(SystemExit, match="200 images come no nearer than 100; give a larger --budget"):
        benchmark.worth(3.0, {100: 4.0, 200: 4.0, 400: 2.0})


def flat(config: Config) -> dict[str, object]:
    found: dict[str, object] = {}

    def collect(values: dict[str, object], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    collect(json.loads(settings.to_json(config)), "")
    return found


@pytest.mark.parametrize("arm", benchmark.ARMS)
def test_an_arm_differs_from_plain_by_what_it_names_alone(arm: str):
    plain, config = (flat(benchmark.configured(name, 3, 640, {})) for name in ("plain", arm))
    differing = {name for name in plain if plain[name] != config[name]}
    implied = {"network.latent_channels"} if arm == "coarser-patch" else set()
    assert differing == set(benchmark.ARMS[arm]) | implied


def test_lengths_follow_the_budget():
    training = benchmark.configured("plain", 3, 6_400, {}).training
    assert (training.images, training.warmup, training.log_every) == (6_400, 320, 320)
    assert (training.health_every, training.sample_every, training.checkpoint_every) == (1_600, 6_400, 3_200)
    assert training.seed == 3
    assert training.compile == "no", "at any length: a compiled arm would have other rounding"


def test_min_snr_weighs_as_much_as_uniform_weights_do():
    """E min(t²/(1−t)², 5) over uniform t, by quadrature."""
    t = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    mean = (t / (1 - t)).square().clamp(max=5).mean().item()
    assert mean * benchmark.ARMS["min-snr"]["objective.denoising_weight"] == pytest.approx(1, abs=0.01)


def test_sizes_are_factors_and_shared_settings_hold_for_all():
    shared = {"network.latent_channels": 8, "network.width": 64}
    assert benchmark.configured("half-channels", 0, 640, shared).network.latent_channels == 4
    coarse = benchmark.configured("coarser-patch", 0, 640, shared).network
    assert (coarse.patch, coarse.latent_channels, coarse.width, coarse.tokens) == (4, 32, 64, 4)
    shared = {"network.patch": 4, "network.latent_channels": 8, "network.image_size": (28, 28)}
    coarse = benchmark.configured("coarser-patch", 0, 640, shared).network
    assert (coarse.patch, coarse.latent_channels) == (7, 24), "392 latent values become 384"
    oblong = {"network.patch": 4, "network.latent_channels": 8, "network.image_size": (12, 16)}
    with pytest.raises(SystemExit, match="needs a larger patch than 4 that fits 4 pixels"):
        benchmark.configured("coarser-patch", 0, 640, oblong)


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


def test_the_arm_with_registers_begins_as_the_others_do():
    plain, network = (fresh(small(arm)).network.state_dict() for arm in ("plain", "registers"))
    assert network.keys() - plain.keys() == {"trunk.registers"}
    assert all(torch.equal(value, network[name]) for name, value in plain.items())


def test_registers_have_no_position():
    trunk, plain = benchmark.RegisteredTrunk(32, 2, 2, 3, 4), Trunk(32, 2, 2, 3, 4)
    assert torch.equal(trunk.table[:, benchmark.REGISTERS :], plain.table), "places stay as they are"
    assert torch.equal(trunk.table[0, : benchmark.REGISTERS], torch.ones_like(trunk.table[0, : benchmark.REGISTERS]))
    assert not trunk.table[1, : benchmark.REGISTERS].any(), "and registers are turned by no angle"


# --- representation loss ----------------------------------------------------------------------------------------------


def projecting(arm: str) -> tuple[benchmark.AlignedPhase, benchmark.WithProjector, benchmark.WithProjector]:
    """The arm's phase, and its network and average, scrambled and unlike each other."""
    config = small(arm)
    phase, state = phases_of(config)[0], fresh(config)
    network, average = state.network, state.modules["average-0"]
    assert isinstance(phase, benchmark.AlignedPhase)
    assert isinstance(network, benchmark.WithProjector)
    assert isinstance(average, benchmark.WithProjector)
    scrambled(network, 1)
    scrambled(average, 2)
    return phase, network, average


def test_the_network_with_a_projector_denoises_as_one_network_to_the_bit():
    network, plain = projecting("aligned-images")[1], fresh(small("plain")).network
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("projector")}
    plain.load_state_dict(own)
    z, z_t, t, y = torch.randn(3, 16, 4), torch.randn(5, 16, 4), torch.rand(5), torch.arange(5)
    found, expected = network.decode_and_denoise(z, z_t, t, y), plain.decode_and_denoise(z, z_t, t, y)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert network.middle is not None
    torch.testing.assert_close(network.middle, network.denoising_hidden(z_t, t, y)[1])  # the second of four blocks
    with torch.no_grad():
        network.decode_and_denoise(z, z_t, t, y)
    assert network.middle is None, "kept for training alone"


def losses_of(arm: str, start: int = 0, stop: int = 16) -> tuple[Losses, Losses, benchmark.WithProjector]:
    """Those of a part of a batch with and without the representation loss, and the network."""
    phase, network, average = projecting(arm)
    x, y = batch()
    draws = phase.parts[0].draw(16, torch.Generator().manual_seed(0)).part(start, stop)
    part = x[start:stop], y[start:stop], draws
    plain = super(benchmark.AlignedPhase, phase).loss(network, average, *part)
    return phase.loss(network, average, *part), plain, network


@pytest.mark.parametrize("arm", ["aligned-images", "aligned-latents"])
def test_the_representation_loss_teaches_the_blocks_below(arm: str):
    losses, plain, network = losses_of(arm)
    alone = losses.total - plain.total
    assert alone.item() == pytest.approx(benchmark.ALIGNMENT * losses.parts["alignment"].item(), rel=1e-4)
    alone.backward()
    below = [p.grad for p in network.trunk.blocks[1].parameters() if p.ndim == 2]
    assert all(grad is not None and grad.norm() > 1e-4 for grad in below)
    assert all(p.grad is not None and p.grad.norm() > 1e-4 for p in network.projector.parameters())
    above = [p.grad for p in network.trunk.blocks[3].parameters()]
    assert all(grad is None or grad.norm() < 1e-5 for grad in above), "the difference of two equal losses has rounding"


@pytest.mark.parametrize("arm", ["aligned-images", "aligned-latents"])
def test_parts_of_a_batch_add_up_to_it(arm: str):
    whole, *parts = (losses_of(arm, *span)[0] for span in ((0, 16), (0, 4), (4, 16)))
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-4)


@pytest.mark.parametrize("arm", ["aligned-images", "aligned-latents"])
def test_the_representation_loss_is_one_less_the_cosine(arm: str):
    """Written out, of the last block but one of the average and the second of four of the network."""
    phase, network, average = projecting(arm)
    x, y = batch(4)
    draws = phase.parts[0].draw(4, torch.Generator().manual_seed(0))
    draws = draws._replace(unlabelled=torch.arange(8).reshape(4, 2) % 3 == 0)
    found = phase.loss(network, average, x, y, draws).parts["alignment"].item()
    distances: list[float] = []
    for k in range(4):
        for j in range(2):
            t, eps = draws.t[k, j], draws.eps[k, j]
            label = torch.tensor([10 if draws.unlabelled[k, j] else int(y[k])])
            z_t = t * network.encode(x[k : k + 1]) + (1 - t) * eps
            seen = network.projector(network.denoising_hidden(z_t, t[None], label)[1])[0]
            if arm == "aligned-images":
                wanted = average.features(x[k : k + 1])[2][0]
            else:
                later = (1 + t) / 2
                cleaner = later * average.encode(x[k : k + 1]) + (1 - later) * eps
                wanted = average.denoising_hidden(cleaner, later[None], label)[2][0]
            distances += [
                1 - torch.dot(a, b).item() / (a.norm() * b.norm()).item() for a, b in zip(seen, wanted, strict=True)
            ]
    assert found == pytest.approx(sum(distances) / len(distances), rel=1e-3)


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


def test_what_would_fail_after_training_is_refused_before(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        benchmark.main(features=tmp_path / "none.safetensors", out=tmp_path)
    with pytest.raises(SystemExit, match="--seeds: 0 is not positive"):
        benchmark.main(seeds=0, out=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_study_s_folder_is_refused(tmp_path: Path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r": holds a study; choose another --out$"):
        benchmark.main(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_a_finished_run_is_measured_once_and_an_interrupted_one_goes_on(tmp_path: Path):
    out, json_file = tmp_path / "runs", tmp_path / "record.json"
    tiny_settings = ("network.width=32", "network.depth=2", "network.heads=2", 'training.device="cpu"')
    change = (*tiny_settings, "training.batch=16", "sampler.steps=2")

    def go(images: int = 100, *more: str) -> None:
        options = {"budget": 64, "images": images, "arms": ("registers",), "out": out, "json_file": json_file}
        benchmark.main(change=(*change, *more), **options)

    go()
    record = json.loads(json_file.read_text())
    assert list(record["arms"]) == ["plain", "registers"]
    assert list(record["plain"]) == ["64", "32", "128"]
    row = record["arms"]["registers"]
    assert row["arithmetic"][0] > 1
    assert row["worth per operation"][0] == pytest.approx(row["worth"][0] / row["arithmetic"][0])
    assert record["arms"]["plain"]["worth"] == [pytest.approx(1)]
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/evaluation/*.json")}
    go()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/evaluation/*.json")} == written
    assert json.loads(json_file.read_text()) == record
    go(90)
    assert json.loads(json_file.read_text())["arms"]["plain"]["records"][0]["protocol"]["generated_images"] == 90
    with pytest.raises(UserError, match=r"^objective\.draws: 2, but the run in .* has 4; choose another --out$"):
        go(100, "objective.draws=2")
