"""Pictures of a run of real images, and the measurements of memory, on digits and on what is known exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import onefold
import real_images
import real_pictures
from helpers_runs import tiny
from onefold.data import open_dataset, read_all
from onefold.pictures.grids import grid, save_png
from real_pictures import COLUMNS, GAP, NEAREST, SHOWN, contest, filtered, flat, nearest, pattern, smoothness


def noise(count: int, seed: int = 0, size: int = 6, channels: int = 3) -> Tensor:
    """Images (count, channels, size, size), uint8, of which no two are alike."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=rng, dtype=torch.uint8)


# --- the nearest of many images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_the_nearest_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.setattr(real_pictures, "BLOCK", 4)
    rows, pool = noise(5).flatten(1), noise(11, seed=1).flatten(1)
    expected = torch.cdist(rows.double(), pool.double()).sort(1)
    found = nearest(rows, pool, count)
    assert torch.equal(found.index, expected.indices[:, :count])
    torch.testing.assert_close(found.distance.double(), expected.values[:, :count], rtol=1e-5, atol=0)


def test_what_is_left_out_is_not_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real_pictures, "BLOCK", 4)
    rows = noise(9).flatten(1)
    itself = torch.arange(9)
    assert torch.equal(nearest(rows, rows).index[:, 0], itself)
    expected = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest(rows, rows, left_out=itself).index[:, 0], expected)


def test_a_pattern_has_neither_colour_nor_contrast():
    x = noise(3) // 4
    bright = 3 * x + torch.tensor([7, 20, 40], dtype=torch.uint8)[:, None, None]
    torch.testing.assert_close(pattern(bright), pattern(x))
    assert not torch.allclose(pattern(x.flip(2)), pattern(x))
    assert torch.equal(pattern(torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)), torch.zeros(1, 48)), "a plain image"


def test_new_images_have_their_nearest_in_each_group_alike():
    groups = [noise(300, seed=k, size=2, channels=1) for k in range(1, 5)]
    found = contest(noise(2000, size=2, channels=1), groups, flat, mirrors=False)
    shares = [*found["training"], found["test"]]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize("mirrors", [False, True])
def test_copies_have_it_among_training_images(mirrors: bool):
    groups = [noise(50, seed=k) for k in range(1, 4)]
    copies = torch.cat([groups[0][:30], groups[1][:10]])
    found = contest(copies.flip(3) if mirrors else copies, groups, flat, mirrors=mirrors)
    assert found == {"test": 0.0, "training": [0.75, 0.25], "twice_as_near": 1.0}
    assert contest(copies.flip(3), groups, flat, mirrors=False)["twice_as_near"] == 0, "mirror images are other images"


@pytest.mark.parametrize("mirrors", [False, True])
def test_no_image_is_its_own_neighbour(mirrors: bool):
    train, test = noise(40, seed=1), noise(40, seed=2)
    test[:20] = test[:20] // 2 + test[:20].flip(3) // 2  # symmetrical: their mirror images are themselves
    assert contest(test[:20], [train, test], flat, mirrors=mirrors)["test"] == 1
    assert contest(test[:20], [train, test], flat, mirrors=mirrors, own=True)["twice_as_near"] == 0
    train[:20] = test[:20]
    assert contest(test[:20], [train, test], flat, mirrors=mirrors, own=True)["training"] == [1.0]


# --- smoothness -------------------------------------------------------------------------------------------------------


def test_contrast_and_sharpness_of_images_that_are_known():
    plain = torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)
    stripes = torch.tensor([0, 20, 0, 20], dtype=torch.uint8).expand(1, 3, 4, 4)
    found = smoothness(torch.cat([plain, stripes]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [10.0, 200**0.5]]))


