"""Left and right: images of one's own are mirrored only if somebody asks for it."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_images import noise
from onefold.cli import run as command
from onefold.data import as_dataset, open_dataset
from onefold.recipes import RECIPES, recipe
from onefold.training.prepare import fit_to_data, mirror_note

SMALL = ["--steps", "1", "--training.batch", "8", "--network.depth", "1", "--network.width", "32", "--network.heads=2"]


@pytest.fixture
def arrows(tmp_path: Path) -> str:
    np.savez(tmp_path / "arrows.npz", images=noise(40, 16, 16, 3), labels=np.arange(40) % 2)
    return str(tmp_path / "arrows.npz")


@pytest.mark.parametrize("options", [[], ["--objective.flip", "True"], ["--objective.flip", "False"]])
def test_a_folder_of_ones_own_is_mirrored_on_request_alone(
    options: list[str], arrows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command(["train", "cifar10", "--data", arrows, "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["objective"]["flip"] is (options[-1:] == ["True"])
    captured = capsys.readouterr()
    said = "images are not mirrored" in captured.out + captured.err
    assert said is (not options), "who has chosen need not be told"


@pytest.mark.parametrize("name", ["cifar10", "imagenet256-s"])
def test_a_recipe_mirrors_its_own_data_wherever_they_lie(name: str):
    data = as_dataset((noise(20, 32, 32, 3), np.arange(20) % 2))
    own = recipe(name).data.source
    for source in (own, f"/elsewhere/{own}"):
        config = recipe(name, **{"data.source": source})
        fitted = fit_to_data(config, data)
        assert fitted.objective.flip is True
        assert "--objective.flip False" in (mirror_note(config, fitted) or "")
    for source in ("photos.zip", f"{own}.zip", "Faces (a Python object)"):
        assert fit_to_data(recipe(name, **{"data.source": source}), data).objective.flip is False


def test_what_was_decided_stays_decided():
    data = as_dataset((noise(20, 32, 32, 3), np.arange(20) % 2))
    once = fit_to_data(recipe("cifar10", **{"data.source": "photos.zip"}), data)
    assert fit_to_data(once, data) == once
    assert mirror_note(once, once) is None


def test_digits_are_never_mirrored():
    assert fit_to_data(recipe("digits"), open_dataset("digits")).objective.flip is False
    assert all(make().objective.flip is None for make in RECIPES.values()), "the data decide"
