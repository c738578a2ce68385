"""Shapes are types: in tests, and only there, jaxtyping and beartype check those in the package's signatures.

Plain types are left to the static checker (and to the functions that refuse wrong input with a UserError).
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

assert "onefold" not in sys.modules, "onefold was imported before its shapes could be checked"
install_import_hook("onefold", "conftest.shapes_checked")

torch.set_num_threads(min(2, torch.get_num_threads()))
hypothesis.settings.register_profile("onefold", deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", deadline=None, derandomize=False, print_blob=True)
NIGHTLY = bool(os.environ.get("ONEFOLD_NIGHTLY"))  # `make nightly`: many more cases, and others each time
hypothesis.settings.load_profile("nightly" if NIGHTLY else "onefold")

Module = TypeVar("Module", bound=torch.nn.Module)


@pytest.fixture
def phases_as_before() -> Iterator[None]:
    """Phases that a test registers are gone after it."""
    from onefold.training.phases import PHASES, phases_of

    before = dict(PHASES)
    yield
    PHASES.clear()
    PHASES.update(before)
    phases_of.cache_clear()


def has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))


def shapes_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    hints = inspect.get_annotations(function)
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    return beartype(function)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For tests that compile: torch.compile cannot trace the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arithmetic in float64, also where a network asks for float32."""
    from onefold.networks import trunk

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(trunk, "torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))


def randomised(network: Module, seed: int = 0) -> Module:
    """The module with all its weights drawn from the seed: at their start many are zero and hide what they multiply.

    Matrices keep the size of what they multiply, roughly; the scales of norms lie around 1, biases around 0.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(drawn / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.3 * drawn + name.endswith("weight"))
    return network
