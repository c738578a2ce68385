"""Draw the picture of docs/method.md: what each role of the network in the package makes of digits and of noise.

python benchmarks/method_picture.py docs/assets/method.png
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import onefold
from onefold.data import open_dataset
from onefold.pictures.style import STYLE

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
CLASSES = (0, 3, 5, 8)


@torch.no_grad()
def rows(network: onefold.OneFold) -> dict[str, list[np.ndarray]]:
    """Of each row its pictures: a block of the four digits for each time."""
    data = open_dataset("digits:test")
    chosen = [next(k for k in range(len(data)) if data[k][1] == label) for label in CLASSES]
    x = onefold.to_tensor(np.stack([data[k][0] for k in chosen]))
    y, z = torch.tensor(CLASSES), network.encode(x)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    found: dict[str, list[np.ndarray]] = {"latents z_t": [], "decoded": [], "denoised, then decoded": []}
    for time in TIMES:
        z_t, t = time * z + (1 - time) * eps, torch.full((len(y),), time)
        z_hat = network.denoise(z_t, t, y) if time < 1 else z
        found["latents z_t"].append(z_t.unflatten(1, (4, 4)).movedim(-1, 1)[:, 0].numpy())
        for name, latents in (("decoded", z_t), ("denoised, then decoded", z_hat)):
            found[name].append(network.decode(latents)[:, 0].numpy())
    made = network.sample(4 * len(TIMES), labels=list(CLASSES) * len(TIMES), seed=0)[..., 0]
    found["noise, one jump, decoded"] = list(made.reshape(len(TIMES), len(CLASSES), 8, 8) / 127.5 - 1)
    return found


def main(path: Path) -> None:
    """Write the picture."""
    found = rows(onefold.OneFold.from_pretrained("digits"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.0), dpi=110)
        axes = figure.subplots(len(found), len(TIMES), squeeze=False)
        figure.subplots_adjust(0.2, 0.01, 0.995, 0.9, wspace=0.06, hspace=0.1)
        for row, (name, blocks) in enumerate(found.items()):
            for column, block in enumerate(blocks):
                ax = axes[row, column]
                low, high = (-2, 2) if block.shape[-1] == 4 else (-1, 1)
                parts = [np.pad(part, 1, constant_values=high) for part in block]
                ax.imshow(np.concatenate(parts, axis=1), cmap="gray", vmin=low, vmax=high)
                ax.set_axis_off()
                if row == 0:
                    ax.set_title(f"t = {TIMES[column]:g}")
            box = axes[row, 0].get_position()
            figure.text(0.19, (box.y0 + box.y1) / 2, name, ha="right", va="center")
        figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
