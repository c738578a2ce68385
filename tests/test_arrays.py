"""From arrays to networks and back: what is right, and what is refused in words."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import onefold
from conftest import randomised
from data_images import noise
from onefold import metrics
from onefold.errors import UserError
from onefold.networks.base import Network, NetworkConfig, build
from onefold.sampling import resolve_labels

pytestmark = pytest.mark.usefixtures("shapes_unchecked")
"""Without the tests' own check of shapes, as for everybody else."""

KINDS = ("one_network", "three_networks", "pixels")


def network(kind: str = "one_network", channels: int = 3, classes: int = 5) -> Network:
    sizes = {"image_size": (8, 12), "channels": channels, "classes": classes, "patch": 2}
    config = NetworkConfig(architecture=kind, latent_channels=4, width=32, depth=3, heads=2, **sizes)
    return randomised(build(config)).eval()


# --- the way there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_go_back_into_the_network_and_out_again(channels: int):
    net = network(channels=channels)
    images = net.sample(3, steps=1)
    x = onefold.to_tensor(images)
    assert x.shape == (3, channels, 8, 12)
    assert x.dtype == torch.float32
    assert (onefold.to_images(x) == images).all()
    again = onefold.to_images(net.decode(net.encode(x)))
    assert again.shape == images.shape
    assert again.dtype == np.uint8


def test_every_value_comes_back_from_the_range_of_networks():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = onefold.to_tensor(images)
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert (onefold.to_images(x) == images).all()
    assert (onefold.to_images(3 * x)[0, 0, 0], onefold.to_images(3 * x)[0, -1, -1]) == (0, 255)


def test_all_that_holds_images_gives_the_same_tensor():
    images = noise(3, 8, 12, 3)
    expected = onefold.to_tensor(images)
    assert (expected[1, 2] == torch.from_numpy(images[1, :, :, 2]).float() / 127.5 - 1).all()
    for same in (
        torch.from_numpy(images),
        list(images),
        list(torch.from_numpy(images)),
        [Image.fromarray(image) for image in images],
        images[:, ::-1][:, ::-1],
    ):
        assert torch.equal(onefold.to_tensor(same), expected)
    grey = noise(2, 8, 12)
    opened = [Image.fromarray(image) for image in grey]
    assert torch.equal(onefold.to_tensor(opened), onefold.to_tensor(grey[..., None]))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (noise(8, 12, 3), r"shape \(8, 12, 3\) .* images\[None\]"),
        (noise(5, 8, 12), r"images\[\.\.\., None\]"),
        (noise(5, 3, 8, 12), r"channels first.*transpose\(0, 2, 3, 1\)"),
        (torch.from_numpy(noise(5, 3, 8, 12)), r"permute\(0, 2, 3, 1\)"),
        (noise(5, 8, 12, 3) / 255, r"float64 from 0 to 1, not uint8; multiply by 255"),
        (noise(5, 8, 12, 3).astype(np.float32), r"float32 from 0 to 255, not uint8; round"),
        (torch.from_numpy(noise(5, 3, 8, 12)) / 127.5 - 1, r"are what networks take"),
        (noise(0, 8, 12, 3), "at least one"),
        ([], "at least one"),
        ([noise(8, 12, 3), noise(8, 11, 3)], r"1 has shape \(8, 11, 3\)"),
        ([Image.new("P", (12, 8))], r"mode P; convert it"),
        (Image.new("RGB", (12, 8)), r"\[image\]"),
        ("photo.png", "PIL.Image.open"),
        (["photo.png"], "PIL.Image.open"),
        (None, "NoneType is no array"),
        (np.array(["a"]), "give uint8"),
    ],
)
def test_to_tensor_says_what_it_does_not_take(images: object, words: str):
    with pytest.raises(UserError, match=words) as error:
        onefold.to_tensor(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 8, 12), r"x\[None\]"),
        (torch.zeros(5, 8, 12, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(5, 3, 8, 12, dtype=torch.uint8), "uint8, not float"),
        (np.zeros((5, 3, 8, 12)), "torch.from_numpy"),
        (torch.full((1, 3, 8, 12), torch.nan), "NaN"),
    ],
)
def test_to_images_says_what_it_does_not_take(x: object, words: str):
    with pytest.raises(UserError, match=words):
        onefold.to_images(x)  # type: ignore[arg-type]


# --- the roles of a network -------------------------------------------------------------------------------------------

