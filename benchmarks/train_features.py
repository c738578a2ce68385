"""Train a good classifier of a data set, whose features then measure what is generated from it.

    python benchmarks/train_features.py cifar10-train.zip cifar10-test.zip features-cifar10.safetensors --mirror
    python benchmarks/train_features.py fashion-mnist fashion-mnist:test features-fashion.safetensors

The classifier that `onefold evaluate` trains when it is given no features sees 250,000 images, which takes minutes on a
CPU. This one is wider and learns longer, with shifted, mirrored and partly covered images: SGD with Nesterov momentum
at one rise and one fall of the rate, smoothed labels, an average over the last fifth of the training. It never sees a
test image before the last line, which prints the share of them that it takes for what they are. It is made for small
images, since its first layers keep their size.
"""

import copy
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import Positional, arg

import command
from onefold.compute import resolve_device
from onefold.data import open_dataset, read_all
from onefold.metrics import Classifier, class_accuracy
from onefold.metrics.classifier import ClassifierConfig

RATE = 0.4
WEIGHT_DECAY = 5e-4
SMOOTHING = 0.1
COVERED = 0.25
"""Side of the covered square, as a fraction of the image's."""
AVERAGED = 0.2
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
    classifier = Classifier(config).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(classifier)
    forward = torch.compile(classifier) if compiled else classifier
    optimizer = torch.optim.SGD(classifier.parameters(), momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    rng, steps = torch.Generator(device).manual_seed(seed), epochs * (n // batch)
    start, averaged = time.perf_counter(), 0
    for step in range(steps):
        if step % (n // batch) == 0:
            order = torch.randperm(n, generator=rng, device=device)
        index = order[(step % (n // batch)) * batch :][:batch]
        x = changed(images[index].float() / 127.5 - 1, mirror=mirror, rng=rng)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels[index], label_smoothing=SMOOTHING).backward()
        optimizer.step()
        optimizer.zero_grad()
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
    width: int = 64,
    residuals: int = 3,
    compiled: Annotated[bool, arg(name="compile")] = False,
    epochs: int = 30,
    batch: int = 500,
    mirror: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """`width`: channels of the first layer, doubled three times, up to the features. `residuals`: of each stage."""
    on, source = resolve_device(device), open_dataset(data)
    if source.classes < 2:
        raise SystemExit(f"{data}: has no classes to tell apart; `onefold evaluate` trains a network of another task")
    batch = min(batch, len(source))
    images, labels = (part.to(on) for part in read_all(source))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    config = ClassifierConfig(shape, source.classes, "", 1, tuple(width << k for k in range(4)), residuals)
    options = {"epochs": epochs, "batch": batch, "mirror": mirror, "compiled": compiled, "seed": seed}
    classifier = train(images, labels, config, **options)
    classifier.save(out)
    found = class_accuracy(Classifier.load(out).to(on), *read_all(open_dataset(test)))
    print(f"{out.name}: {out.stat().st_size:,} bytes, SHA-256 {classifier.sha256}")
    print(f"test images: accuracy {found:.4f}")


if __name__ == "__main__":
    command.run(main)
