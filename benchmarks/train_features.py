"""Train a good classifier of a data set, whose features then measure what is generated from it.

    python benchmarks/train_features.py cifar10-train.zip cifar10-test.zip features-cifar10.safetensors --fast --mirror
    python benchmarks/train_features.py fashion-mnist fashion-mnist:test features-fashion.safetensors

The classifier that `onefold evaluate` trains when it is given no features sees 250,000 images, which takes minutes on a
CPU. This one is wider and learns longer, with shifted and mirrored images, smoothed labels, one rise and one fall of
the rate, and an average over the last part of the training. It never sees a test image before the last line, which
prints its accuracy on them. It is made for small images, since its first layers keep their size.

There are two recipes. The plain one, by SGD from partly covered images, is for a GPU and made the published features of
Fashion-MNIST and CIFAR-10. `--fast` needs fewer images, so that a CPU suffices. The stem's filters are the principal
components of the images' patches and stay fixed; other filters begin as the identity and learn by Muon, at a fixed
norm. Sides are halved by pooling. With `--mirror` an image is seen as it is and mirrored in turn, and its features are
the mean of both.

Reference: the parts of `--fast`: Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tyro.conf import Positional, arg

import command
from onefold.compute import resolve_device
from onefold.data import open_dataset, read_all
from onefold.metrics import Classifier, class_accuracy
from onefold.metrics.classifier import ClassifierConfig
from onefold.training.optimizer import Muon, set_rates


@dataclass(frozen=True)
class Recipe:
    """Where the two recipes differ, besides their networks and optimizers."""

    smoothing: float
    """Part of a label that all classes share."""
    covered: float
    """Side of the covered square, as a fraction of the image's."""
    rise: float
    """Part of the training in which the rate rises."""
    averaged: float
    """Part of the training, at its end, over which weights are averaged."""
    momentum: float
    """Of the statistics of batch normalisation: larger for fewer steps."""
    widths: tuple[int, ...]
    """Channels after the stem and after each stage."""


PLAIN = Recipe(smoothing=0.1, covered=0.25, rise=0.2, averaged=0.2, momentum=0.1, widths=(64, 128, 256, 512))
FAST = Recipe(smoothing=0.2, covered=0.0, rise=0.1, averaged=0.1, momentum=0.4, widths=(32, 128, 384, 512))


