"""The examples run as they are, at a small budget: each adds something to onefold from outside the package."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

import onefold
from helpers_runs import tiny
from onefold import cli, metrics, planner
from onefold.data import as_dataset
from onefold.networks import NETWORKS, Network
from onefold.objectives import DIVERGENCES
from onefold.sampling import SOLVERS
from onefold.training.config import DataConfig
from onefold.training.phases import PHASES

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A recipe that trains in a second, and registries that are afterwards as they were."""

    def recipe(name: str, **overrides: Any) -> onefold.Config:
        groups = {k: value for k, value in overrides.items() if isinstance(value, dict)}
        flat = {f"{k}.{inner}": v for k, group in groups.items() for inner, v in group.items()}
        return tiny().with_changes({k: v for k, v in overrides.items() if k not in groups} | flat)

    monkeypatch.setattr(onefold, "recipe", recipe)
    monkeypatch.chdir(tmp_path)
    registries: list[dict[str, Any]] = [NETWORKS, DIVERGENCES, SOLVERS, PHASES]
    before = [dict(registry) for registry in registries]
    yield
    for registry, was in zip(registries, before, strict=True):
        registry.clear()
        registry.update(was)


@pytest.fixture
def digits() -> str:
    """A trained run, where the examples look for one."""
    onefold.train(tiny(), "runs/digits", quiet=True)
    return "runs/digits"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_and_short():
    tried = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tried
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 55, path


def test_example_own_data():
    run = example("own_data").main(images=160)
    assert (run.config.network.classes, run.config.data.source) == (2, "Stripes (a Python object)")
    assert len(run.open_data()[0]) == 1000


def test_example_own_format():
    run = example("own_format").main(images=160)
    assert onefold.load_run(run.folder).open_data()[0].image_shape == (8, 8, 1)


def test_example_own_divergence(digits: str):
    run = example("own_divergence").main(images=64)
    assert onefold.load_run(run.folder).config.onestep.ratio.divergence == "chi_squared"
    assert run.network.sample(2).shape == (2, 8, 8, 1)


def test_the_own_divergence_teaches(digits: str):
    run = example("own_divergence").main(images=64)
    assert run.config.onestep.has_ratio


def test_the_own_divergence_is_the_one_of_its_formula():
    """Its weight is f″(r) r² and its loss has minus that as its slope."""
    import torch

    module = example("own_divergence")
    logit = torch.linspace(-3, 5, 17, dtype=torch.float64, requires_grad=True)
    module.generator_loss(logit).sum().backward()
    torch.testing.assert_close(logit.grad, -module.weight(logit.detach()))
    r = logit.detach()[:12].exp()
    torch.testing.assert_close(module.weight(logit.detach()[:12]), 2 * r**2)


def test_example_own_solver(digits: str, capsys: pytest.CaptureFixture[str]):
    example("own_solver").main()
    assert capsys.readouterr().out == "(4, 8, 8, 1)\n"
    assert cli.run(["sample", digits, "--n", "4", "--solver", "midpoint", "--steps", "3"]) == 0


def test_example_own_metric(digits: str):
    assert 0 <= example("own_metric").main(images=20) < 255


def test_example_own_network(capsys: pytest.CaptureFixture[str]):
    run = example("own_network").main(images=160)
    assert capsys.readouterr().out.endswith("True\n")
    assert type(Network.from_pretrained(run.folder)).__name__ == "LinearCodec"


def test_example_own_objective(monkeypatch: pytest.MonkeyPatch):
    module = example("own_objective")
    run = module.main(images=160)
    assert run.config.phases == ("mirror_invariant",)
    assert all(line["mirror"] >= 0 for line in run.history)
    assert run.history[-1]["mirror"] != run.history[0]["mirror"]


def test_example_own_logger():
    lines = example("own_logger").main(images=160)
    assert lines == onefold.load_run("runs/logged").history
    assert [line["images"] for line in lines] == [32, 64, 96, 128, 160]


def test_example_fine_tune(digits: str):
    theirs: dict[str, Tensor] = onefold.load_run(digits).network.state_dict()
    run = example("fine_tune").main(images=160)
    assert run.config.network.classes == 5
    assert run.network.state_dict()["labels.weight"].shape[0] == 6 < theirs["labels.weight"].shape[0]


def test_the_notebook_runs_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """Cell by cell, in one namespace, with a plan for seconds in place of minutes."""

    def plan(data: Any, **options: Any) -> Any:
        found = planner._config(as_dataset(data), DataConfig(str(data)), 2, (32, 1, 2), "cpu")
        changes = {"images": 320, "batch": 16, "precision": "float32", "warmup": 32, "log_every": 64}
        return SimpleNamespace(
            config=found.with_changes({f"training.{name}": value for name, value in changes.items()})
        )

    monkeypatch.setattr(onefold, "plan", plan)
    monkeypatch.setenv("ONEFOLD_CACHE", "cache")
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, epochs=1))
    namespace: dict[str, Any] = {}
    for cell in json.loads((EXAMPLES / "walk.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept in the repository"
            exec("".join(cell["source"]), namespace)
    assert namespace["fast"].config.phases == ("one_step",)
    assert namespace["record"]["protocol"]["steps"] == 1
    assert namespace["grid"](namespace["originals"]).size == (320, 32)


def test_the_documentation_shows_each_example_and_each_is_short():
    """By inclusion, in words that the formatter leaves alone."""
    page = (EXAMPLES.parent / "docs" / "extend.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'\n--8<-- "examples/{path.name}"\n' in page
        assert len(path.read_text(encoding="utf-8").splitlines()) < 50
