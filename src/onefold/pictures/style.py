"""The common style of all curves: colours, lines and axes.

The colours are those of Okabe & Ito, which colour-blind readers can tell apart. In an SVG for a page, text and axes
have the colour of the page's text, so that curves are readable on light and on dark.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BLUE", "COLOURS", "GREEN", "LINES", "ORANGE", "PURPLE", "RED", "STYLE", "inline_svg", "log_axis"]

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
INK = "#010203"
"""Stands for the colour of the page's text until the SVG is written."""


def inline_svg(draw: "Callable[[Axes], None]", name: str) -> str:
    """What `draw` draws on an axis, as an SVG element for a page, as wide as its place; `name` tells it from others."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    page: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "legend.facecolor": "none",
        **dict.fromkeys(inked, INK),
    }
    with mpl.rc_context({**STYLE, **page}):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", text)  # those of groups, which each figure counts anew
    text = re.sub(r'^<svg([^>]*?) (?:height|width)="[^"]*pt"', r"<svg\1", text, flags=re.DOTALL)
    text = re.sub(r'^<svg([^>]*?) (?:height|width)="[^"]*pt"', r"<svg\1", text, flags=re.DOTALL)
    return text.replace(INK, "currentColor").strip()


def log_axis(ax: "Axes") -> None:
    """A logarithmic y-axis with plain numbers: at 1, 2, 5, 10, …; for a range above 300, at powers of ten, and for one
    below 10, which may hold a single one of those, at equal steps.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    logarithmic = LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]) if high < 10 * low else logarithmic)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
