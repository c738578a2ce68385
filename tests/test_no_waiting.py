"""No step makes the host wait for the device: it may prepare the next ones while the device computes."""

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers_one_step import one_step, teacher_for
from helpers_runs import batch, tiny
from onefold.training.config import Config
from onefold.training.log import Window
from onefold.training.phases import phase_at
from onefold.training.state import TrainingState
from onefold.training.step import training_step

aten = torch.ops.aten

WAITS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select}
WAITS |= {aten.unique_consecutive, aten._unique2, aten.lift_fresh}
"""Operations whose result the host has to know, or (the last) that copy numbers of the host's to the device."""
CHOOSES = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_}
"""They wait if they choose by a mask."""


class Waited(AssertionError):
    """The host would have waited."""


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU's host would wait, as far as that can be seen on a CPU; copies between the two cannot."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        masks = args[1] if func.overloadpacket in CHOOSES else []
        if func.overloadpacket in WAITS or any(mask is not None and mask.dtype is torch.bool for mask in masks):
            raise Waited(str(func))
        if func is aten.repeat_interleave.Tensor:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str) -> Generator[None]:
    """On a GPU torch itself says where the host waits."""
    if device == "cpu":
        with NoWaiting():
            yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the mode is a prototype, it says
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])

x = torch.tensor([1.0, 2.0])
ASKED = {
    "item": lambda: x.sum().item(),
    "float": lambda: float(x[0]),
    "if": lambda: 1 if x.isfinite().all() else 0,
    "mask": lambda: x[x > 1],
    "masked assignment": lambda: x.clone().index_put_((x > 1,), torch.zeros(())),
    "nonzero": lambda: x.nonzero(),
    "equal": lambda: torch.equal(x, x.clone()),
    "repeats": lambda: x.repeat_interleave(x.long()),
    "from the host": lambda: torch.tensor([0, 1]),
}


@pytest.mark.parametrize("name", ASKED)
def test_waiting_is_seen(name: str):
    with pytest.raises(Waited), NoWaiting():
        ASKED[name]()


EXTRAS = {
    "objective__draws": 2,
    "objective__flip": True,
    "objective__decoder_noise": 0.5,
    "objective__perceptual_weight": 0.1,
    "objective__weighting": "min_snr",
    "objective__time__kind": "logit_normal",
}
THREE = {"network__architecture": "three_networks", "network__depth": 3}
STEPS = {
    "one network": (EXTRAS, 0),
    "naive": ({"objective__target": "gradient", "objective__loss": "velocity", "objective__through": True}, 0),
    "unconditional": ({"network__classes": 0}, 0),
    "bfloat16": ({"training__precision": "bfloat16"}, 0),
    "micro-batches": ({"training__micro_batch": 5}, 0),
    "pixels": ({"network__architecture": "pixels"}, 0),
    "autoencoder": ({**THREE, **EXTRAS}, 0),
    "diffusion": ({**THREE, **EXTRAS}, 80),
}


@DEVICES
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_does_not_wait(kind: str, optimizer: str, device: str):
    changes, images = STEPS[kind]
    config = tiny(training__optimizer=optimizer, **changes)
    state = TrainingState.fresh(config, torch.device(device))
    state.counters.images = images
    state.enter(phase_at(images, config))
    assert (state.counters.phase == 1) == (kind == "diffusion")
    images_and_labels = [part.to(device) for part in batch()]
    training_step(state, *images_and_labels, config)
    with no_waiting(device):
        for _ in range(2):
            values = training_step(state, *images_and_labels, config)
            state.window.add(values, skipped=state.skips.in_row > 0)
    assert is_told(state.window, 2, values)


METHODS: Mapping[str, dict[str, Any]] = {
    "ratio": {},
    "level normalised": {"onestep__ratio__level_normalised": True, "onestep__ratio__weighting": "noise"},
    "score": {"onestep__method": "score"},
    "dmd": {"onestep__method": "dmd"},
    "adversarial": {"onestep__method": "dmd", "onestep__score__adversarial": 0.5},
    "renoised": {"onestep__renoised": 0.3, "objective__flip": True, "onestep__upkeep_share": 0.5},
    "micro-batches": {"training__micro_batch": 5},
    "bfloat16": {"training__precision": "bfloat16"},
    "three networks": THREE,
    "pixels": {"network__architecture": "pixels"},
}


@DEVICES
@pytest.mark.parametrize("method", METHODS)
def test_a_one_step_step_does_not_wait(method: str, device: str):
    config: Config = one_step(**METHODS[method], onestep__critic_warmup=0)
    teacher = teacher_for(config).to(device)
    state = TrainingState.fresh(config, torch.device(device), teacher)
    images_and_labels = [part.to(device) for part in batch()]
    training_step(state, *images_and_labels, config)
    with no_waiting(device):
        for _ in range(2):
            values = training_step(state, *images_and_labels, config)
            state.window.add(values, skipped=state.skips.in_row > 0)
    assert "gradient_norm" in values, "the generator has moved too"
    assert {each["step"].item() for each in state.optimizers["network"][0].state.values()} == {3}
    assert is_told(state.window, 2, values)


def is_told(window: Window, steps: int, values: Mapping[str, Tensor]) -> bool:
    """Whether a window holds so many steps of all values."""
    return {name: count for name, (_, count) in window.to_json().items()} == dict.fromkeys(values, steps)
