"""The classifier: what it learns, that it learns the same twice, and that it comes back from a file."""

import dataclasses
import json
from dataclasses import asdict
from hashlib import sha256

import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics import Classifier, train_classifier
from onefold.metrics.classifier import KEY, LATER, ClassifierConfig
from onefold.metrics.classifier_training import damage, pretext_task


def stripes(n: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of horizontal (0) or vertical (1) stripes under noise, uint8, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    c, h, w = shape
    y = torch.randint(2, (n,), generator=generator)
    rows, columns = torch.arange(h)[:, None] % 4 < 2, torch.arange(w) % 4 < 2
    pattern = torch.stack([rows.expand(h, w), columns.expand(h, w)])[y].float()[:, None].expand(n, c, h, w)
    x = 64 + 128 * pattern + 30 * torch.randn((n, c, h, w), generator=generator)
    return x.round().clamp(0, 255).to(torch.uint8), y


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(*stripes(200), classes=2, epochs=3)


def test_learns_what_can_be_learned(classifier):
    x, y = stripes(100, seed=1)
    assert (classifier.predict(x) == y).double().mean() > 0.95
    assert (classifier.classes, classifier.width) == (2, 64)


def test_logits_predict_and_features_have_their_shapes(classifier):
    x, _ = stripes(5)
    assert classifier.features(x).shape == (5, 64)
    assert classifier.features(x).dtype == torch.float32
    assert torch.equal(classifier.logits(x).argmax(1), classifier.predict(x))
    assert not classifier.features(x).requires_grad


def test_the_same_call_gives_the_same_weights_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (train_classifier(*stripes(40), classes=2, epochs=1, seed=s) for s in (0, 0, 1))
    assert first.to_bytes() == second.to_bytes() != other.to_bytes()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_size_changes_nothing(classifier, batch):
    x, _ = stripes(65)
    torch.testing.assert_close(classifier.features(x, batch), classifier.features(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.logits(x, batch), classifier.logits(x), rtol=1e-4, atol=1e-5)


def test_neither_company_nor_training_mode_changes_anything():
    classifier = train_classifier(*stripes(40), classes=2, epochs=1)
    x, _ = stripes(9)
    alone, weights = classifier.features(x[:1]), classifier.to_bytes()
    classifier.train()
    together = classifier.features(torch.cat([x[:1], 255 - x]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    assert classifier.to_bytes() == weights


def test_comes_back_from_a_file(classifier, tmp_path):
    path = tmp_path / "c.safetensors"
    classifier.save(path)
    back = Classifier.load(path)
    x, _ = stripes(5)
    assert torch.equal(back.features(x), classifier.features(x))
    assert back.config == classifier.config
    assert back.sha256 == classifier.sha256 == sha256(path.read_bytes()).hexdigest()
    assert not back.training


def test_progress_counts_images():
    seen: list[tuple[int, int]] = []
    train_classifier(*stripes(25), classes=2, epochs=2, progress=lambda done, total, loss: seen.append((done, total)))
    assert seen[-1] == (48, 48)  # two epochs of twelve batches of 2; one image waits
    assert [s for s, _ in seen] == sorted({s for s, _ in seen})


@pytest.mark.parametrize(("shape", "pretext"), [((1, 8, 8), "rotations"), ((2, 5, 9), "flips")])
@pytest.mark.parametrize("labels", [None, torch.zeros(20, dtype=torch.int64)])
def test_data_without_classes_learns_a_pretext_task(shape, pretext, labels):
    x, _ = stripes(20, shape)
    classifier = train_classifier(x, labels, classes=0 if labels is None else 1, epochs=1)
    assert (classifier.config.pretext, classifier.classes) == (pretext, 0)
    assert classifier.logits(x).shape == (20, 4)
    assert classifier.features(x).shape == (20, 64)
    with pytest.raises(UserError, match="knows no classes"):
        classifier.predict(x)


def test_rotations_can_be_learned():
    ramp = torch.arange(64).reshape(1, 1, 8, 8) * 3
    generator = torch.Generator().manual_seed(0)
    x = (ramp + 20 * torch.rand((200, 1, 8, 8), generator=generator)).to(torch.uint8)
    classifier = train_classifier(x, None, classes=0, epochs=5)
    turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])
    truth = torch.arange(4).repeat_interleave(200)
    assert (classifier.logits(turned).argmax(1) == truth).double().mean() > 0.95


@pytest.mark.parametrize("pretext", ["rotations", "flips"])
def test_pretext_tasks_do_what_their_labels_say(pretext):
    x = torch.arange(36.0).reshape(1, 1, 6, 6).repeat(40, 1, 1, 1)
    ways, y = pretext_task(x, pretext, torch.Generator().manual_seed(0))
    undo = {
        "rotations": lambda u, k: u.rot90(-k, (1, 2)),
        "flips": lambda u, k: u.flip([d for d, on in ((2, k % 2), (1, k // 2)) if on]),
    }[pretext]
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert all(torch.equal(undo(u, int(k)), x[0]) for u, k in zip(ways, y, strict=True))


def test_damage_shifts_each_image_by_at_most_an_eighth():
    x = torch.full((300, 1, 16, 24), -1.0)
    x[:, :, 8, 12] = 99
    damaged = damage(x, torch.Generator().manual_seed(0))
    places = damaged.flatten(1).argmax(1)
    found = {(int(p) // 24 - 8, int(p) % 24 - 12) for p in places}
    assert found == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    rest = damaged[damaged < 50] + 1
    assert 0.03 < rest.std() < 0.1


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 3), (1, 28, 28), (3, 64, 64), (4, 40, 90)])
def test_every_shape_has_a_network(shape):
    classifier = Classifier(ClassifierConfig.of(shape, 7)).freeze()
    x = torch.zeros(2, *shape, dtype=torch.uint8)
    assert classifier.features(x).shape == (2, classifier.width)
    assert classifier.logits(x).shape == (2, 7)


def test_wrong_images_and_labels_are_one_line(classifier):
    x, y = stripes(20)
    wrong = [
        (lambda: classifier.features(x.float()), "not uint8"),
        (lambda: classifier.features(x[0]), "is not"),
        (lambda: classifier.features(x[:, :, :4]), "takes 1 × 8 × 8"),
        (lambda: classifier.features(x, batch=0), "batch"),
        (lambda: train_classifier(x, y + 1, classes=2), "not within 0…1"),
        (lambda: train_classifier(x, y[:5], classes=2), "one int64"),
        (lambda: train_classifier(x, y.float(), classes=2), "one int64"),
        (lambda: train_classifier(x[:1], y[:1], classes=2), "at least 2"),
    ]
    for call, cause in wrong:
        with pytest.raises(UserError, match=cause) as error:
            call()
        assert "\n" not in str(error.value)


def test_wrong_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Classifier.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no classifier")
    with pytest.raises(UserError, match="holds no classifier"):
        Classifier.load(tmp_path / "text.safetensors")


def test_a_deeper_one_comes_back_and_older_files_are_of_one_residual(tmp_path):
    deeper = Classifier(ClassifierConfig((3, 8, 8), 2, "", 1, (4, 8), residuals=3)).freeze()
    plain = Classifier(ClassifierConfig((3, 8, 8), 2, "", 1, (4, 8))).freeze()
    assert len(deeper.body) == len(plain.body) + 4, "two after the stem, two in the stage"
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    deeper.save(tmp_path / "deeper.safetensors")
    again = Classifier.load(tmp_path / "deeper.safetensors")
    assert torch.equal(again.features(images), deeper.features(images))
    weights, described = read_tensors_of(plain)
    older = {key: value for key, value in described.items() if key != "residuals"}
    (tmp_path / "older.safetensors").write_bytes(to_safetensors(weights, {KEY: json.dumps(older)}))
    assert torch.equal(Classifier.load(tmp_path / "older.safetensors").features(images), plain.features(images))


def test_pooling_halves_the_side_after_a_whole_convolution_and_comes_back(tmp_path):
    pooled = Classifier(ClassifierConfig((3, 8, 8), 2, "", 1, (4, 8), pooled=True)).freeze()
    stage, x = pooled.body[3], torch.randn(2, 4, 8, 8)
    strided = Classifier(ClassifierConfig((3, 8, 8), 2, "", 1, (4, 8))).freeze().body[3]
    assert isinstance(stage, torch.nn.Sequential)
    whole = torch.nn.functional.conv2d(x, stage[0].weight, padding=1)
    assert whole.shape == (2, 8, 8, 8)
    largest = whole.unflatten(2, (4, 2)).unflatten(4, (4, 2)).amax((3, 5))
    torch.testing.assert_close(stage(x), stage[2](largest).relu())
    for side in (7, 2, 1):
        x = torch.randn(1, 4, side, side)
        assert stage(x).shape == strided(x).shape, "odd sides are halved alike"
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    pooled.save(tmp_path / "pooled.safetensors")
    again = Classifier.load(tmp_path / "pooled.safetensors")
    assert torch.equal(again.features(images), pooled.features(images))


def test_mirrored_features_are_the_mean_of_both_sides(tmp_path):
    config = ClassifierConfig((3, 8, 8), 2, "", 1, (4, 8))
    one = Classifier(config).freeze()
    both = Classifier(dataclasses.replace(config, mirrored=True)).freeze()
    both.load_state_dict(one.state_dict())
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    mean = (one.features(images) + one.features(images.flip(3))) / 2
    assert not torch.allclose(mean, one.features(images)), "or the images would be symmetric"
    torch.testing.assert_close(both.features(images), mean)
    torch.testing.assert_close(both.logits(images), (one.logits(images) + one.logits(images.flip(3))) / 2)
    both.save(tmp_path / "both.safetensors")
    assert torch.equal(Classifier.load(tmp_path / "both.safetensors").logits(images), both.logits(images))
    assert (one.name, both.name) == (
        "classifier of 3 × 8 × 8, 2 classes",
        "classifier of 3 × 8 × 8, 2 classes, mirrored",
    )
    assert not any(name.encode() in one.to_bytes() for name in LATER), "what is off changes no file, and no hash"


def read_tensors_of(classifier: Classifier) -> tuple[dict[str, Tensor], dict[str, object]]:
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    return weights, asdict(classifier.config)