IMAGES = torch.from_numpy(noise(4, 3, 8, 12))
RIGHT = IMAGES / 127.5 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (IMAGES.permute(0, 2, 3, 1).numpy(), r"ndarray .* onefold\.to_tensor"),
        (IMAGES.permute(0, 2, 3, 1), r"\(4, 8, 12, 3\) is not \(B, 3, 8, 12\); use onefold\.to_tensor"),
        (IMAGES, "uint8"),
        (RIGHT.permute(0, 2, 3, 1), r"x\.permute\(0, 3, 1, 2\)"),
        (IMAGES.float(), r"from 0 to 255, .* x / 127\.5 - 1"),
        (IMAGES / 255, r"uint8 / 255.* 2 \* x - 1"),
        (IMAGES[:1] / 255, r"uint8 / 255.* 2 \* x - 1"),
        (RIGHT[0], r"x\[None\]"),
        (RIGHT[0].permute(1, 2, 0), r"x\.permute\(2, 0, 1\)\[None\]"),
        (torch.zeros(4, 3, 12, 8), "8×12"),
        (torch.zeros(4, 1, 8, 12), r"3 channels \(RGB\)"),
        (RIGHT.double(), "float64, but the network is float32"),
        (RIGHT.bfloat16(), "bfloat16"),
        (IMAGES.long(), "int64 where floats"),
        (torch.full((4, 3, 8, 12), torch.nan), "nan"),
        ([1, 2], "list"),
    ],
)
def test_encode_says_what_it_does_not_take(kind: str, x: object, words: str):
    with pytest.raises(UserError, match=words) as error:
        network(kind).encode(x)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "x",
    [
        RIGHT,
        torch.zeros(2, 3, 8, 12),
        torch.ones(2, 3, 8, 12),
        1.5 * RIGHT,
        onefold.to_tensor(noise(2, 8, 12, 3) // 2 + 128),  # bright everywhere
    ],
)
def test_encode_takes_all_that_may_be_right(x: Tensor):
    assert network().encode(x).isfinite().all()


def test_where_a_range_of_0_to_1_is_not_certain_a_warning_says_so():
    x = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"look like \[0, 1\]"):
        network().encode(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network().encode(0.5 + x / 2)


def test_grey_images_without_their_channel_are_named():
    for x, words in ((torch.zeros(4, 8, 12), r"x\[:, None\]"), (torch.zeros(8, 12), r"x\[None, None\]")):
        with pytest.raises(UserError, match=words):
            network(channels=1).encode(x)


def test_a_network_in_training_is_not_held_up_by_values(monkeypatch: pytest.MonkeyPatch):
    """Nothing is read from a tensor: on a GPU that would be a wait."""
    net, z, t = network().train(), torch.zeros(4, 24, 4), torch.zeros(4)

    def read(*args: object, **options: object) -> None:
        raise AssertionError("a value was read")

    for name in ("aminmax", "item", "tolist", "__bool__", "min", "max"):
        monkeypatch.setattr(Tensor, name, read)
    net.encode(RIGHT)
    net.decode(z)
    net.denoise(z, t, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["one_network", "three_networks"])
@pytest.mark.parametrize(
    ("z", "words"),
    [
        (torch.zeros(4, 9, 4), r"\(4, 9, 4\) is not \(B, 24, 4\); .* 24 tokens of 4 numbers"),
        (torch.zeros(24, 4), r"z\[None\]"),
        (np.zeros((4, 24, 4)), "torch.from_numpy"),
        (torch.zeros(4, 24, 4).long(), "int64 where floats"),
        (torch.zeros(4, 24, 4).double(), "float64"),
    ],
)
def test_decode_says_what_it_does_not_take(kind: str, z: object, words: str):
    with pytest.raises(UserError, match=words):
        network(kind).decode(z)  # type: ignore[arg-type]


Z, T, Y = torch.zeros(4, 24, 4), torch.full((4,), 0.5), torch.tensor([0, 1, 4, 5])


@pytest.mark.parametrize("kind", ["one_network", "three_networks"])
@pytest.mark.parametrize(
    ("z_t", "t", "y", "words"),
    [
        (torch.zeros(4, 9, 4), T, Y, "z_t: shape"),
        (Z, 0.5, Y, r"t: float .* torch\.full\(\(4,\), t\)"),
        (Z, torch.tensor(0.5), Y, r"t: shape \(\)"),
        (Z, T[:1], Y, r"t: shape \(1,\)"),
        (Z, 1000 * T, Y, r"t: times from 500 to 500, not in \[0, 1\]"),
        (Z, T, 3, r"y: int .* torch\.tensor"),
        (Z, T, [0, 1, 2, 3], "y: list"),
        (Z, T, Y[:2], r"y: shape \(2,\)"),
        (Z, T, Y.float(), r"y: float32.* y\.long\(\)"),
        (Z, T, Y + 1, "y: labels from 1 to 6; this network knows 0 to 4, or 5 for no class"),
        (Z, T, Y - 1, "y: labels from -1"),
    ],
)
def test_denoise_says_what_it_does_not_take(kind: str, z_t: Tensor, t: object, y: object, words: str):
    net = network(kind)
    assert net.denoise(Z, T, Y).shape == Z.shape
    with pytest.raises(UserError, match=words) as error:
        net.denoise(z_t, t, y)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[3, 1], (3, 1), np.array([3, 1]), np.array([3.0, 1.0]), torch.tensor([3, 1]), [np.int64(3), torch.tensor(1)]],
)
def test_labels_may_be_held_by_anything(labels: object):
    assert resolve_labels(2, labels, 0, 5) == [3, 1]  # type: ignore[arg-type]
    expected = network().sample(2, labels=[3, 1], steps=1)
    assert (network().sample(2, labels=labels, steps=1) == expected).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (3, r"3 is a single label; .* \[3\] \* 2"),
        (np.int64(3), "single label"),
        (torch.tensor(3), "single label"),
        ([3], "1 were given for n = 2"),
        ([3, 6], "6 is not a class"),
        ([3, -1], "-1 is not a class"),
        ([3, 1.5], "1.5 is not a class"),
        ([3, float("nan")], "nan is not a class"),
        ([3, None], "None is not a class"),
        (np.eye(2, 5), r"shape \(2, 5\)"),
        (torch.tensor([[3], [1]]), r"shape \(2, 1\)"),
    ],
)
def test_labels_that_are_none_are_refused_in_words(labels: object, words: str):
    with pytest.raises(UserError, match=words):
        network().sample(2, labels=labels, steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "seed", "words"), [(2.5, 0, "n: 2.5"), ("2", 0, "n: '2'"), (2, 0.5, "seed: 0.5")])
