"""The picture of the Gaussian example in docs/method.md: both causes of collapse, by formula.

    python benchmarks/gaussian_example.py --out docs/assets/gaussian-example.png

The formulas are derived there and tested in `tests/test_gaussian_example.py`.
"""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import command
from onefold.pictures.style import BLUE, ORANGE, RED, STYLE
from onefold.studies.figures import DPI, WIDTH


def main(out: Path = Path("docs/assets/gaussian-example.png")) -> None:
    """Draw it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), dpi=DPI, layout="constrained")
        free, held, shares = (figure.add_subplot(1, 3, k) for k in (1, 2, 3))

        time = np.linspace(0, 1, 400)
        free.set_title("1: the variance term, no norm")
        for start, colour in ((1.0, RED), (0.6, ORANGE)):
            free.plot(time, np.maximum(0, start - math.pi / 2 * time), color=colour)
        free.set_ylabel("standard deviation")

        time = np.linspace(0, 1.6, 400)
        held.set_title("1: the variance term, with a norm")
        half = math.tan((math.pi / 4 - math.atan2(math.sqrt(2 - 1.1**2), 1.1)) / 2)
        angle = math.pi / 4 - np.minimum(math.pi / 4, 2 * np.arctan(half * np.exp(math.pi / 2 * time)))
        held.plot(time, math.sqrt(2) * np.cos(angle), color=RED)
        held.plot(time, math.sqrt(2) * np.sin(angle), color=ORANGE)
        for ax in (free, held):
            ax.set_xlabel("time of gradient descent")
            ax.set_ylim(-0.05, 1.55)

        s = np.linspace(1e-3, 2, 400)
        clean = s**2 / (1 + s**2) * (1 + (2 * np.log(s) + math.pi / 2 * (1 - s**2) / s) / (1 + s**2))
        shares.set_title("2: std of best prediction ÷ target's")
        shares.plot(s, np.sqrt(clean), color=BLUE, label="clean: ẑ, of z")
        shares.plot(s, np.sqrt(1 - math.pi / 2 * s / (1 + s**2)), color=RED, ls="--", label="velocity: v, of z − ε")
        shares.set_xlabel("standard deviation s of a direction")
        shares.set_ylim(0, 1.05)
        shares.legend(loc="lower right")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)


if __name__ == "__main__":
    command.run(main)
