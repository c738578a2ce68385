"""The curves of a run: losses, reconstruction and health over images seen, drawn from its log in one picture.

A panel is drawn if the log has its values. Its lines differ in colour and dash pattern. Red marks the thresholds of the
collapse alarm and the image at which it was first raised. Above the first row stands the time that training steps took
up to there, without pictures, checkpoints and compilation: it is not even where the speed changes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onefold.alarm import LEAST_RANK, LEAST_STD
from onefold.pictures.style import BLUE, GREEN, LINES, ORANGE, PURPLE, RED, STYLE, inline_svg, log_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PANELS", "drawings", "write"]

COLUMNS = 3
UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
Line = Mapping[str, Any]
Value = Callable[[Line], float | None]


class Curve(NamedTuple):
    """A quantity of a log line, and how it is drawn."""

    label: str
    value: Value
    colour: str


class Panel(NamedTuple):
    """Quantities to be compared with each other."""

    title: str
    curves: tuple[Curve, ...]
    log: bool = False
    band: tuple[Value, Value] | None = None
    """Lower and upper edge of a shaded band."""
    threshold: Value | None = None
    """The alarm is raised below it."""


def _line(name: str) -> Value:
    return lambda line: line.get(name)


def _health(name: str) -> Value:
    return lambda line: _measured(line).get(name)


def _onestep(name: str, level: int | None = None) -> Value:
    """A measurement of a one-step run, at one of its noise levels if it has them."""

    def value(line: Line) -> float | None:
        found = (line.get("onestep") or {}).get(name)
        return found if level is None or found is None else found[level]

    return value


def _channel(pick: Callable[[Sequence[float]], float]) -> Value:
    def value(line: Line) -> float | None:
        std = _measured(line).get("channel_std")
        return pick(std) if std and None not in std else None

    return value


def _measured(line: Line) -> Mapping[str, Any]:
    return line.get("health") or {}


def _least_std(line: Line) -> float | None:
    return LEAST_STD if _measured(line) else None


def _least_rank(line: Line) -> float | None:
    rank = _measured(line).get("image_rank_whole")
    return None if rank is None else LEAST_RANK * rank


PANELS = (
    Panel(
        "losses on training batches",
        (
            Curve("reconstruction", _line("reconstruction"), BLUE),
            Curve("denoising", _line("denoising"), ORANGE),
            Curve("perceptual", _line("perceptual"), GREEN),
        ),
        log=True,
    ),
    Panel("reconstruction of test images, PSNR in dB", (Curve("", _health("psnr"), BLUE),)),
    Panel(
        "latents: std over images (band: all channels)",
        (Curve("mean of channels", _health("latent_std"), BLUE),),
        log=True,
        band=(_channel(min), _channel(max)),
        threshold=_least_std,
    ),
    Panel(
        "effective rank of whole latents",
        (
            Curve("z", _health("effective_rank_whole"), BLUE),
            Curve("its prediction ẑ", _health("prediction_rank_whole"), ORANGE),
        ),
        threshold=_least_rank,
    ),
    Panel(
        "effective rank of tokens",
        (
            Curve("z", _health("effective_rank"), BLUE),
            Curve("its prediction ẑ", _health("prediction_rank"), ORANGE),
            Curve("velocity z − ε", _health("velocity_target_rank"), GREEN),
            Curve("its prediction v", _health("velocity_rank"), PURPLE),
        ),
    ),
    Panel(
        "velocity loss on test images",
        (
            Curve("the loss", _health("velocity_error"), BLUE),
            Curve("its variance term", _health("variance_term"), ORANGE),
        ),
        log=True,
    ),
    Panel(
        "gradients at the trunk: norm",
        (
            Curve("reconstruction", _health("gradient_reconstruction"), BLUE),
            Curve("denoising", _health("gradient_denoising"), ORANGE),
            Curve("perceptual", _health("gradient_perceptual"), GREEN),
            Curve("variance term", _health("gradient_variance"), PURPLE),
        ),
        log=True,
    ),
    Panel("gradients at the trunk: cosine between losses", (Curve("", _health("gradient_cosine"), BLUE),)),
    Panel("drift of the latents' mean, in units of their std", (Curve("", _health("drift"), BLUE),), log=True),
    Panel("Fréchet distance of some one-step samples", (Curve("", _onestep("frechet"), BLUE),), log=True),
    Panel("class accuracy of one-step samples", (Curve("", _onestep("class_accuracy"), BLUE),)),
    Panel(
        "losses of the critic on training batches",
        (Curve("ratio", _line("ratio"), BLUE), Curve("student", _line("student"), ORANGE)),
    ),
    Panel("generator: squared difference of its two scores", (Curve("", _line("difference"), BLUE),), log=True),
    Panel(
        "AUC of the ratio, data versus samples",
        tuple(
            Curve(f"t = {t}", _onestep("auc", k), colour)
            for k, t, colour in ((0, 0.1, PURPLE), (2, 0.5, ORANGE), (3, 0.7, GREEN), (4, 0.9, BLUE))
        ),
    ),
    Panel(
        "samples relative to data",
        (
            Curve("diversity", _onestep("diversity"), BLUE),
            Curve("contrast", _onestep("contrast"), ORANGE),
            Curve("saturation", _onestep("saturation"), GREEN),
        ),
    ),
    Panel(
        "drift of the other roles",
        (
            Curve("decoding", _line("decoding"), BLUE),
            Curve("encoding", _line("encoding"), ORANGE),
            Curve("denoiser", _line("denoiser"), GREEN),
        ),
        log=True,
    ),
)


def write(history: Sequence[Line], path: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Draw the log lines of a run into a PNG file; writes nothing before the second measurement of health, or if
    no panel has values.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if sum(bool(_measured(line) or line.get("onestep")) for line in history) < 2:
        return
    panels = _panels(history, panels)
    if not panels:
        return
    columns = min(COLUMNS, len(panels))
    rows, width = -(-len(panels) // columns), 4.0 * columns
    clock = Clock.of(history)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.3 * rows), dpi=110)
        top = 0.12 if clock is None else 0.27
        figure.subplots_adjust(0.54 / width, 0.2 / rows, 1 - 0.12 / width, 1 - top / rows, wspace=0.16, hspace=0.3)
        for k, panel in enumerate(panels):
            ax = figure.add_subplot(rows, columns, k + 1)
            _draw(ax, panel, history)
            if k < columns and clock is not None:
                clock.draw(ax)
            if k + columns >= len(panels):
                ax.set_xlabel("thousand images seen")
        figure.savefig(path)


def drawings(history: Sequence[Line]) -> dict[str, str]:
    """The panels that a log has values for, as SVG elements by title; none before its second line."""
    if len(history) < 2:
        return {}
    panels = _panels(history, PANELS)
    return {panel.title: inline_svg(partial(_draw_alone, panel, history), panel.title) for panel in panels}


class Clock(NamedTuple):
    """When a run had seen how many images, by the speeds in its log."""

    images: NDArray[Any]
    """Thousands, from 0; (n,), strictly increasing, as the times are."""
    times: NDArray[Any]
    unit: str

    @classmethod
    def of(cls, history: Sequence[Line]) -> Self | None:
        """None if a line has no speed."""
        speeds = [line.get("images_per_second") for line in history]
        if not history or not all(speeds):
            return None
        images = np.array([0, *(line["images"] for line in history)], dtype=float)
        seconds = np.concatenate([[0.0], np.cumsum(np.diff(images) / np.array(speeds, dtype=float))])
        unit, length = next(pair for pair in UNITS if seconds[-1] >= 2 * pair[1] or pair[1] == 1)
        return cls(images / 1000, seconds / length, unit)

    def time(self, images: ArrayLike) -> NDArray[Any]:
        """The times of so many thousand images; beyond the log the speed is that at its end."""
        return _along(images, self.images, self.times)

    def seen(self, times: ArrayLike) -> NDArray[Any]:
        """The inverse of `time`."""
        return _along(times, self.times, self.images)

    def draw(self, ax: "Axes") -> None:
        """An axis of the times above a panel."""
        from matplotlib.ticker import MaxNLocator

        above = ax.secondary_xaxis("top", functions=(self.time, self.seen))
        above.xaxis.set_major_locator(MaxNLocator(4))
        above.set_xlabel(self.unit, loc="right", labelpad=2)


def _along(x: ArrayLike, xs: NDArray[Any], ys: NDArray[Any]) -> NDArray[Any]:
    """The broken line through the points (xs, ys), its ends prolonged."""
    at = np.asarray(x)
    k = np.clip(np.searchsorted(xs, at) - 1, 0, len(xs) - 2)
    return ys[k] + (at - xs[k]) * (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])


def _panels(history: Sequence[Line], panels: Sequence[Panel]) -> list[Panel]:
    return [p for p in panels if any(curve.value(line) is not None for curve in p.curves for line in history)]


def _draw_alone(panel: Panel, history: Sequence[Line], ax: "Axes") -> None:
    """A panel without its title."""
    _draw(ax, panel, history)
    ax.set_title("")
    ax.set_xlabel("thousand images seen")


def _draw(ax: "Axes", panel: Panel, history: Sequence[Line]) -> None:
    """One panel: band, threshold, curves, the first alarm."""
    ax.set_title(panel.title)
    if panel.band is not None:
        images, low, high = _points(history, *panel.band)
        ax.fill_between(images, low, high, color=panel.curves[0].colour, alpha=0.15, linewidth=0)
    for curve, line in zip([c for c in panel.curves if _points(history, c.value)[0]], LINES, strict=False):
        ax.plot(*_points(history, curve.value), linestyle=line, color=curve.colour, label=curve.label)
    if panel.threshold is not None:
        ax.plot(*_points(history, panel.threshold), color=RED, linewidth=0.9, label="alarm below")
    alarms = [line["images"] / 1000 for line in history if "alarm" in line]
    if alarms:
        ax.axvline(alarms[0], color=RED, linewidth=0.9, linestyle=(0, (1, 2)), label="first alarm")
    if panel.log:
        log_axis(ax)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend()


def _points(history: Sequence[Line], *values: Value) -> list[list[float]]:
    """Thousands of images, and each value, for the lines that have them all."""
    found = [[line["images"] / 1000, *(value(line) for value in values)] for line in history]
    rows = [[number for number in row if number is not None] for row in found]
    full = [row for row in rows if len(row) == 1 + len(values)]
    return [[row[k] for row in full] for k in range(1 + len(values))]
