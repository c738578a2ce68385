"""Train a good classifier of a data set, whose features then measure what is generated from it.

    python benchmarks/train_features.py cifar10-train.zip cifar10-test.zip features-cifar10.safetensors --mirror
    python benchmarks/train_features.py fashion-mnist fashion-mnist:test features-fashion.safetensors

The classifier that `onefold evaluate` trains when it is given no features sees 250,000 images, which takes minutes on a
CPU. This one is wider and learns longer, with shifted and mirrored images, smoothed labels, one rise and one fall of
the rate, and an average over the last part of the training. It never sees a test image before the last line, which
prints the share of them that it takes for what they are. It is made for small images, since its first layers keep their
size.

There are two recipes. The plain one learns by SGD with Nesterov momentum, from partly covered images. With `--fast` a
network learns more from each image, so that a CPU suffices. The stem's filters are the principal components of the
images' patches, whitened, and stay so; other filters begin as the identity and learn by Muon, at a fixed norm. Sides
are halved by pooling. With `--mirror` an image is seen as it is and mirrored in turn, and its features are the mean of
both.

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
    """What the two recipes set apart."""

    smoothing: float
    """Part of a label that all classes share."""
    covered: float
    """Side of the covered square, as a fraction of the image's."""
    rise: float
    """Part of the training in which the rate rises."""
    averaged: float
    """Part of the training, at its end, over which weights are averaged."""


PLAIN = Recipe(smoothing=0.1, covered=0.25, rise=0.2, averaged=0.2)
FAST = Recipe(smoothing=0.2, covered=0.0, rise=0.1, averaged=0.1)


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
def prepare(classifier: Classifier, images: Tensor) -> list[nn.Parameter]:
    """Whiten the stem by images (n, C, H, W) uint8 and fix it; make the other filters the identity and return them.

    The stem's filters are the first principal components of patches, divided by their deviations, and their negatives.
    """
    stem, *others = [layer for layer in classifier.body.modules() if isinstance(layer, nn.Conv2d)]
    assert stem.bias is not None
    half, side = stem.out_channels // 2, stem.kernel_size[0]
    patches = F.unfold(images.float() / 127.5 - 1, side).movedim(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh(torch.cov(patches.T))
    if half > len(variances) or stem.out_channels % 2:
        raise SystemExit(f"--widths: a stem of at most {2 * len(variances)} channels, an even number, can be whitened")
    filters = (components / (variances.clamp(min=0) + 5e-4).sqrt()).T.flip(0)[:half]
    filters = torch.cat([filters, -filters])
    stem.weight.copy_(filters.unflatten(1, stem.weight.shape[1:]))
    stem.bias.copy_(-filters @ mean)
    stem.weight.requires_grad_(False)
    for layer in others:
        nn.init.dirac_(layer.weight[: layer.in_channels])
    for norm in (layer for layer in classifier.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = 0.4  # few steps, and large batches
    return [layer.weight for layer in others]


class FilterMuon(Muon):
    """Muon on filters (out, in, h, w), as matrices of `out` rows whose norm stays out^½: they only turn."""

    def __init__(self, filters: Sequence[nn.Parameter], lr: float) -> None:
        self.filters = filters
        matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in filters]
        super().__init__(matrices, lr=lr, momentum=0.6, dtype=torch.bfloat16)
        self.put_back()

    def step(self, closure: Any = None) -> Any:
        for p, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.flatten(1)
        super().step(closure)
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give every filter its matrix, at its norm."""
        for p, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            matrix.mul_(len(matrix) ** 0.5 / matrix.norm())
            p.copy_(matrix.view(p.shape))


def optimizers_of(classifier: Classifier, filters: Sequence[nn.Parameter]) -> list[Optimizer]:
    """Muon for `filters`, if there are any, and AdamW for the rest; otherwise SGD for all."""
    if not filters:
        return [SGD(classifier.parameters(), lr=0.4, momentum=0.9, nesterov=True, weight_decay=5e-4)]
    known = {id(p) for p in filters}
    others = [p for p in classifier.parameters() if id(p) not in known and p.requires_grad]
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
    classifier = Classifier(config).to(device, memory_format=torch.channels_last)
    optimizers = optimizers_of(classifier, prepare(classifier, images[:5000]) if fast else [])
    average = copy.deepcopy(classifier)
    forward = torch.compile(classifier) if compiled else classifier
    rng, steps = torch.Generator(device).manual_seed(seed), epochs * (n // batch)
    side = torch.rand(n, generator=rng, device=device) < 0.5
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
        if step >= (1 - recipe.averaged) * steps:
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
    widths: tuple[int, ...] = (64, 128, 256, 512),
    residuals: int = 3,
    fast: bool = False,
    compiled: Annotated[bool, arg(name="compile")] = False,
    epochs: int = 30,
    batch: int = 500,
    mirror: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Train a classifier of `data`, write it to `out` and say how much of `test` it knows.

    `widths`: channels after the stem and after each stage, the last of which are the features. `residuals`: of each
    stage. `fast`: learn more from each image. `mirror`: show mirror images, too.
    """
    on, source = resolve_device(device), open_dataset(data)
    if source.classes < 2:
        raise SystemExit(f"{data}: has no classes to tell apart; `onefold evaluate` trains a network of another task")
    batch = min(batch, len(source))
    images, labels = (part.to(on) for part in read_all(source))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = ClassifierConfig(shape, source.classes, "", 1, widths, residuals, pooled=fast, mirrored=fast and mirror)
    options = {"fast": fast, "epochs": epochs, "batch": batch, "mirror": mirror, "compiled": compiled, "seed": seed}
    classifier = train(images, labels, config, **options)
    classifier.save(out)
    found = class_accuracy(Classifier.load(out).to(on), *read_all(open_dataset(test)))
    print(f"{out.name}: {out.stat().st_size:,} bytes, SHA-256 {classifier.sha256}")
    print(f"test images: accuracy {found:.4f}")


if __name__ == "__main__":
    command.run(main)
