"""The common style of all curves: colours, lines and axes.

The colours are those of Okabe & Ito, which colour-blind readers can tell apart.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "COLOURS", "GREEN", "LINES", "ORANGE", "PURPLE", "RED", "STYLE", "log_axis"]

RED, ORANGE, SKY, BLUE, GREEN, PURPLE = "#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7"
COLOURS = (RED, ORANGE, SKY, BLUE, GREEN, PURPLE, "#000000", "#999999")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.5,
    "legend.framealpha": 0.75,
    "legend.edgecolor": "none",
    "legend.fontsize": 8,
    "legend.handlelength": 2.5,
}
"""For `matplotlib.rc_context`; each picture has its own size, resolution and layout."""


def log_axis(ax: "Axes") -> None:
    """A logarithmic y-axis with plain numbers: at 1, 2, 5, 10, … or, for a range above 300, at powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