def changed(x: Tensor, mirrored: Tensor, *, covered: float, rng: torch.Generator) -> Tensor:
    """Images (n, C, H, W) shifted by up to an eighth of their side, partly covered; mirrored where `mirrored` (n,)."""
    n, _, h, w = x.shape
    reach = max(1, min(h, w) // 8)
    padded = F.pad(x, (reach,) * 4, mode="reflect")

    def uniform(below: int) -> Tensor:
        return torch.randint(below, (n, 1), generator=rng, device=x.device)

    rows, columns = (torch.arange(side, device=x.device) + uniform(2 * reach + 1) for side in (h, w))
    x = padded[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2)
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    near = [(torch.arange(side, device=x.device) - uniform(side)).abs() < covered * side / 2 for side in (h, w)]
    return x.masked_fill((near[0][:, :, None] & near[1][:, None, :])[:, None], 0.0)


@torch.no_grad()
def prepare(classifier: Classifier, images: Tensor) -> None:
    """Set the stem from images (n, C, H, W) uint8 and fix it; make the other filters the identity.

    The stem's filters are the first principal components of patches, and their negatives. Batch normalisation follows:
    it whitens them.
    """
    stem, *others = [layer for layer in classifier.body.modules() if isinstance(layer, nn.Conv2d)]
    assert stem.bias is not None
    some = images[:: max(1, len(images) // 1000)].cpu().double()  # of all classes, which may be in order
    patches = F.unfold(some / 127.5 - 1, stem.kernel_size).movedim(1, 2).flatten(0, 1)
    components = torch.linalg.eigh(torch.cov(patches.T)).eigenvectors.T.flip(0)[: stem.out_channels // 2]
    stem.weight.copy_(torch.cat([components, -components]).unflatten(1, stem.weight.shape[1:]))
    stem.bias.zero_()
    stem.requires_grad_(False)
    for layer in others:
        nn.init.dirac_(layer.weight[: layer.in_channels])


class FilterMuon(Muon):
    """Muon on filters (out, in, h, w), as matrices of `out` rows whose norm stays out^½: only directions change."""

    def __init__(self, filters: Sequence[nn.Parameter], lr: float) -> None:
        self.filters = filters
        matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in filters]  # of the same memory
        super().__init__(matrices, lr=lr, momentum=0.6, dtype=torch.bfloat16)
        self.normalise()

    def step(self, closure: Any = None) -> Any:
        for p, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.flatten(1)
        super().step(closure)
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        for matrix in self.param_groups[0]["params"]:
            matrix.mul_(len(matrix) ** 0.5 / matrix.norm())


def optimizers_of(classifier: Classifier, *, fast: bool) -> list[Optimizer]:
    """Muon for the filters that learn and AdamW for the rest, or SGD with Nesterov momentum for all."""
    if not fast:
        return [SGD(classifier.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4)]
    learned = [p for p in classifier.parameters() if p.requires_grad]
    filters, others = ([p for p in learned if (p.ndim == 4) == of_filters] for of_filters in (True, False))
    return [FilterMuon(filters, lr=0.17), AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)]


def train(
    images: Tensor,
    labels: Tensor,
    config: ClassifierConfig,
    *,
    fast: bool,
    epochs: int,
    batch: int,
    mirror: bool,
    compiled: bool,
    seed: int,
) -> Classifier:
    """The classifier of images (n, C, H, W) uint8 and labels (n,), trained on the device where they are."""
    device, n, recipe = images.device, len(images), FAST if fast else PLAIN
    torch.manual_seed(seed)
    classifier = Classifier(config).to(device)
    for norm in (layer for layer in classifier.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = recipe.momentum
    if fast:
        prepare(classifier, images)
    optimizers = optimizers_of(classifier, fast=fast)
    average = copy.deepcopy(classifier)
    forward = torch.compile(classifier) if compiled else classifier
    rng, steps = torch.Generator(device).manual_seed(seed), epochs * (n // batch)
    side = torch.rand(n if fast else 0, generator=rng, device=device) < 0.5
    start, averaged = time.perf_counter(), 0
    for step in range(steps):
        epoch, place = divmod(step, n // batch)
        if place == 0:
            order = torch.randperm(n, generator=rng, device=device)
        index = order[place * batch :][:batch]
        mirrored = side[index] ^ (epoch % 2 == 1) if fast else torch.rand(batch, generator=rng, device=device) < 0.5
        x = changed(images[index].float() / 127.5 - 1, mirrored & mirror, covered=recipe.covered, rng=rng)
        set_rates(optimizers, min((step + 1) / (recipe.rise * steps), (steps - step) / ((1 - recipe.rise) * steps)))
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels[index], label_smoothing=recipe.smoothing).backward()
        for optimizer in optimizers:
            optimizer.step()
        classifier.zero_grad()
        if steps - step <= max(1, recipe.averaged * steps):
            averaged += 1
            with torch.no_grad():
                pairs = zip(average.state_dict().values(), classifier.state_dict().values(), strict=True)
                for own, new in pairs:
                    own.copy_(own + (new - own) / averaged if own.is_floating_point() else new)
        if (step + 1) % max(1, steps // 10) == 0:
            rate = (step + 1) * batch / (time.perf_counter() - start)
            print(f"{(step + 1) * batch:>10,} images, {rate:,.0f} images/s", flush=True)
    return average.freeze()


def main(
    data: Positional[str],
    test: Positional[str],
    out: Positional[Path],
    /,
    widths: tuple[int, ...] | None = None,
    residuals: int = 3,
    fast: bool = False,
    compiled: Annotated[bool, arg(name="compile")] = False,
    epochs: int = 30,
    batch: int = 500,
    mirror: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train a classifier of `data`, write it to `out` and print its accuracy on `test`.

    `widths`: channels after the stem and after each stage, the last of which are the features. Default: 64 128 256 512,
    or with `fast` 32 128 384 512. `residuals`: of each stage. `fast`: need fewer images. `mirror`: mirror images are as
    likely, as they are not of digits or text; the features of `fast` then cannot tell them apart.
    """
    if min(epochs, batch, residuals) < 1:
        raise SystemExit("--epochs, --batch, --residuals: give at least 1 of each")
    on, source = resolve_device(device), open_dataset(data)
    if source.classes < 2:
        raise SystemExit(f"{data}: has no classes to tell apart; `onefold evaluate` trains a network of another task")
    most = 2 * 9 * source.image_shape[-1]  # components of patches of 3 × 3, and their negatives
    if widths is None:
        first, *others = (FAST if fast else PLAIN).widths
        widths = (min(first, most) if fast else first, *others)
    if len(widths) < 2 or min(widths) < 1 or (fast and (widths[0] > most or widths[0] % 2)):
        stem = f", the first even and at most {most}" if fast else ""
        raise SystemExit(f"--widths: {' '.join(map(str, widths))}; give at least two{stem}")
    tested = open_dataset(test)
    if (tested.image_shape, tested.classes) != (source.image_shape, source.classes):
        raise SystemExit(f"{test}: has other images or classes than {data}; give its test images")
    if out.is_dir():
        raise SystemExit(f"{out}: is a folder; give the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    batch = min(batch, len(source))
    images, labels = (part.to(on) for part in read_all(source))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = ClassifierConfig(shape, source.classes, "", 1, widths, residuals, pooled=fast, mirrored=fast and mirror)
    options = {"fast": fast, "epochs": epochs, "batch": batch, "mirror": mirror, "compiled": compiled, "seed": seed}
    classifier = train(images, labels, config, **options)
    classifier.save(out)
    found = class_accuracy(Classifier.load(out).to(on), *read_all(tested))
    print(f"{out.name}: {out.stat().st_size:,} bytes, SHA-256 {classifier.sha256}")
    print(f"test images: accuracy {found:.4f}")


if __name__ == "__main__":
    command.run(main)
