"""Recipes: named configurations. Each docstring states the expected result and cost, as measured.

`recipe(name)` returns one. Its image size, channels and classes are those of the data set that it is named after;
training replaces them with those of the actual data.
"""

from collections.abc import Callable
from typing import Any

from onefold.errors import UserError
from onefold.networks.base import NetworkConfig
from onefold.objectives.one_run import OneRun
from onefold.objectives.self_distillation import SelfDistillation
from onefold.training.config import Config, DataConfig, TrainingConfig

__all__ = ["RECIPES", "recipe"]


def digits() -> Config:
    """The embedded 8×8 digits; latents of 16 tokens × 4 channels, as many values as the image has pixels.

    Expected (3 seeds, 50 steps, no guidance, `benchmarks/digits_seeds.py`): class accuracy 0.979 ± 0.001, Fréchet
    distance 0.88 ± 0.08 times that between two halves of the real images, PSNR of test images 38.0 ± 0.2 dB. Cost:
    3.1 to 4.6 minutes on two idle CPU cores with bf16 matrix units, half a minute or more of it compilation; 0.8 GB.
    """
    return Config(
        recipe="digits",
        network=NetworkConfig(image_size=(8, 8), channels=1, classes=10, patch=2, latent_channels=4, depth=4),
        objective=SelfDistillation(draws=4),
        data=DataConfig(source="digits", test="digits:test"),
        training=TrainingConfig(
            images=64_000,
            batch=64,
            optimizer="muon",
            learning_rate=2e-3,
            warmup=3_200,
            ema_half_lives=(4_000,),
            log_every=3_200,
            sample_every=16_000,
            checkpoint_every=16_000,
        ),
    )


def fashion() -> Config:
    """Fashion-MNIST, 28×28 grey images of ten classes: 49 tokens × 8 channels, half as many values as pixels.

    The data are the four IDX files in a folder (`--data fashion-mnist`), with their own test images.

    Expected with `--one-step` (one seed, 393,728 images, 10,000 samples, features of `benchmarks/train_features.py`):
    in one step, class accuracy 0.908 (test images: 0.937) and Fréchet distance 0.142 to training images, in 50 steps
    0.894 and 0.152; PSNR of test images 32.3 dB. Cost: 83 seconds on a shared H200 with
    `--training.graphs yes`, besides compilation.
    """
    return Config(
        recipe="fashion",
        network=NetworkConfig(
            image_size=(28, 28), channels=1, classes=10, patch=4, latent_channels=8, width=256, depth=6, heads=4
        ),
        objective=SelfDistillation(reconstruction="l1", decoder_noise=0.5, draws=4),
        data=DataConfig(source="fashion-mnist"),
        training=TrainingConfig(
            images=400_000,
            batch=256,
            optimizer="muon",
            learning_rate=1e-3,
            warmup=25_600,
            ema_half_lives=(6_000, 20_000),
            log_every=12_800,
            health_every=51_200,
            sample_every=100_000,
            checkpoint_every=100_000,
        ),
        onerun=OneRun(generator_rate=1e-3, student_rate=2e-3),
    )


def cifar10() -> Config:
    """32×32 RGB images of ten classes: 64 tokens × 16 channels, a third of the image's values.

    Expected with `--one-step` (one seed, 555,008 images, JPEG copies of CIFAR-10, 10,000 samples, features of
    `benchmarks/train_features.py`, which are not Inception's): in one step, class accuracy 0.618 (test images: 0.897),
    Fréchet distance 0.929 to training images; PSNR of test images 44.9 dB. Cost: 224 seconds on a shared H200 with
    `--training.graphs yes`, besides compilation. It was not trained to convergence: give it more `--images`.
    """
    return Config(
        recipe="cifar10",
        network=NetworkConfig(
            image_size=(32, 32), channels=3, classes=10, patch=4, latent_channels=16, width=384, depth=8, heads=6
        ),
        objective=SelfDistillation(reconstruction="l1", decoder_noise=0.5, draws=4),
        data=DataConfig(source="cifar10-train.zip", test="cifar10-test.zip", mirrored="cifar10-train.zip"),
        training=TrainingConfig(
            images=560_000,
            batch=512,
            optimizer="muon",
            learning_rate=1e-3,
            warmup=51_200,
            ema_half_lives=(8_000, 28_000),
            log_every=25_600,
            health_every=102_400,
            sample_every=140_000,
            checkpoint_every=140_000,
        ),
        onerun=OneRun(generator_rate=1e-3, student_rate=2e-3),
    )


def _imagenet256(name: str, width: int, depth: int, heads: int) -> Config:
    """256 tokens × 32 channels, and the paper's schedule: 50 epochs of 1,281,167 images."""
    return Config(
        recipe=name,
        network=NetworkConfig(
            image_size=(256, 256),
            channels=3,
            classes=1000,
            patch=16,
            latent_channels=32,
            width=width,
            depth=depth,
            heads=heads,
        ),
        objective=SelfDistillation(reconstruction="l1", decoder_noise=0.5, draws=2),
        data=DataConfig(
            source="imagenet256-train.zip", test="imagenet256-val.zip", workers=8, mirrored="imagenet256-train.zip"
        ),
        training=TrainingConfig(
            images=50 * 1_281_167,
            batch=1024,
            optimizer="muon",
            learning_rate=5e-4,
            warmup=1_000_000,
            ema_half_lives=(300_000, 3_000_000),
            log_every=51_200,
            health_every=102_400,
            sample_every=1_000_000,
            checkpoint_every=1_000_000,
        ),
    )


def imagenet256_s() -> Config:
    """42M parameters at 256×256. The paper reports FID 13.44 for its network of this size. Not yet measured."""
    return _imagenet256("imagenet256-s", width=512, depth=12, heads=8)


def imagenet256_m() -> Config:
    """119M parameters at 256×256. The paper reports FID 6.38 for its 118M network. Not yet measured."""
    return _imagenet256("imagenet256-m", width=768, depth=16, heads=12)


def imagenet256_b() -> Config:
    """209M parameters at 256×256. The paper reports FID 4.25 for its 205M network. Not yet measured."""
    return _imagenet256("imagenet256-b", width=1024, depth=16, heads=16)


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "fashion": fashion,
    "cifar10": cifar10,
    "imagenet256-s": imagenet256_s,
    "imagenet256-m": imagenet256_m,
    "imagenet256-b": imagenet256_b,
}


def recipe(name: str, **overrides: Any) -> Config:
    """The configuration of a recipe, with optional overrides.

    `recipe("digits", training={"batch": 32}, network={"depth": 6})`; dotted names such as
    `**{"training.batch": 32}` do the same.

    Raises:
        UserError: no such recipe or setting, or a value of the wrong type.
    """
    if name == "auto":
        raise UserError("recipe: auto follows from your images; make it with onefold.plan(images).config")
    if name not in RECIPES:
        raise UserError(f"recipe: {name!r} is not known; choose one of {', '.join(RECIPES)}")
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        changes |= {f"{key}.{part}": item for part, item in value.items()} if isinstance(value, dict) else {key: value}
    return RECIPES[name]().with_changes(changes)
