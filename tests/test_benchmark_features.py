"""Training of feature networks: what its fast recipe prepares and keeps, and that both recipes learn."""

from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_features
from onefold.data import open_dataset, read_all
from onefold.metrics import Classifier
from onefold.metrics.classifier import ClassifierConfig

CONFIG = ClassifierConfig((3, 16, 16), 2, "", 1, (16, 16, 24), pooled=True, mirrored=True)
OPTIONS = {"epochs": 6, "batch": 40, "mirror": True, "compiled": False, "seed": 0}


def smooth(n: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 16, 16) uint8 of smoothed noise, whose upper or lower half is brighter, and which (n,)."""
    rng = torch.Generator().manual_seed(0)
    x = F.avg_pool2d(torch.randn((n, 3, 18, 18), generator=rng), 3, 1)
    y = torch.randint(2, (n,), generator=rng)
    lower = (torch.arange(16) >= 8) == y.bool()[:, None]
    return (110 + 60 * x + 40 * lower[:, None, :, None]).clamp(0, 255).to(torch.uint8), y


def test_the_stem_has_the_components_of_all_classes_and_stays_fixed():
    images, labels = smooth(2400)
    images[labels == 1, 1:] = 0  # so that classes have other components
    inside = [images[order] for order in (torch.arange(2400), labels.argsort())]
    stems = []
    for given in inside:
        classifier = Classifier(CONFIG)
        train_features.prepare(classifier, given)
        stem = classifier.body[0]
        assert isinstance(stem, nn.Conv2d)
        stems.append(stem.weight.flatten(1))
        assert not any(p.requires_grad for p in stem.parameters())
    mixed, in_order = stems
    torch.testing.assert_close(mixed[:8] @ mixed[:8].T, torch.eye(8))
    assert torch.equal(mixed[8:], -mixed[:8])
    torch.testing.assert_close((mixed[:4] * in_order[:4]).sum(1).abs(), torch.ones(4), atol=0.05, rtol=0)
    patches = F.unfold(images.double() / 127.5 - 1, 3).movedim(1, 2).flatten(0, 1)
    seen = (patches - patches.mean(0)) @ mixed[:8].double().T
    assert (seen.var(0).diff() < 0).all(), "the largest come first"
    filters = [p for p in classifier.body.parameters() if p.ndim == 4]
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(F.conv2d(x, filters[3], padding=1)[:, :16], x)


def test_filters_turn_and_keep_their_norm():
    filters = [nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.randn(6, 8, 3, 3))]
    optimizer = train_features.FilterMuon(filters, lr=0.1)
    before = [p.detach().clone() for p in filters]
    direction = [torch.randn_like(p) for p in filters]
    for p, wanted in zip(filters, direction, strict=True):
        p.grad = -wanted
    optimizer.step()
    for p, old, wanted in zip(filters, before, direction, strict=True):
        torch.testing.assert_close(p.norm(), torch.tensor(float(len(p))).sqrt())
        assert ((p - old) * wanted).sum() > 0, "against the gradient"
    assert optimizer.param_groups[0]["params"][0].data_ptr() == filters[0].data_ptr(), "a matrix is its filter"


def test_changed_images_are_mirrored_where_asked_and_covered():
    x = torch.rand((40, 3, 16, 16)) + 0.5
    rng = torch.Generator()
    mirrored = torch.arange(40) % 2 == 0
    plain = train_features.changed(x, torch.zeros(40, dtype=torch.bool), covered=0.0, rng=rng.manual_seed(1))
    turned = train_features.changed(x, mirrored, covered=0.0, rng=rng.manual_seed(1))
    assert torch.equal(turned[~mirrored], plain[~mirrored])
    assert torch.equal(turned[mirrored], plain[mirrored].flip(3))
    covered = train_features.changed(x, mirrored, covered=0.25, rng=rng.manual_seed(1)) == 0
    assert covered.any((1, 2, 3)).all()
    assert covered.double().mean() < 0.25**2 * 1.5


@pytest.mark.parametrize("fast", [False, True])
def test_both_recipes_learn(fast):
    images, labels = smooth(480)
    config = CONFIG if fast else replace(CONFIG, pooled=False, mirrored=False)
    classifier = train_features.train(images[:400], labels[:400], config, fast=fast, **OPTIONS)
    assert (classifier.predict(images[400:]) == labels[400:]).double().mean() > 0.9
    torch.manual_seed(OPTIONS["seed"])
    start = Classifier(config)
    if fast:
        train_features.prepare(start, images[:400])
    moved = [
        name
        for name, before in start.named_parameters()
        if not torch.allclose(before, classifier.state_dict()[name], atol=1e-3)
    ]
    learned = [name for name, p in start.named_parameters() if p.requires_grad]
    assert {"head.weight", *(name for name in learned if start.state_dict()[name].ndim == 4)} <= {*moved} <= {*learned}


def test_a_training_of_few_steps_is_that_of_its_last():
    images, labels = smooth(80)
    config = replace(CONFIG, pooled=False, mirrored=False)
    one = train_features.train(images, labels, config, fast=False, **OPTIONS | {"epochs": 1})
    torch.manual_seed(OPTIONS["seed"])
    assert not torch.equal(one.head.weight, Classifier(config).head.weight)


def test_each_image_is_seen_as_it_is_and_mirrored_in_turn(monkeypatch):
    images, labels = smooth(80)
    seen: list[tuple[Tensor, Tensor]] = []
    changed = train_features.changed

    def watched(x: Tensor, mirrored: Tensor, **options: Any) -> Tensor:
        seen.append((x, mirrored))
        return changed(x, mirrored, **options)

    monkeypatch.setattr(train_features, "changed", watched)
    train_features.train(images, labels, CONFIG, fast=True, **OPTIONS | {"epochs": 2})
    first, second = (
        {tuple(x.flatten().tolist()): bool(turned) for batch in epoch for x, turned in zip(*batch, strict=True)}
        for epoch in (seen[:2], seen[2:])
    )
    assert len(first) == 80
    assert set(first.values()) == {False, True}
    assert all(second[image] is not turned for image, turned in first.items())


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"fast": True, "widths": (20, 16)}, "--widths: 20 16; give at least two, the first even and at most 18"),
        ({"fast": True, "widths": (15, 16)}, "the first even"),
        ({"widths": (16,)}, "give at least two$"),
        ({"epochs": 0}, "--epochs, --batch, --residuals"),
        ({"batch": 0}, "--epochs, --batch, --residuals"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, cause):
    with pytest.raises(SystemExit, match=cause):
        train_features.main("digits", "digits:test", tmp_path / "f.safetensors", **options)


def test_what_would_fail_after_training_is_refused_before(tmp_path):
    numpy.savez(tmp_path / "other.npz", images=numpy.zeros((4, 9, 9, 1), numpy.uint8), labels=numpy.arange(4))
    for test, out, cause in (
        (str(tmp_path / "other.npz"), tmp_path / "f", "has other images or classes than digits"),
        ("digits:test", tmp_path, "is a folder; give the name of a file"),
    ):
        with pytest.raises(SystemExit, match=cause):
            train_features.main("digits", test, out, fast=True)


def test_the_command_writes_a_classifier_and_says_what_it_knows(tmp_path, capsys):
    out = tmp_path / "new" / "features.safetensors"
    train_features.main(
        "digits", "digits:test", out, widths=(16, 16), residuals=1, fast=True, epochs=1, batch=100, device="cpu"
    )
    images, labels = read_all(open_dataset("digits:test"))
    accuracy = (Classifier.load(out).predict(images) == labels).double().mean()
    assert f"test images: accuracy {accuracy:.4f}" in capsys.readouterr().out
