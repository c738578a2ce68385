"""Train the bundled classifier of the embedded digits and report how good it is.

    python benchmarks/train_digits_classifier.py [FILE]

Trains on the 1,437 training images only (half a minute on one core) and tests on the other 360, with and without noise.
Without FILE it writes src/onefold/metrics/digits_classifier.safetensors.

Expected: 357 of the 360 right (99.2 %). Other machines round differently: an image or two more or less, and a different
SHA-256.
"""

import sys
from pathlib import Path

import torch

from onefold.data import open_dataset, read_all
from onefold.metrics import Classifier, class_accuracy, effective_rank, frechet_distance, train_classifier

SHIPPED = Path(__file__).parents[1] / "src/onefold/metrics/digits_classifier.safetensors"
SPLITS = 10


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number of threads
    images, labels = read_all(open_dataset("digits"))
    train_classifier(images, labels, classes=10).save(path)
    classifier = Classifier.load(path)
    print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {classifier.sha256}")
    report(classifier)


def report(classifier: Classifier) -> None:
    """Print accuracies, and the Fréchet distances that set the scale for those of generated digits."""
    train, train_labels = read_all(open_dataset("digits"))
    test, test_labels = read_all(open_dataset("digits:test"))
    generator = torch.Generator().manual_seed(0)
    print(f"training images: accuracy {class_accuracy(classifier, train, train_labels):.4f}")
    for noise in (0, 0.1, 0.2, 0.4):
        bad = test + 127.5 * noise * torch.randn(test.shape, generator=generator)
        bad = bad.round().clamp(0, 255).to(torch.uint8)
        distance = frechet_distance(classifier.features(train), classifier.features(bad))
        accuracy = class_accuracy(classifier, bad, test_labels)
        print(f"accuracy  test with noise {noise}: {accuracy:.4f}, Fréchet distance to training {distance:.3f}")
    for name, images in (("training", train), ("all", torch.cat([train, test]))):
        features = classifier.features(images)
        half = len(features) // 2
        orders = [torch.randperm(len(features), generator=generator) for _ in range(SPLITS)]
        distances = torch.tensor([frechet_distance(features[o[:half]], features[o[half:]]) for o in orders])
        print(
            f"{name}: {len(features)} images, effective rank {effective_rank(features):.1f}, "
            f"Fréchet distance of random halves {distances.mean():.3f} ± {distances.std():.3f}"
        )


if __name__ == "__main__":
    main()
