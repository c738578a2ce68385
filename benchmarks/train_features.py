"""Train a good classifier of a data set, whose features then measure what is generated from it.

    python benchmarks/train_features.py cifar10-train.zip cifar10-test.zip features-cifar10.safetensors --mirror
    python benchmarks/train_features.py fashion-mnist fashion-mnist:test features-fashion.safetensors

The classifier that `onefold evaluate` trains when it is given no features sees 250,000 images, which takes minutes on a
CPU. This one is wider and learns longer, with shifted, mirrored and partly covered images: Muon for the filters of its
convolutions, each a row of a matrix, and AdamW for the rest; one rise and one fall of the rates, smoothed labels, an
average over the last part of the training. It never sees a test image before the last line, which prints the share of
them that it takes for what they are. It is made for small images, since its first layers keep their size.

Reference: Muon for filters: Jordan et al., 2024.
"""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.optim import AdamW
from tyro.conf import Positional

from onefold.compute import resolve_device
from onefold.data import open_dataset, read_all
from onefold.metrics import Classifier, class_accuracy
from onefold.metrics.classifier import ClassifierConfig
from onefold.training.optimizer import Muon, set_rates

FILTER_RATE = 0.08
"""Peak rate of Muon. Filters have no weight decay: what matters of them, before a norm, is their direction."""
RATE = 4e-3
"""Peak rate of AdamW."""
WEIGHT_DECAY = 0.01
SMOOTHING = 0.1
COVERED = 0.25
"""Side of the covered square, as a fraction of the image's."""
AVERAGED = 0.15
"""Part of the training, at its end, over which weights are averaged."""


def changed(x: Tensor, *, mirror: bool, rng: torch.Generator) -> Tensor:
    """Images (n, C, H, W) shifted by up to an eighth of their side, partly covered, half of them mirrored."""
    n, _, h, w = x.shape
    reach = max(1, min(h, w) // 8)
    padded = F.pad(x, (reach,) * 4, mode="reflect")

    def uniform(below: int) -> Tensor:
        return torch.randint(below, (n, 1), generator=rng, device=x.device)

    rows, columns = (torch.arange(side, device=x.device) + uniform(2 * reach + 1) for side in (h, w))
    x = padded[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2)
    if mirror:
        x = torch.where(uniform(2).bool()[:, :, None, None], x, x.flip(3))
    near = [(torch.arange(side, device=x.device) - uniform(side)).abs() < COVERED * side / 2 for side in (h, w)]
    return x.masked_fill((near[0][:, :, None] & near[1][:, None, :])[:, None], 0.0)


class FilterMuon(Muon):
    """Muon on filters (out, in, h, w), as matrices of `out` rows that share their memory."""

    def __init__(self, filters: Sequence[nn.Parameter], lr: float) -> None:
        self.filters = filters
        super().__init__([nn.Parameter(p.data.flatten(1)) for p in filters], lr=lr, momentum=0.9, dtype=torch.bfloat16)

    def step(self, closure: Any = None) -> Any:
        for p, matrix in zip(self.filters, self.param_groups[0]["params"], strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.flatten(1)
        return super().step(closure)


def train(
    images: Tensor,
    labels: Tensor,
    config: ClassifierConfig,
    *,
    epochs: int,
    batch: int,
    mirror: bool,
    compiled: bool,
    seed: int,
) -> Classifier:
    """The classifier of images (n, C, H, W) uint8 and labels (n,), trained on the device where they are."""
    device, n = images.device, len(images)
    torch.manual_seed(seed)
    classifier = Classifier(config).to(device)
    average = copy.deepcopy(classifier)
    forward = torch.compile(classifier) if compiled else classifier
    filters = [p for p in classifier.body.parameters() if p.ndim == 4 and p.shape[1] > images.shape[1]]
    others = [p for p in classifier.parameters() if all(p is not own for own in filters)]
    optimizers = [
        FilterMuon(filters, FILTER_RATE),
        AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
    ]
    rng, steps = torch.Generator(device).manual_seed(seed), epochs * (n // batch)
    start, averaged = time.perf_counter(), 0
    for step in range(steps):
        if step % (n // batch) == 0:
            order = torch.randperm(n, generator=rng, device=device)
        index = order[(step % (n // batch)) * batch :][:batch]
        x = changed(images[index].float() / 127.5 - 1, mirror=mirror, rng=rng)
        set_rates(optimizers, min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels[index], label_smoothing=SMOOTHING).backward()
        for optimizer in optimizers:
            optimizer.step()
        classifier.zero_grad()
        if step >= (1 - AVERAGED) * steps:
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
    widths: tuple[int, ...] = (32, 64, 256, 256),
    residuals: int = 1,
    pooled: bool = True,
    compiled: Annotated[bool, tyro.conf.arg(name="compile")] = False,
    epochs: int = 15,
    batch: int = 500,
    mirror: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """`widths`: channels after the stem and after each stage; `residuals` and `pooled`: see `ClassifierConfig`."""
    on, source = resolve_device(device), open_dataset(data)
    if source.classes < 2:
        raise SystemExit(f"{data}: has no classes to tell apart; `onefold evaluate` trains a network of another task")
    batch = min(batch, len(source))
    images, labels = (part.to(on) for part in read_all(source))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = ClassifierConfig(shape, source.classes, "", 1, widths, residuals, pooled)
    options = {"epochs": epochs, "batch": batch, "mirror": mirror, "compiled": compiled, "seed": seed}
    classifier = train(images, labels, config, **options)
    classifier.save(out)
    found = class_accuracy(Classifier.load(out).to(on), *read_all(open_dataset(test)))
    print(f"{out.name}: {out.stat().st_size:,} bytes, SHA-256 {classifier.sha256}")
    print(f"test images: accuracy {found:.4f}")


if __name__ == "__main__":
    tyro.cli(main)
