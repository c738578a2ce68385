"""Training of feature networks: what its fast recipe prepares and keeps, and that both recipes learn."""

from dataclasses import replace

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


def test_the_stem_whitens_patches_of_the_images():
    images, _ = smooth(400)
    classifier = Classifier(CONFIG)
    filters = train_features.prepare(classifier, images)
    stem = classifier.body[0]
    assert isinstance(stem, nn.Conv2d)
    inside = F.conv2d(images.float() / 127.5 - 1, stem.weight, stem.bias).movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(inside[:8], -inside[8:])
    torch.testing.assert_close(inside[:8].mean(1), torch.zeros(8, dtype=torch.double), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(inside[:8]), torch.eye(8, dtype=torch.double), atol=0.05, rtol=0)
    assert [p.shape[0] for p in filters] == [16, 16, 24, 24], "all but the stem's"
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(F.conv2d(x, filters[2], padding=1)[:, :16], x)


@pytest.mark.parametrize("channels", [56, 15])
def test_a_stem_that_cannot_be_whitened_is_refused(channels):
    with pytest.raises(SystemExit, match="--widths: a stem of at most 54 channels"):
        train_features.prepare(Classifier(replace(CONFIG, widths=(channels, 16))), smooth(10)[0])


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
    prepared = Classifier(config)
    train_features.prepare(prepared, images[:400])
    kept = torch.equal(classifier.state_dict()["body.0.weight"], prepared.state_dict()["body.0.weight"])
    assert kept == fast, "only the fast recipe's stem stays as it was prepared"


def test_the_command_writes_a_classifier_and_says_what_it_knows(tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    train_features.main(
        "digits", "digits:test", out, widths=(16, 16), residuals=1, fast=True, epochs=1, batch=100, device="cpu"
    )
    images, labels = read_all(open_dataset("digits:test"))
    accuracy = (Classifier.load(out).predict(images) == labels).double().mean()
    assert f"test images: accuracy {accuracy:.4f}" in capsys.readouterr().out
