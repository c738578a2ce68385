"""The curves of a run: losses, reconstruction and health over the images seen, from its log, in one picture.

A panel is drawn if the log has its numbers. Colours are those of Okabe & Ito, which the colour-blind can tell apart,
and lines of one panel differ in their dashes too. An alarm is a vertical line through all panels.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write"]

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
DASHES = ("-", "--", "-.", ":")
COLUMNS = 3
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Line = Mapping[str, Any]
Value = Callable[[Line], float | None]


class Curve(NamedTuple):
    """A quantity of a log line, and how it is drawn."""

    label: str
    value: Value
    colour: str


class Panel(NamedTuple):
    """Quantities that are read against each other."""

    title: str
    curves: tuple[Curve, ...]
    log: bool = False


def _line(name: str) -> Value:
    return lambda line: line.get(name)


def _health(name: str) -> Value:
    return lambda line: _measured(line).get(name)


def _channel(pick: Callable[[Sequence[float]], float]) -> Value:
    def value(line: Line) -> float | None:
        std = _measured(line).get("channel_std")
        return pick(std) if std and None not in std else None

    return value


def _measured(line: Line) -> Mapping[str, Any]:
    return line.get("health") or {}


PANELS = (
    Panel(
        "losses, training batches",
        (
            Curve("reconstruction", _line("reconstruction"), BLUE),
            Curve("denoising", _line("denoising"), ORANGE),
            Curve("perceptual", _line("perceptual"), GREEN),
        ),
        log=True,
    ),
    Panel("reconstruction of test images, PSNR in dB", (Curve("", _health("psnr"), BLUE),)),
    Panel(
        "latents: standard deviation over images",
        (
            Curve("widest channel", _channel(max), GREY),
            Curve("mean of channels", _health("latent_std"), BLUE),
            Curve("narrowest channel", _channel(min), GREY),
        ),
        log=True,
    ),
    Panel(
        "effective rank of whole latents",
        (
            Curve("z", _health("effective_rank_whole"), BLUE),
            Curve("its prediction ẑ", _health("prediction_rank_whole"), ORANGE),
        ),
    ),
    Panel(
        "effective rank of tokens",
        (
            Curve("z", _health("effective_rank"), BLUE),
            Curve("its prediction ẑ", _health("prediction_rank"), ORANGE),
            Curve("velocity z − ε", _health("velocity_target_rank"), GREEN),
            Curve("its prediction v", _health("velocity_rank"), RED),
        ),
    ),
    Panel(
        "velocity loss of test images",
        (
            Curve("the loss", _health("velocity_error"), BLUE),
            Curve("its variance term", _health("variance_term"), ORANGE),
        ),
        log=True,
    ),
    Panel(
        "gradients at the trunk, norm",
        (
            Curve("reconstruction", _health("gradient_reconstruction"), BLUE),
            Curve("denoising", _health("gradient_denoising"), ORANGE),
            Curve("perceptual", _health("gradient_perceptual"), GREEN),
            Curve("variance term", _health("gradient_variance"), RED),
        ),
        log=True,
    ),
    Panel("cosine of reconstruction's and denoising's gradient", (Curve("", _health("gradient_cosine"), BLUE),)),
    Panel("drift of the latent means, in standard deviations", (Curve("", _health("drift"), BLUE),), log=True),
)


def write(history: Sequence[Line], path: Path) -> None:
    """Draw the log lines of a run into a PNG file; none if there is nothing to draw."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [
        panel for panel in PANELS if any(curve.value(line) is not None for curve in panel.curves for line in history)
    ]
    if not panels:
        return
    rows = -(-len(panels) // COLUMNS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * COLUMNS, 2.5 * rows), dpi=110, layout="constrained")
        for k, panel in enumerate(panels):
            _draw(figure.add_subplot(rows, COLUMNS, k + 1), panel, history)
        figure.savefig(path)


def _draw(ax: "Axes", panel: Panel, history: Sequence[Line]) -> None:
    ax.set_title(panel.title)
    drawn = 0
    for curve in panel.curves:
        points = [(line["images"] / 1000, value) for line in history if (value := curve.value(line)) is not None]
        if points:
            images, values = zip(*points, strict=True)
            marker = "." if len(points) < 3 else ""
            ax.plot(images, values, DASHES[drawn], color=curve.colour, label=curve.label, marker=marker)
            drawn += 1
    for line in history:
        if "alarm" in line:
            ax.axvline(line["images"] / 1000, color=RED, linewidth=0.8, label="alarm")
            break
    if panel.log:
        ax.set_yscale("log")
    ax.set_xlabel("thousand images seen")
    if drawn > 1:
        ax.legend()
