"""Training of the classifier whose features measure a data set.

    min over θ of E cross-entropy(f_θ(a(x)), y)

where a shifts each image by up to an eighth of its side and adds Gaussian noise of up to 0.1 (of a range of
2): features that bear small damage measure large damage better. AdamW, one rise and one fall of the
learning rate.

Data without labels gives its own: each image is turned by 0, 90, 180 or 270 degrees and the network tells
which (images that are not square are mirrored in one axis, the other, both or none). To tell what is
upright, the network must know what is in the picture. There is then no class accuracy.

All randomness comes from `seed`: on one machine and device, with one number of threads, the same call gives
the same weights. Images and random numbers are on the device, and no step makes the host wait for it.

Shapes: images (n, C, H, W) uint8, labels (n,) int64 in 0…K−1.
Reference: Gidaris et al. 2018, arXiv:1803.07728, for rotations.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from onefold.errors import UserError
from onefold.metrics.classifier import Classifier, ClassifierConfig
from onefold.metrics.images import check_images

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
NOISE = 0.1
Progress = Callable[[int, int, float], None]


def train_classifier(
    images: Tensor,
    labels: Tensor | None,
    *,
    classes: int,
    seed: int = 0,
    epochs: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Classifier:
    """Train on images (n, C, H, W) uint8 and labels (n,) in 0…classes−1; returns the frozen classifier.

    With fewer than two classes the labels are not used and the task is the pretext one. `epochs` is by
    default what shows 250,000 images, but at least 4 and at most 200; `progress(images seen, images in all,
    loss)` is called after each step, and waits for its loss. Raises `UserError` for images or labels of the
    wrong kind, or fewer than 2 images.
    """
    config = _config(images, labels, classes)
    labels = None if config.pretext else labels
    n = len(images)
    epochs = epochs or min(200, max(4, 250_000 // n))
    batch = max(2, min(250, n // 10))
    steps = epochs * (n // batch)

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed other devices, too
        classifier = Classifier(config).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    rng = torch.Generator(device).manual_seed(seed)
    images, labels = images.to(device), None if labels is None else labels.to(device)
    whole = n - n % batch  # what is left over of an epoch waits for another order
    order = (i for _ in range(epochs) for i in _shuffled(n, rng)[:whole].split(batch))
    for step, index in enumerate(order):
        x = images[index].float() / 127.5 - 1
        x, y = (x, labels[index]) if labels is not None else pretext_task(x, config.pretext, rng)
        loss = F.cross_entropy(classifier(damage(x, rng)), y)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress((step + 1) * batch, steps * batch, loss.item())
    return classifier.freeze()


def _shuffled(n: int, rng: torch.Generator) -> Tensor:
    """0 … n − 1 in random order, on the device of `rng`."""
    return torch.randperm(n, generator=rng, device=rng.device)


def damage(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift each image of x (n, C, H, W) by up to an eighth of its side and add up to 0.1 of noise.

    `rng` is on the device of x.
    """
    n, _, h, w = x.shape
    reach, device = max(1, min(h, w) // 8), x.device
    rows, columns = (
        torch.arange(side, device=device) + torch.randint(2 * reach + 1, (n, 1), generator=rng, device=device)
        for side in (h, w)
    )
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    every = torch.arange(n, device=device)[:, None, None]
    x = padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    strength = NOISE * torch.rand((n, 1, 1, 1), generator=rng, device=device)
    return x + strength * torch.randn(x.shape, generator=rng, device=device)


def pretext_task(x: Tensor, pretext: str, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn or mirror each image of x (n, C, H, W) in one of four ways: the images, and which way (n,).

    `rng` is on the device of x.
    """
    if pretext == "rotations":
        ways = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])
    else:
        ways = torch.stack([x, x.flip(3), x.flip(2), x.flip(2, 3)])
    y = torch.randint(4, (len(x),), generator=rng, device=x.device)
    return ways[y, torch.arange(len(x), device=x.device)], y


def _config(images: Tensor, labels: Tensor | None, classes: int) -> ClassifierConfig:
    check_images(images)
    if len(images) < 2:
        raise UserError("images: a classifier needs at least 2; give more")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    if labels is None or classes < 2:
        return ClassifierConfig.of(shape, 0, "rotations" if shape[1] == shape[2] else "flips")
    if not isinstance(cast(object, labels), Tensor):
        raise UserError(f"labels: {type(labels).__name__} where an int64 tensor (n,) belongs; use torch.tensor(labels)")
    if labels.shape != (len(images),) or labels.dtype != torch.int64:
        raise UserError(f"labels: {tuple(labels.shape)} of {labels.dtype}; give one int64 for each image")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f"{int(labels.min())}…{int(labels.max())}"
        raise UserError(f"labels: {found} are not within 0…{classes - 1}; give the right number of classes")
    return ClassifierConfig.of(shape, classes)
