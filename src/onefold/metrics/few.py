"""Which numbers rest on few images, and how far one counted on few may be off.

A number of few images is no worse a number, but it says less than it seems to: around 16 points the balls of precision
cover noise as well. The thresholds come from measurements on digits (docs/metrics.md); they are round numbers.

    Wilson's interval of a share p of n:   (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n),   z = 1.96 for 95 %

It stays within [0, 1] and has a width even where p is 0 or 1. Reference: Wilson 1927.
"""

import math

Z = 1.96

LEAST_REGION = 200
"""Images from which precision and recall tell noise from images."""
LEAST_SHARE = 100
"""Images from which an accuracy is known to ± 0.1, or better."""
LEAST_HELD_OUT = 100
"""Held-out images from which their nearest twentieth is about a twentieth."""
LEAST_RECONSTRUCTED = 30
"""Test images from which means of reconstruction are steady."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Where the true share lies, at 95 %, when `share` of `count` ≥ 1 independent cases were hits."""
    centre, square = share + Z**2 / (2 * count), Z**2 / count
    reach = Z * math.sqrt(max(0.0, share * (1 - share)) / count + Z**2 / (4 * count**2))
    return max(0.0, (centre - reach) / (1 + square)), min(1.0, (centre + reach) / (1 + square))


def few_images(
    *, generated: int, held_out: int, tested: int, width: int, selected_by: int | None = None
) -> dict[str, str]:
    """The numbers of a record that rest on few images, by name, each with the reason in words.

    Args:
        generated: Generated images, and as many real ones.
        held_out: Real images whose distances to the training images give the scale of copies.
        tested: Test images that are reconstructed, classified, and compared with the generated ones.
        width: Number of features.
        selected_by: Samples whose Fréchet distance chose the published weights, if they were chosen.
    """
    found: dict[str, str] = {}
    if generated < 2 * width:
        found["frechet_distance"] = f"{generated} images, below twice the {width} features: too large"
    if generated < LEAST_REGION:
        found["kid"] = f"{generated} images: see its error"
        found["precision"] = f"{generated} images: noise may pass, below {LEAST_REGION}"
        found["recall"] = f"{generated} images: compare equal numbers alone"
    if generated < LEAST_SHARE:
        found["class_accuracy"] = f"{generated} images"
    if held_out < LEAST_HELD_OUT:
        chance = max(0.05, 1 / (held_out + 1))
        found["memorisation"] = f"{held_out} images held out: new images may have {chance:.2f} and more"
    if selected_by is not None and selected_by < width:
        found["selection"] = f"{selected_by} samples, below the {width} features: chance chose among the averages"
    if tested < LEAST_SHARE:
        found["class_accuracy_real"] = f"{tested} images"
    if tested < LEAST_RECONSTRUCTED:
        found["reconstruction"] = f"{tested} images"
        found["latent"] = f"{tested} images"
    if tested < 2 * width:
        found["reconstruction.frechet_distance"] = f"{tested} images, below twice the {width} features: too large"
    fewer = min(generated, tested)
    if fewer < 2 * width:
        found["test.frechet_distance"] = f"{fewer} images, below twice the {width} features: compare it with its floor"
    if fewer < LEAST_REGION:
        found["test.kid"] = f"{fewer} images: see its error"
        found["test.precision"] = f"{fewer} images: noise may pass, below {LEAST_REGION}"
        found["test.recall"] = f"{fewer} images: compare equal numbers alone"
    return found