def test_the_most_similar_image_is_the_same_one():
    pool = torch.cat([noise(4), noise(4, seed=1) // 2, noise(4, seed=2) // 8])
    assert real_pictures.alike(pool[[7, 2, 11]], pool).tolist() == [7, 2, 11]


def test_filtered_images_have_the_power_spectrum():
    x, like = noise(64, size=8) // 8 + 100, noise(64, seed=1, size=8) // 4 + 60
    like = like // 2 + like.roll(1, 3) // 2  # smoother along rows
    found = filtered(x, like)

    def spectrum(images: Tensor) -> Tensor:
        centred = images.float() - images.float().mean((0, 2, 3), keepdim=True)
        return torch.fft.rfft2(centred).abs().square().mean(0).sqrt()

    apart = (spectrum(x) - spectrum(like)).abs().mean()
    assert (spectrum(found) - spectrum(like)).abs().mean() < 0.05 * apart
    torch.testing.assert_close(found.float().mean((0, 2, 3)), like.float().mean((0, 2, 3)), rtol=0, atol=0.1)


def test_near_copies_are_counted_as_by_an_evaluation():
    (train, _), (test, _) = (read_all(open_dataset(source)) for source in ("digits", "digits:test"))
    train = train[: len(test)]
    samples = torch.cat([train[:20], 255 - train[:20]])
    found = real_pictures.near_copies(samples, train, test)
    expected = onefold.metrics.memorisation(samples.flatten(1), train.flatten(1), test.flatten(1)).share
    assert found["samples"]["share"] == expected == 0.5
    assert found["test images"]["share"] == pytest.approx(0.05, abs=1 / len(test))
    assert found["samples, among test images"]["share"] < 0.5
    some = real_pictures.near_copies(test[5:25], train, test)
    assert some["test images as smooth as the samples"] == some["samples"], "themselves"
    assert some["samples, among test images"]["share"] == 1


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_between_classes_are_those_classes_at_both_ends():
    network = onefold.OneFold.from_pretrained("digits")
    found = real_pictures.between_classes(network, [(3, 8), (1, 0)]).reshape(2, COLUMNS, 8, 8, 1).astype(int)
    for seed, (first, last) in enumerate([(3, 8), (1, 0)]):
        for column, label in ((0, first), (-1, last)):
            expected = network.sample(1, labels=[label], seed=seed)[0].astype(int)
            assert np.abs(found[seed, column] - expected).max() <= 1, "but for rounding"
    assert len({row.tobytes() for row in found[0]}) > 4, "what is between is neither"
    assert not network.labels._forward_hooks


@pytest.mark.parametrize("classes", [10, 0])
def test_all_is_drawn_and_measured(tmp_path: Path, classes: int):
    changes = {"training__health_every": 48, "network__classes": classes}
    run = onefold.train(tiny(**changes), tmp_path / "run", quiet=True)
    train, _ = read_all(open_dataset("digits"), range(real_images.SHEET))
    images = train.permute(0, 2, 3, 1).numpy()
    save_png(tmp_path / "sheet.png", grid(images, columns=real_images.COLUMNS, scale=1, gap=0))
    out = tmp_path / "new" / "digits"
    record = tmp_path / "memory.json"
    real_pictures.main(run.folder, tmp_path / "sheet.png", out, json_file=record, device="cpu", precision="float32")

    found = json.loads(record.read_text())
    assert (found["images"], found["group"], found["expected"]) == (1000, 360, 0.25)
    assert found["pixels"]["samples"]["test"] < 0.1, "training images, of which few are in no group"
    assert len(found["pattern"]["test images"]["training"]) == 3
    assert np.asarray(Image.open(out.with_name("digits-curves.png"))).shape[1] > 1000
    walks = np.asarray(Image.open(out.with_name("digits-between.png")))
    blocks = 3 if classes else 2
    assert walks.shape == (5 * 9 + 1, blocks * (COLUMNS * 9 + 1) + (blocks - 1) * GAP)
    shown = np.asarray(Image.open(out.with_name("digits-nearest.png")))
    assert shown.shape == (9 + 1 + 2 * (NEAREST * 9 + 1 + GAP), SHOWN * 9 + 1)
    for row in (9 + 1 + GAP, 9 + 1 + GAP + NEAREST * 9 + 1 + GAP):
        assert np.array_equal(shown[row : row + 10], shown[:10]), "each is its own nearest, in pixels and in features"
