"""The pictures of a study, made from its runs: curves, spectra, samples and reconstructions of all arms.

Each family of arms has a colour and each variant a line style. Lines are means over seeds; bands show one standard
deviation up and down.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from onefold.pictures.style import COLOURS, LINES, STYLE, log_axis
from onefold.studies.study import Arm, Study, Trial
from onefold.training.run import Run

__all__ = ["write"]

WIDTH = 9.0
"""Inches: 900 px at the width of the documentation, stored at twice that."""
DPI = 200

Line = dict[str, Any]


class Panel(NamedTuple):
    """A quantity over training."""

    title: str
    key: str
    """Key in a log line, or in its health."""
    log: bool = False
    losses: tuple[str, ...] = ("clean", "velocity")
    """Arms with another objective.loss are left out: the two kinds of denoising loss are not comparable."""
    over: str = ""
    """Key of the quantity to divide by, if any."""

    def value(self, line: Line) -> float | None:
        found = {**line, **(line.get("health") or {}), **(line.get("onestep") or {}), "": 1.0}
        value, divisor = found.get(self.key), found.get(self.over)
        return None if value is None or not divisor else value / divisor


PANELS = (
    Panel("effective rank of tokens", "effective_rank"),
    Panel("effective rank of whole latents", "effective_rank_whole"),
    Panel("standard deviation of latents", "latent_std"),
    Panel("reconstruction, PSNR (dB)", "psnr"),
    Panel("reconstruction loss", "reconstruction", log=True),
    Panel("variance term of velocity loss", "variance_term", log=True),
    Panel("denoising loss, on velocities", "denoising", log=True, losses=("velocity",)),
    Panel("denoising loss, on clean latents", "denoising", log=True, losses=("clean",)),
    Panel("velocity error, in all arms", "velocity_error", log=True),
    Panel("rank of ẑ ÷ rank of z, tokens", "prediction_rank", over="effective_rank"),
    Panel("rank of v ÷ rank of z − ε, tokens", "velocity_rank", over="velocity_target_rank"),
)
"""The losses are means over the training batches since the previous line; the rest is from `training.health`."""

ONESTEP_PANELS = (
    Panel("Fréchet distance of one-step samples", "frechet", log=True),
    Panel("class accuracy of one-step samples", "class_accuracy"),
    Panel("diversity: latents' std ÷ that of data", "diversity"),
    Panel("loss of the ratio network", "ratio"),
)
"""For arms that start from another; see `training.one_step_monitor`."""


def write(study: Study, trials: Sequence[Trial], out: Path) -> None:
    """Write all pictures of the finished trials; for a study of one-step generators, curves and samples."""
    onestep = any(arm.teacher for arm in study.arms)
    with mpl.rc_context(STYLE):
        if onestep:
            begun = [trial for trial in trials if trial.arm.teacher]
            if begun:
                _curves(study, begun, ONESTEP_PANELS).savefig(out / "curves.png")
            _sheets(study, trials, "samples", "Samples, from the same noise and classes in every arm").savefig(
                out / "samples.png"
            )
            return
        _curves(study, trials, PANELS).savefig(out / "curves.png")
        _spectra(study, trials).savefig(out / "spectrum.png")
        _sheets(study, trials, "samples", "Samples, from the same noise and classes in every arm").savefig(
            out / "samples.png"
        )
        _sheets(study, trials, "reconstructions", "Test images; below each row, its reconstructions").savefig(
            out / "reconstructions.png"
        )


# --- lines ------------------------------------------------------------------------------------------------------------


def _curves(study: Study, trials: Sequence[Trial], panels: Sequence[Panel]) -> Figure:
    """Quantities over images seen, one panel each."""
    history = {trial.folder: Run(trial.folder, trial.config).history for trial in trials}
    series = {panel: [(arm, _seen(panel, own, history)) for arm, own in _by_arm(study, trials)] for panel in panels}
    known = [panel for panel in panels if any(len(images) for _, (images, _) in series[panel])]
    figure, axes = _figure(len(known))
    for ax, panel in zip(axes, known, strict=True):
        ax.set_title(panel.title)
        for arm, (images, values) in series[panel]:
            if len(images):
                _draw(ax, images / 1000, values, **_style(study, arm))
        if panel.log:
            log_axis(ax)
        ax.set_xlabel("thousand images seen")
    _legend(figure, axes)
    return figure


def _seen(
    panel: Panel, trials: Sequence[Trial], history: Mapping[Path, Sequence[Line]]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "seeds n"]]:
    """The images that all trials of an arm have values at, and these values; none for another kind of loss."""
    lines = [history[trial.folder] if trial.config.objective.loss in panel.losses else [] for trial in trials]
    return _common_points(
        [{line["images"]: value for line in one if (value := panel.value(line)) is not None} for one in lines]
    )


def _spectra(study: Study, trials: Sequence[Trial]) -> Figure:
    """Singular values of the latents of test images, descending."""
    figure, axes = _figure(2)
    for ax, kind, title in zip(axes, ("token", "whole"), ("tokens", "whole latents"), strict=True):
        ax.set_title(f"std along principal directions of {title}")
        largest = 0.0
        for arm, own in _by_arm(study, trials):
            spectra = [json.loads(trial.spectrum_path.read_text(encoding="utf-8"))[kind] for trial in own]
            rank, values = _common_points([dict(enumerate(spectrum, 1)) for spectrum in spectra])
            _draw(ax, rank, values, marker="." if len(rank) < 40 else "", **_style(study, arm))
            largest = max(largest, float(values.max(initial=0)))
        ax.set_yscale("log")
        ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-4 * largest) if largest else None)
        log_axis(ax)
        ax.set_xlabel("direction")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    return figure


def _by_arm(study: Study, trials: Sequence[Trial]) -> list[tuple[Arm, list[Trial]]]:
    """The arms that have finished trials, with those trials."""
    found = [(arm, [trial for trial in trials if trial.arm == arm]) for arm in study.arms]
    return [(arm, own) for arm, own in found if own]


def _common_points(
    series: Sequence[Mapping[float, float]],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "seeds n"]]:
    """Points that all seeds have, and their values."""
    common = sorted(set.intersection(*(set(one) for one in series)))
    return np.array(common, float), np.array([[one[at] for at in common] for one in series], float)


def _draw(ax: Axes, at: Float[np.ndarray, " n"], values: Float[np.ndarray, "seeds n"], **style: Any) -> None:
    mean = values.mean(0)
    ax.plot(at, mean, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        low = np.maximum(mean - spread, values.min(0))  # no band below all seeds, which a log scale would stretch
        ax.fill_between(at, low, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def _style(study: Study, arm: Arm) -> dict[str, Any]:
    families = list(dict.fromkeys(one.family or one.name for one in study.arms))
    variants = ["", *dict(Counter(one.variant for one in study.arms if one.variant).most_common())]
    colour = COLOURS[families.index(arm.family or arm.name) % len(COLOURS)]
    return {"label": _title(arm), "color": colour, "linestyle": LINES[variants.index(arm.variant) % len(LINES)]}


def _title(arm: Arm) -> str:
    return arm.title.replace("z_t", "$z_t$")


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 0.5 + (2.3 if columns == 3 else 3.4) * rows), dpi=DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, handlelength=3)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sheets(study: Study, trials: Sequence[Trial], kind: str, title: str) -> Figure:
    """The last picture of each arm's first seed, side by side."""
    arms = _by_arm(study, trials)
    sheets = [_sheet(own[0].folder / "samples", kind) for _, own in arms]
    columns = min(3, len(sheets))
    rows = math.ceil(len(sheets) / columns)
    height, width = sheets[0].shape[:2]
    panel = WIDTH / columns
    figure = Figure(figsize=(WIDTH, 0.3 + rows * (panel * height / width + 0.25)), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.005, ha="left", fontsize=10)
    for k, ((arm, own), sheet) in enumerate(zip(arms, sheets, strict=True)):
        ax = figure.add_subplot(rows, columns, k + 1)
        ax.imshow(sheet, cmap="gray", vmin=0, vmax=255)
        ax.set_title(_title(arm) + (f", seed {own[0].seed}" if own[0].seed else ""))
        ax.axis("off")
    return figure


def _sheet(folder: Path, kind: str) -> np.ndarray:
    found = sorted(folder.glob("[0-9]*.png"))
    wanted = [path for path in found if path.stem.endswith("-reconstructions") == (kind == "reconstructions")]
    with Image.open(wanted[-1]) as image:
        return np.asarray(image)
