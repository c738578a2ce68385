"""What a run's network does, in pictures: samples, classes, neighbours, interpolations, reconstructions, latents."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from onefold.data import Dataset, read_all
from onefold.data.messages import count_text
from onefold.metrics import effective_rank
from onefold.networks import Network
from onefold.pictures.grids import encode_decode, grid, pair_grid
from onefold.pictures.style import BLUE, ORANGE, inline_svg, log_axis
from onefold.pixels import to_float
from onefold.report import html
from onefold.sampling import noises, resolve_labels, solve, with_guidance
from onefold.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["between", "nearest", "of_data", "of_network", "over_training"]

COLUMNS = 10
STEPS = 50
LEAST = 1e-12
MOST_CLASSES = 10
SEARCHED = 20_000
"""Maximum number of training images that neighbours are looked for among."""
TESTED = 1_000
"""Maximum number of test images that are encoded."""


def of_network(network: Network) -> Iterator[str]:
    """Samples, in one step and in many if it can do both; classes; and a walk between seeds."""
    config, own = network.config, network.sampler
    yield html.heading(2, "Samples")
    seeds = f"seeds 0 to {5 * COLUMNS - 1}"
    made = html.image(grid(network.sample(5 * COLUMNS), columns=COLUMNS), f"generated images, {seeds}")
    shown = [html.figure(made, f"{count_text(own.steps, 'step')}, {seeds}.")]
    if own.jumps:
        many = network.sample(5 * COLUMNS, steps=STEPS, solver="euler")
        picture = html.image(grid(many, columns=COLUMNS), f"the same seeds in {STEPS} steps")
        shown.append(html.figure(picture, f"The same seeds and classes in {STEPS} steps of the same network."))
    yield html.figures(shown)
    if config.classes:
        some = np.linspace(0, config.classes - 1, min(config.classes, MOST_CLASSES)).round().astype(int)
        names = [config.class_names[k] if config.class_names else str(k) for k in some]
        labels = [int(k) for k in some for _ in range(COLUMNS)]
        rows = np.concatenate([network.sample(COLUMNS, labels=[int(k)] * COLUMNS, seed=0) for k in some])
        assert len(rows) == len(labels)
        picture = html.image(grid(rows, columns=COLUMNS), f"a row for each of the classes {', '.join(names)}")
        yield html.heading(2, "Classes")
        yield html.figure(picture, f"A row for each class, a column for each seed. From above: {', '.join(names)}.")
    yield html.heading(2, "Between seeds")
    picture = html.image(grid(between(network), columns=COLUMNS), "interpolations between pairs of seeds")
    yield html.figure(
        picture, "From one seed to another, along the great circle between their noises; one class a row."
    )


@torch.no_grad()
def between(network: Network, rows: int = 5) -> UInt8[np.ndarray, "n H W C"]:
    """Images of noise on the great circle between seeds 2k and 2k + 1, `COLUMNS` of each row k."""
    config, sampler = network.config, network.sampler
    shape = (config.tokens, config.latent_channels)
    ends = next(noises(range(2 * rows), shape)).unflatten(0, (rows, 2))
    angle = torch.linspace(0, torch.pi / 2, COLUMNS)[None, :, None, None]
    eps = (angle.cos() * ends[:, :1] + angle.sin() * ends[:, 1:]).flatten(0, 1).to(network.device)
    labels = resolve_labels(rows, None, 0, config.classes)
    y = None if labels is None else torch.tensor(labels, device=network.device).repeat_interleave(COLUMNS)
    guide = with_guidance(network.denoise, sampler.guidance, config.classes)
    noise = noises(range(rows * COLUMNS), shape)
    z = solve(network.denoise, eps, y, sampler, guide=guide, noise=noise, jump=network.jump_of(sampler))
    return network.pictures([z])


def of_data(network: Network, train: Dataset, test: Dataset) -> Iterator[str]:
    """What needs the images: neighbours, reconstructions, and the latents' spectrum."""
    yield html.heading(2, "Nearest training images")
    made = network.sample(2 * COLUMNS)
    chosen = np.linspace(0, len(train) - 1, min(len(train), SEARCHED)).round().astype(np.int64)
    pool = read_all(train, chosen)[0].permute(0, 2, 3, 1).numpy()
    picture = html.image(pair_grid(made, nearest(made, pool), columns=COLUMNS), "samples above training images")
    among = f"{len(pool):,} training images" + (f" of {len(train):,}" if len(pool) < len(train) else "")
    yield html.figure(picture, f"Each sample above the nearest of {among}, by the distance of their pixels.")
    x, _ = read_all(test, np.linspace(0, len(test) - 1, min(len(test), TESTED)).round().astype(np.int64))
    if network.learns_codec:
        originals = x[: 3 * COLUMNS]
        pairs = pair_grid(originals.permute(0, 2, 3, 1).numpy(), encode_decode(network, originals), columns=COLUMNS)
        yield html.heading(2, "Reconstructions")
        yield html.figure(html.image(pairs, "test images above reconstructions"), "Test images above what comes back.")
    if len(x) > 1:
        with torch.no_grad():
            z = torch.cat([network.encode(to_float(part.to(network.device))).cpu() for part in x.split(256)])
        yield html.heading(2, "Spectrum of the latents")
        drawing = inline_svg(partial(_draw_spectrum, z), "spectrum")
        ranks = f"{effective_rank(z.flatten(0, 1)):.2f} of {z.shape[2]}, and {effective_rank(z.flatten(1)):.1f}"
        caption = (
            f"Singular values of the centred latents of {count_text(len(x), 'test image')}, as shares of their sum. "
        )
        caption += f"Effective ranks: of tokens {ranks} of {z[0].numel()} of whole latents."
        yield html.figures([html.figure(drawing, caption)])


def nearest(images: UInt8[np.ndarray, "n H W C"], pool: UInt8[np.ndarray, "m H W C"]) -> UInt8[np.ndarray, "n H W C"]:
    """For each image the one of the pool with the least squared distance of pixels."""
    rows = torch.from_numpy(pool).flatten(1)
    found = [int((rows.int() - row.int()).square().sum(1).argmin()) for row in torch.from_numpy(images).flatten(1)]
    return pool[found]


def over_training(run: Run, most: int = 6) -> Iterator[str]:
    """The pictures that the run drew of itself, spread over its course."""
    paths = sorted(path for path in (run.folder / "samples").glob("*.png") if path.stem.isdigit())
    if not paths:
        return
    some = dict.fromkeys(np.linspace(0, len(paths) - 1, most).round().astype(int).tolist())
    yield html.heading(2, "Samples over training")
    shown = (paths[k] for k in some)
    yield html.figures(
        html.figure(html.image(path, f"samples at {int(path.stem):,} images"), f"{int(path.stem):,} images seen.")
        for path in shown
    )


def _draw_spectrum(z: Float[Tensor, "n N D"], ax: "Axes") -> None:
    for label, rows, colour in (("tokens", z.flatten(0, 1), ORANGE), ("whole latents", z.flatten(1), BLUE)):
        values = torch.linalg.svdvals((rows - rows.mean(0)).double())
        shares = (values / values.sum()).clamp(min=LEAST)
        ax.plot(range(1, len(shares) + 1), shares.numpy(), marker=".", markersize=3, color=colour, label=label)
    log_axis(ax)
    ax.set_xlabel("singular value")
    ax.legend()