def test_counts_and_seeds_are_whole_numbers(n: object, seed: object, words: str):
    with pytest.raises(UserError, match=words):
        network().sample(n, seed=seed, steps=1)  # type: ignore[arg-type]
    assert len(network().sample(np.int64(2), seed=np.int32(1), steps=1)) == 2  # type: ignore[arg-type]


# --- metrics, reconstruction, evaluation ------------------------------------------------------------------------------


def features(images: object) -> object:
    return metrics.digits_classifier().features(images)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: features(noise(4, 8, 8, 1)), r"ndarray.*permute\(0, 3, 1, 2\)"),
        (lambda: features(torch.from_numpy(noise(4, 8, 8, 1))), r"channels last.*permute"),
        (lambda: features(torch.zeros(4, 1, 8, 8)), r"float32 is not uint8; .*to_images"),
        (lambda: features(torch.from_numpy(noise(1, 8, 8))), r"images\[None\]"),
        (lambda: features([noise(8, 8)]), "list where a uint8 tensor"),
        (lambda: metrics.psnr(noise(4, 8, 8, 1), noise(4, 8, 8, 1)), "ndarray"),  # type: ignore[arg-type]
        (lambda: metrics.ssim(torch.zeros(8, 8), torch.zeros(8, 8)), r"\(8, 8\)"),
        (lambda: metrics.ssim(noise(4, 8, 8, 1), noise(4, 8, 8, 1)), "ndarray"),  # type: ignore[arg-type]
        (lambda: metrics.psnr(torch.zeros(4, 8, 8, 3), torch.zeros(4, 8, 8, 3)), "channels last"),
        (lambda: metrics.psnr(torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 99.0)), "99"),
        (lambda: metrics.frechet_distance(["a"], ["b"]), "not an array of numbers"),  # type: ignore[arg-type]
        (lambda: metrics.frechet_distance(noise(4, 8, 8, 1), noise(4, 8, 8, 1)), r"not \(n, d\)"),
        (lambda: metrics.effective_rank(3), "neither"),  # type: ignore[arg-type]
        (
            lambda: metrics.class_accuracy(metrics.digits_classifier(), torch.from_numpy(noise(4, 1, 8, 8)), [1, 2]),
            r"\(2,\) for 4 images",
        ),
        (lambda: onefold.reconstruct(network(), RIGHT), "channels last|float32"),
        (lambda: onefold.reconstruct(network(), 3), "int is neither"),  # type: ignore[arg-type]
        (lambda: onefold.reconstruct(3, noise(2, 8, 12, 3)), "int is neither a run"),  # type: ignore[arg-type]
        (lambda: onefold.evaluate(network()), "OneFold is no run"),  # type: ignore[arg-type]
        (lambda: onefold.evaluate(Path("nothing")), "not a run"),
    ],
)
def test_the_other_public_functions_answer_in_words(call: Callable[[], object], words: str):
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_lists_and_arrays_of_labels_have_one_accuracy():
    images, labels = torch.from_numpy(noise(4, 1, 8, 8)), [1, 2, 3, 4]
    classifier = metrics.digits_classifier()
    expected = metrics.class_accuracy(classifier, images, torch.tensor(labels))
    for same in (labels, np.array(labels)):
        assert metrics.class_accuracy(classifier, images, same) == expected  # type: ignore[arg-type]
