"""The networks in the package: images right after installation."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import onefold
from onefold import cli, metrics
from onefold.files import sha256_of
from onefold.metrics.record import Record
from onefold.networks.source import PACKAGED, packaged

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_digits_are_sampled_without_any_run(capsys: pytest.CaptureFixture[str]):
    network = onefold.OneFold.from_pretrained("digits")
    images = network.sample(200)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert metrics.class_accuracy(metrics.digits_classifier(), x, torch.arange(200) % 10) > 0.9
    assert network.sampler.steps == 1
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert cli.run(["sample", "digits", "-n", "4"]) == 0
    assert capsys.readouterr().out == "digits-samples.png: 4 images, 1 step\n"
    with Image.open("digits-samples.png") as image:
        assert np.array(image)[1:49, 1:49].reshape(8, 6, 8, 6).max((1, 3)).tolist() == images[0, ..., 0].tolist()


def test_a_folder_of_that_name_goes_first(capsys: pytest.CaptureFixture[str]):
    other = onefold.OneFold(onefold.NetworkConfig(width=32, depth=1, heads=2))
    other.save_pretrained("digits")
    assert onefold.OneFold.from_pretrained("digits").config.width == 32
    Path("digits/config.json").unlink()
    assert cli.run(["sample", "digits"]) == 2
    error = capsys.readouterr().err
    assert "digits: no config.json there" in error
    assert "to sample with the network digits of the package, go where there is no such folder" in error
    with pytest.raises(onefold.UserError, match=r"no config\.json there; give the folder of a run"):
        onefold.OneFold.from_pretrained("letters")


@pytest.mark.parametrize("name", packaged())
def test_each_has_its_record_and_is_small(name: str):
    folder = PACKAGED / name
    model = folder / "model.safetensors"
    assert model.stat().st_size <= 2.5 * 2**20
    assert {value.dtype for value in load_file(model).values()} == {torch.float16}
    record = Record.read(folder / "record.json")
    assert record["subject"]["model_sha256"] == sha256_of(model), "the record is of these weights"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| frechet distance | {record['frechet_distance']:.4g} |" in text
    assert "python benchmarks/packaged.py runs/" in text
    assert "onefold onestep runs/" in text
    assert "/tmp/" not in text + json.dumps(record)


def test_the_wheel_holds_them(tmp_path: Path):
    hatch = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    wheel = Path(next(hatch.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    for wanted in (
        *(f"pretrained/{name}/{part}" for name in packaged() for part in ("model.safetensors", "config.json")),
        "pretrained/digits/record.json",
        "export/pipeline/pipeline.py",
        "export/pipeline/network.py",
    ):
        assert f"onefold/{wanted}" in names
