"""DINOv2 and CLIP from folders of transformers: small ones with random weights, made here."""

import json
import logging
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics import from_file

transformers = pytest.importorskip("transformers")

SIDE = 28
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
CLIP = {**SIZES, "intermediate_size": 64, "projection_dim": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.25, 0.27]


def network(kind: str) -> Any:
    torch.manual_seed(0)
    match kind:
        case "dinov2":
            return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
        case "dinov2 with registers":
            return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES))
        case "clip":
            config = transformers.CLIPConfig(text_config=TEXT, vision_config=CLIP, projection_dim=16)
            return transformers.CLIPModel(config)
        case "clip, images alone":
            return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP))
        case _:
            return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))


def folder(path: Path, kind: str = "dinov2", **changes: object) -> Path:
    network(kind).save_pretrained(path)
    described = {"image_mean": MEAN, "image_std": STD, "do_center_crop": True, "size": {"shortest_edge": SIDE + 4}}
    described |= {"crop_size": {"height": SIDE, "width": SIDE}, **changes}
    (path / "preprocessor_config.json").write_text(json.dumps(described))
    return path


def pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def prepared(images: Tensor) -> Tensor:
    """By Pillow, channel by channel, in float."""
    resized = [
        np.asarray(Image.fromarray(channel.numpy().astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for channel in images.flatten(0, 1)
    ]
    x = torch.from_numpy(np.stack(resized)).clamp(0, 255).unflatten(0, images.shape[:2]) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("kind", "width"),
    [("dinov2", 32), ("dinov2 with registers", 32), ("clip", 16), ("clip, images alone", 16), ("unprojected", 32)],
)
@torch.no_grad()
def test_features_are_those_of_the_network_on_images_prepared_as_its_folder_says(tmp_path: Path, kind: str, width: int):
    path = folder(tmp_path / "net", kind)
    extractor, x = from_file(path), pictures(5, 3, 40, 24)
    original = network(kind).eval()
    if kind == "clip":
        vision = original.vision_model(pixel_values=prepared(x))
        expected = original.visual_projection(vision.pooler_output)
    else:
        output = original(pixel_values=prepared(x))
        expected = output.image_embeds if kind == "clip, images alone" else output.pooler_output
    assert (extractor.width, extractor.classes, extractor.name) == (width, 0, "net")
    assert extractor.sha256 == sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert extractor.resize.startswith(f"bicubic, antialiased, to {SIDE} × {SIDE}; less 0.48 0.45 0.4, over 0.26")
    for batch in (2, 64):
        torch.testing.assert_close(extractor.features(x, batch), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path):
    path = folder(tmp_path / "net")
    network("dinov2").half().save_pretrained(path)
    x = pictures(3, 3, 40, 24)
    expected = network("dinov2").half().float().eval()(pixel_values=prepared(x)).pooler_output
    torch.testing.assert_close(from_file(path).features(x), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": SIDE},
        {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}},
        {"do_center_crop": False, "size": {"shortest_edge": SIDE}},
        {"do_center_crop": False, "size": SIDE},
    ],
    ids=str,
)
def test_sizes_are_read_in_each_of_their_forms(tmp_path: Path, changes: dict[str, object]):
    assert f"to {SIDE} × {SIDE};" in from_file(folder(tmp_path / "net", **changes)).resize


def test_it_opens_the_same_file_only(tmp_path: Path):
    path = folder(tmp_path / "net")
    found = sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert from_file(path, found.upper()).sha256 == found
    with pytest.raises(UserError, match=r"model\.safetensors: SHA-256 is .*, not 00ff"):
        from_file(path, "00ff")


def test_wrong_folders_are_one_line(tmp_path: Path):
    whole = folder(tmp_path / "whole")

    def broken(name: str, damage: Any) -> Path:
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name)
        return tmp_path / name

    def described(**changes: object) -> Any:
        return lambda path: (path / "preprocessor_config.json").write_text(
            json.dumps({"size": SIDE, "image_mean": MEAN, "image_std": STD} | changes)
        )

    def other_kind(path: Path) -> None:
        (path / "config.json").write_text(json.dumps({"model_type": "bert"}))

    def without_a_weight(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "model.safetensors")
        weights.pop("layernorm.weight")
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})

    def wider(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))

    wrong = [
        (broken("bare", lambda path: (path / "model.safetensors").unlink()), "holds no .safetensors files"),
        (broken("pickle", lambda path: (path / "model.safetensors").rename(path / "model.bin")), "no .safetensors"),
        (broken("two", lambda path: shutil.copy(path / "model.safetensors", path / "b.safetensors")), "holds 2"),
        (broken("unsaid", lambda path: (path / "preprocessor_config.json").unlink()), "preprocessor.*no such file"),
        (broken("oblong", described(size={"height": 28, "width": 14})), "no square size"),
        (broken("grey", described(image_mean=[0.5])), "no square size, image_mean and image_std of 3"),
        (broken("zero", described(image_std=[0, 1, 1])), "no square size"),
        (broken("list", lambda path: (path / "preprocessor_config.json").write_text("[]")), "no JSON object"),
        (broken("text", lambda path: (path / "config.json").write_text("{")), r"config\.json: is no JSON"),
        (broken("bert", other_kind), "model_type 'bert'; give one of dinov2, "),
        (broken("less", without_a_weight), "its weights lack layernorm.weight"),
        (broken("wider", wider), "transformers cannot open it"),
    ]
    for path, cause in wrong:
        with pytest.raises(UserError, match=cause) as error:
            from_file(path)
        assert "\n" not in str(error.value)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'onefold\[features\]'"):
        from_file(path)


class Kept(logging.Handler):
    """Messages, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_loading_says_nothing_and_leaves_the_messages_of_transformers_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Of a whole CLIP, whose half for text is not used."""
    path, kept, own = folder(tmp_path / "net", "clip"), Kept(), transformers.utils.logging
    own.set_verbosity_info()
    own.enable_progress_bar()
    own.add_handler(kept)
    try:
        capfd.readouterr()
        from_file(path)
        assert not kept.messages
        assert capfd.readouterr() == ("", "")
        assert own.get_verbosity() == own.INFO
        assert own.is_progress_bar_enabled()
    finally:
        own.remove_handler(kept)
        own.set_verbosity_warning()
