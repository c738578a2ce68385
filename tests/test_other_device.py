"""On a GPU that is not there: nothing mixes devices, and no step makes the host wait.

Nothing is compiled here: for a GPU, that takes one. Nor do threads read ahead, to which the pretence does not reach.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from helpers_one_step import one_step
from helpers_other_device import DEVICE, Copied, Mixed, other_device
from helpers_runs import tiny
from onefold.data import Loader, open_dataset
from onefold.metrics import Classifier, classifier_training, train_classifier
from onefold.metrics.classifier import ClassifierConfig
from onefold.networks import OneFold, build
from onefold.pixels import to_float
from onefold.training.config import Config
from onefold.training.datasets import open_data
from onefold.training.generator_monitor import GeneratorMonitor
from onefold.training.health import HealthMonitor
from onefold.training.one_run import with_one_step
from onefold.training.phases import phase_at
from onefold.training.run import Run
from onefold.training.state import TrainingState, seeded
from onefold.training.step import training_step
from test_no_waiting import METHODS, STEPS

# --- what is seen ---


def on_device() -> torch.Tensor:
    return torch.ones(3, 3, device=DEVICE)


SEEN: dict[str, tuple[Callable[[], object], type[Exception]]] = {
    "a sum": (lambda: on_device() + torch.ones(3), RuntimeError),
    "a product": (lambda: on_device() @ torch.ones(3, 3), RuntimeError),
    "a place": (lambda: on_device()[torch.tensor([0, 2])], Copied),
    "a source of random numbers": (lambda: torch.rand(3, generator=torch.Generator(), device=DEVICE), Mixed),
    "to the host": (lambda: on_device().cpu(), Copied),
    "to the device": (lambda: torch.ones(3).to(DEVICE), Copied),
    "of pinned memory, at once": (lambda: torch.ones(3).pin_memory().to(DEVICE), Copied),
    "of other memory, later": (lambda: torch.ones(3).to(DEVICE, non_blocking=True), Copied),
    "into the device": (lambda: on_device().copy_(torch.ones(3, 3)), Copied),
    "a number": (lambda: on_device().sum().item(), DataDependentOutputException),
    "numbers": (lambda: on_device().tolist(), DataDependentOutputException),
    "a choice": (lambda: 1 if on_device().isfinite().all() else 0, DataDependentOutputException),
    "a mask": (lambda: on_device()[on_device() > 0], DynamicOutputShapeException),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_mixes_or_waits_is_seen(name: str):
    act, error = SEEN[name]
    with other_device(), pytest.raises(error):
        act()


def test_what_is_allowed_has_its_device_and_type():
    with other_device():
        weights, x = torch.ones(3, 3, device=DEVICE, requires_grad=True), on_device()
        with torch.autocast("cuda", torch.bfloat16):
            y = x @ weights
            with torch.autocast("cuda", enabled=False):
                assert (x @ weights).dtype == torch.float32
        y.float().sum().backward()
        assert weights.grad is not None
        assert (y.dtype, y.device, weights.grad.device) == (torch.bfloat16, DEVICE, DEVICE)
        assert x.is_cuda
        assert not torch.ones(1).is_cuda


# --- steps ---


def one_run(**changes: Any) -> Config:
    return with_one_step(tiny(onerun__begin=0, **changes))


BF16 = {"training__precision": "bfloat16"}
MUON = {"training__optimizer": "muon"}
CASES: dict[str, Callable[[], Config]] = {
    **{name: lambda changes=changes: tiny(**{**BF16, **changes}) for name, (changes, _) in STEPS.items()},
    **{
        f"one step, {name}": lambda changes=changes: one_step(**{**BF16, **changes}, onestep__critic_warmup=0)
        for name, changes in METHODS.items()
    },
    "muon": lambda: tiny(**BF16, **MUON, training__recompute=True),
    "muon in float32": lambda: tiny(**MUON),
    "one run": lambda: one_run(**BF16),
    "one run, guided": lambda: one_run(onerun__guidance=2.0),
    "one step, selected": lambda: one_step(**BF16, onestep__selects=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_its_device(name: str):
    config, images = CASES[name](), STEPS[name][1] if name in STEPS else 0
    with other_device() as mode:
        mode.waits = True
        network = build(config.network)
        state = TrainingState.fresh(config, DEVICE, network)
        assert network.device.type == "cpu", "which is the caller's"
        state.counters.images = images
        state.enter(phase_at(images, config))
        height, width = config.network.image_size
        x, y = torch.zeros(16, config.network.channels, height, width).to(DEVICE), torch.zeros(16).long().to(DEVICE)
        mode.waits = False
        for _ in range(2):
            values = training_step(state, x, y, config)
            state.window.add(values, skipped=state.skips.last)
        modules = [value for module in state.modules.values() for value in module.state_dict().values()]
        moments = [
            value
            for several in state.optimizers.values()
            for optimizer in several
            for each in optimizer.state.values()
            for value in each.values()
        ]
        assert moments
        told = [*values.values(), *state.window.sums.values(), state.skips.total, state.skips.in_row]
        assert {value.device for value in [*modules, *moments, *told]} == {DEVICE}
        assert {value.dtype for value in [*modules, *moments]} <= {torch.float32, torch.int64, torch.bool}


def test_attention_is_in_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    with other_device(waits=True):
        network = OneFold(tiny().network).to(DEVICE)
        seen: list[torch.dtype] = []
        plain = torch.nn.functional.scaled_dot_product_attention

        def attention(*parts: torch.Tensor) -> torch.Tensor:
            seen.extend(part.dtype for part in parts)
            return plain(*parts)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        x = torch.zeros(2, 1, 8, 8, device=DEVICE)
        for dtype in (torch.bfloat16, torch.float32):
            seen.clear()
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
                z = network.encode(x)
            assert set(seen) == {dtype}
            assert z.dtype == torch.float32


# --- beside the steps ---


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_come_to_the_device_without_waiting(in_memory: bool):
    with other_device(waits=True) as mode:
        loader = Loader(open_dataset("digits"), batch=16, seed=0, in_memory=in_memory, device=DEVICE)
        mode.waits = False
        for _ in range(2):
            x, y = next(loader)
            assert (x.device, x.dtype, y.device, y.dtype) == (DEVICE, torch.uint8, DEVICE, torch.int64)
            assert (x.shape, y.shape) == ((16, 1, 8, 8), (16,))
            assert to_float(x).device == DEVICE


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "guidance": 2.0},
        {"steps": 2, "solver": "heun"},
        {"steps": 1, "solver": "refine"},
        {"steps": 3, "solver": "refine"},
        {"steps": 2, "solver": "renoise"},
    ],
    ids=str,
)
def test_samples_come_from_the_device(options: dict[str, Any]):
    with other_device(waits=True):
        config = one_run().network
        network = OneFold(config).to(DEVICE).eval()
        images = network.sample(3, **options)
        assert isinstance(images, np.ndarray)
        assert images.shape == (3, 8, 8, 1)
        assert images.dtype == np.uint8


@pytest.mark.parametrize("kind", ["health", "generator"])
def test_a_monitor_looks_at_a_device(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with other_device(waits=True):
        config = one_run(**BF16, onerun__measured=64)
        state, run, (train, test) = TrainingState.fresh(config, DEVICE), Run(tmp_path, config), open_data(config.data)
        if kind == "health":
            found = HealthMonitor(run, test, DEVICE, warmup=0).measure(state, None)
            assert {"latent_std", "effective_rank", "gradient_cosine"} <= found.keys()
            return
        monkeypatch.setattr(Classifier, "sha256", "")  # of numbers, which there are none of here
        features = Classifier(ClassifierConfig.of((1, 8, 8), 10)).freeze().to(DEVICE)
        monitor = GeneratorMonitor(run, train, test, DEVICE, features, measured=64, warmup=0)
        assert {"frechet", "class_accuracy", "contrast"} <= monitor.measure(state, None).keys()


@pytest.mark.parametrize("classes", [2, 0])
def test_a_classifier_learns_on_the_device_without_waiting(classes: int, monkeypatch: pytest.MonkeyPatch):
    with other_device(waits=True) as mode:
        plain, steps = classifier_training.damage, 0

        def damage(x: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
            nonlocal steps
            steps, mode.waits = steps + 1, False  # from the first step on
            return plain(x, rng)

        monkeypatch.setattr(classifier_training, "damage", damage)
        images, labels = torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.zeros(12).long()
        made = train_classifier(images, labels if classes else None, classes=classes, epochs=2, device="cuda:0")
        assert {p.device for p in made.parameters()} == {DEVICE}
        assert steps == 12
        mode.waits = True
        assert made.features(images).device.type == "cpu"


def test_seeding_leaves_other_devices_alone(monkeypatch: pytest.MonkeyPatch):
    """`torch.manual_seed` would seed them, and nothing would put their state back."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    with seeded(3):
        first = torch.rand(2)
    torch.manual_seed(3)
    assert seeds == [3]
    assert torch.equal(first, torch.rand(2))
    train_classifier(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, classes=0, epochs=1)
    assert seeds == [3]
