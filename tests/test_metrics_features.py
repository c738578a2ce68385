"""Feature extractors: the shipped digits classifier, and networks in TorchScript and ONNX files."""

import struct
import sys
import warnings
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.metrics import class_accuracy, digits_classifier, frechet_distance, from_file
from onefold.metrics.external import ExternalExtractor


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    data = pytest.importorskip("onefold.data")
    return {name: data.read_all(data.open_dataset(name)) for name in ("digits", "digits:test")}


def noisy(images: Tensor, strength: float) -> Tensor:
    """Noise of this standard deviation on the range [−1, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 127.5 * strength * noise).round().clamp(0, 255).to(torch.uint8)


def test_digits_classifier_is_small_and_knows_the_test_images(digits):
    images, labels = digits["digits:test"]
    classifier = digits_classifier()
    assert class_accuracy(classifier, images, labels) >= 0.98
    assert class_accuracy(classifier, noisy(images, 0.2), labels) >= 0.95
    assert (classifier.classes, classifier.width) == (10, 64)
    assert len((files("onefold.metrics") / "digits_classifier.safetensors").read_bytes()) <= 400_000


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_digits_features_do_not_depend_on_the_batch_size(digits, batch):
    images = digits["digits:test"][0][:70]
    classifier = digits_classifier()
    torch.testing.assert_close(classifier.features(images, batch), classifier.features(images), rtol=1e-4, atol=1e-4)


def test_distance_grows_with_every_damage(digits):
    classifier, (train, _), (test, labels) = digits_classifier(), digits["digits"], digits["digits:test"]
    reference = classifier.features(train)

    def distance(images: Tensor) -> float:
        return frechet_distance(reference, classifier.features(images))

    real = distance(test)
    blurred = nn.functional.avg_pool2d(test.float(), 3, 1, 1).round().to(torch.uint8)
    by_noise = [distance(noisy(test, s)) for s in (0.1, 0.2, 0.4, 0.8)]
    assert [real, *by_noise] == sorted([real, *by_noise])
    assert real < 1
    assert distance(test[labels < 5]) > 5 * real  # half of the classes are missing
    assert distance(blurred) > 5 * real
    assert distance(255 - test) > 5 * real
    assert distance((test * 0.6).round().to(torch.uint8)) > 5 * real  # washed out
    assert distance(test[:1].expand(360, -1, -1, -1)) > 5 * real  # one image for all


class Pooled(nn.Module):
    """Mean and brightest value of each channel: six features whose truth is known."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def traced(path: Path, network: nn.Module, size: int = 16) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.rand(3, 3, size, size)).save(str(path))
    return path


def pictures(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_torchscript_file_gives_its_features(tmp_path):
    path = traced(tmp_path / "pooled.pt", Pooled())
    digest = sha256(path.read_bytes()).hexdigest()
    extractor = from_file(path, digest.upper(), size=16)
    x = pictures(5, 3, 16, 16)
    expected = Pooled()(x / 127.5 - 1)
    assert (extractor.name, extractor.sha256, extractor.width, extractor.classes) == ("pooled.pt", digest, 6, 0)
    for batch in (1, 2, 64):
        torch.testing.assert_close(extractor.features(x, batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no classes"):
        extractor.predict(x)


class Inside(nn.Module):
    """Called as the InceptionV3 of the StyleGAN family is: uint8 images, resized here; features where asked for."""

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        x = nn.functional.interpolate(img.float() / 255, (6, 6), mode="bilinear", align_corners=False)
        features = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return features if return_features else features.softmax(1)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 40, 24), (1, 8, 8)])
def test_a_torchscript_file_that_resizes_itself_gets_images_as_they_are(tmp_path, shape):
    """Of any size; grey ones as three channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Inside()).save(str(tmp_path / "inside.pt"))
    extractor = from_file(tmp_path / "inside.pt", size=10, mean=0.1, std=0.3)
    assert (extractor.width, extractor.resize) == (6, "inside the file")
    x = pictures(5, *shape)
    expected = Inside()(x.expand(-1, 3, -1, -1), return_features=True)
    torch.testing.assert_close(extractor.features(x, batch=2), expected, rtol=1e-5, atol=1e-6)


def test_normalisation_by_channel_and_grey_images(tmp_path):
    path = traced(tmp_path / "pooled.torchscript", Pooled())
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    grey = pictures(4, 1, 16, 16)
    expected = (grey / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    features = from_file(path, size=16, mean=mean, std=std).features(grey)
    torch.testing.assert_close(features, Pooled()(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [12, 50])
def test_resize_is_pillows_antialiased_bicubic(size):
    x = pictures(1, 1, 32, 24)
    network = ExternalExtractor("", "", nn.Identity(), size, torch.tensor(0.0), torch.tensor(1 / 255))
    assert network.resize.startswith(f"bicubic, antialiased, to {size} × {size}; less 0, over 0.003922")
    network = replace(network, mean=torch.tensor(0.5), std=torch.tensor(0.5))
    assert network.resize == f"bicubic, antialiased, to {size} × {size}"
    network = replace(network, mean=torch.tensor(0.0), std=torch.tensor(1 / 255))
    picture = Image.fromarray(x[0, 0].numpy().astype(np.float32))
    expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_allclose(network.prepare(x)[0, 0], expected, atol=0.02)


def onnx_bytes() -> bytes:
    """An ONNX file by hand: x (n, 3, h, w) → GlobalAveragePool → Flatten → y (n, 3)."""

    def number(field: int, value: int) -> bytes:
        return bytes([field << 3, value])

    def part(field: int, content: bytes | str) -> bytes:
        content = content.encode() if isinstance(content, str) else content
        return bytes([field << 3 | 2, len(content)]) + content

    def value_info(name: str, *sizes: str) -> bytes:
        shape = b"".join(part(1, part(2, size)) for size in sizes)
        return part(1, name) + part(2, part(1, number(1, 1) + part(2, shape)))

    pool = part(1, part(1, "x") + part(2, "m") + part(4, "GlobalAveragePool"))
    flatten = part(1, part(1, "m") + part(2, "y") + part(4, "Flatten"))
    ends = part(11, value_info("x", "n", "c", "h", "w")) + part(12, value_info("y", "n", "d"))
    return number(1, 8) + part(7, pool + flatten + part(2, "g") + ends) + part(8, part(1, "") + number(2, 13))


def test_onnx_file_gives_its_features(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "pool.onnx").write_bytes(onnx_bytes())
    extractor = from_file(tmp_path / "pool.onnx", size=16, mean=0, std=1)
    x = pictures(5, 3, 16, 16)
    assert extractor.width == 3
    torch.testing.assert_close(extractor.features(x, batch=2), (x / 255).mean((2, 3)), rtol=1e-5, atol=1e-5)


def test_a_broken_onnx_file_is_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad.onnx").write_bytes(struct.pack("<d", 1.0))
    with pytest.raises(UserError, match="onnxruntime cannot open it"):
        from_file(tmp_path / "bad.onnx")


def test_onnx_without_onnxruntime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "pool.onnx").write_bytes(onnx_bytes())
    with pytest.raises(UserError, match=r"pip install 'onefold\[onnx\]'"):
        from_file(tmp_path / "pool.onnx")


def test_safetensors_file_is_a_classifier(tmp_path):
    classifier = digits_classifier()
    classifier.save(tmp_path / "c.safetensors")
    x = pictures(3, 1, 8, 8)
    assert torch.equal(from_file(tmp_path / "c.safetensors").features(x), classifier.features(x))


def test_wrong_files_are_one_line(tmp_path):
    pooled = traced(tmp_path / "pooled.pt", Pooled())
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "net.pkl").write_text("no")
    map_of_features = traced(tmp_path / "map.pt", nn.Conv2d(3, 2, 1))
    whole = traced(tmp_path / "fixed.pt", nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)))
    wrong = [
        (lambda: from_file(tmp_path / "none.pt"), "no such file"),
        (lambda: from_file(pooled, "00ff", size=16), "not 00ff"),
        (lambda: from_file(tmp_path / "text.pt"), "no TorchScript file"),
        (lambda: from_file(tmp_path / "net.pkl"), "not a known kind"),
        (lambda: from_file(map_of_features, size=16), "export the pooled features"),
        (lambda: from_file(whole, size=8), "give its input size"),
        (lambda: from_file(pooled, size=16).features(pictures(2, 4, 8, 8)), "takes 3 × any × any"),
        (lambda: class_accuracy(digits_classifier(), pictures(2, 1, 8, 8), torch.zeros(3)), "one label for each"),
    ]
    for call, cause in wrong:
        with pytest.raises(UserError, match=cause) as error:
            call()
        assert "\n" not in str(error.value)
