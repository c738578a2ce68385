"""The bias study: the generator's gradient from two learned scores versus from one learned ratio.

Data p and the distribution q_θ of a fixed generator x = m_k + A_k ε are mixtures of Gaussians, θ = {m_k, A_k}, so the
gradient of the reverse Kullback–Leibler divergence at all noise levels is known exactly:

    g(θ) = E_t w(t) E_q[(s_q − s_p)(x_t, t) · t ∂x/∂θ],     s_q − s_p = t (f_q − f_p) / (1−t)² = −∇ℓ.

Small networks estimate it from n samples of each distribution: two denoisers f_p (the teacher's) and f_q (the
student's), or one ratio ℓ. The ratio has as many parameters as the two denoisers together, as many updates, and half as
many samples of each distribution per update, so that both cost the same. Every seed has its own data and its own
training. Then

    bias      ‖mean over seeds of ĝ − g‖ / ‖g‖; over S seeds, unbiased estimates would leave √(variance / S) by chance
    variance  sum over θ of the variance over seeds of ĝ (divisor S − 1) / ‖g‖²
    cosine    of the mean over seeds of ĝ with g: a gradient that is merely too short is biased but has the right
              direction

with w(t) = 1 and w(t) = (1−t)²/t, the two weightings of `objectives.density_ratio`, and for bands of noise levels.

A third arm is the ratio with the library's default penalty, which needs twice as many evaluations. The
denoisers' loss is weighted (`studies.ensemble`): scores need more accuracy near t = 1 than an unweighted loss gives.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from onefold import __version__
from onefold.errors import UserError, writing
from onefold.files import write_whole
from onefold.objectives.density_ratio import DensityRatio, NoiseDraws, Ratio, ratio_gradient, ratio_loss
from onefold.objectives.score_distillation import Denoiser, distillation
from onefold.pictures.style import BLUE, GREEN, ORANGE, STYLE, log_axis
from onefold.studies.ensemble import RATE, Ensemble, select, train
from onefold.studies.mixture import Mixture

__all__ = [
    "SAMPLES",
    "WIDTHS",
    "Ensemble",
    "EvaluationPoints",
    "distributions",
    "errors",
    "ratio_pull",
    "run_bias",
    "score_pull",
]

WIDTHS = (4, 8, 16, 32, 64)
"""Widths of the denoisers' two hidden layers, tried with the most samples."""
SAMPLES = (100, 300, 1_000, 3_000, 10_000)
"""Samples of each distribution, tried with denoisers of `WIDTH`."""
WIDTH = 32
BATCH = 256
"""Samples of its distribution that a denoiser sees per update; the ratio sees half as many of each."""
LATEST = 0.98
POINTS = 8192
"""Samples of the generator at which estimated and exact gradients are compared, the same for all."""
BANDS = 7

PLAIN = DensityRatio("reverse_kl", t_max=LATEST, penalty=0)
ARMS = {"scores": "two scores", "ratio": "ratio", "penalised": "ratio, default penalty"}
COLOURS = {"scores": ORANGE, "ratio": BLUE, "penalised": GREEN}
LINES = {"bias": "-", "spread": "--"}
WEIGHTINGS = {"uniform": "w(t) = 1", "noise": "w(t) = (1−t)²/t"}

Say = Callable[[str], None]


def distributions() -> tuple[Mixture, Mixture]:
    """Data and generator: three modes on a circle; the generator's are 0.3 off, each in its own way, and 30 % wider."""
    angle, off = torch.arange(3) * 2 * math.pi / 3, torch.tensor([0.9, 2.0, 4.0])
    means = torch.stack([angle.cos(), angle.sin()], 1)
    moved = means + 0.3 * torch.stack([off.cos(), off.sin()], 1)
    return Mixture.round(means, torch.full((3,), 0.4)), Mixture.round(moved, torch.full((3,), 0.52))


# --- exact gradient and errors ----------------------------------------------------------------------------------------


class EvaluationPoints(NamedTuple):
    """Where the gradient is evaluated, and its exact value there."""

    x: Float[Tensor, "M d"]
    draws: NoiseDraws
    per_parameter: Float[Tensor, "M f"]
    """∂x/∂θ, divided by M, without the dimension of x, which m_k and A_k ε share."""
    exact: Float[Tensor, "M d"]
    """(s_q − s_p)(x_t, t) · t."""

    @classmethod
    def draw(cls, p: Mixture, q: Mixture, points: int, seed: int = 0) -> "EvaluationPoints":
        rng = torch.Generator().manual_seed(seed)
        x, k, eps = q.draw(points, rng)
        t = LATEST * (torch.arange(points) + torch.rand(points, generator=rng)) / points
        noise = torch.randn(x.shape, generator=rng)
        at = t[:, None]
        x_t = at * x + (1 - at) * noise
        own = F.one_hot(k, len(q.weights)).float()
        per_parameter = torch.einsum("mk,mi->mki", own, torch.cat([torch.ones_like(at), eps], 1)).flatten(1) / points
        exact = at * (q.score(x_t, t) - p.score(x_t, t))
        return cls(x, NoiseDraws(t, noise, torch.zeros_like(x)), per_parameter, exact)

    def repeat(self, times: int) -> tuple[Float[Tensor, "N d"], NoiseDraws]:
        """Samples and draws for an ensemble of networks."""
        return self.x.repeat_interleave(times, 0), NoiseDraws(*(a.repeat_interleave(times, 0) for a in self.draws))

    def weights(self) -> dict[str, Float[Tensor, " M"]]:
        """Weights of the points: the two weightings, and each band of noise levels alone."""
        t = self.draws.t
        bands = {f"band{k}": (t / LATEST * BANDS).long() == k for k in range(BANDS)}
        noise = (1 - t).square() / t.clamp(min=1e-2)
        return {"uniform": torch.ones_like(t), "noise": noise, **{name: band.float() for name, band in bands.items()}}

    def gradient(self, pull: Float[Tensor, "M S d"], weight: Float[Tensor, " M"]) -> Float[Tensor, "S theta"]:
        """g(θ) from S estimates with w(t) = 1 at the points."""
        return torch.einsum("m,msd,mf->sdf", weight, pull, self.per_parameter).flatten(1)


def score_pull(teacher: Denoiser, student: Denoiser, at: EvaluationPoints, seeds: int = 1) -> Float[Tensor, "M S d"]:
    """(s_q − s_p) · t from the denoisers of S seeds."""
    x, draws = at.repeat(seeds)
    _, difference = distillation(teacher, student, x.requires_grad_(), None, draws, normalised=False)
    assert difference is not None
    return ((draws.t / (1 - draws.t)).square()[:, None] * difference).unflatten(0, (-1, seeds))


def ratio_pull(ratio: Ratio, at: EvaluationPoints, seeds: int = 1) -> Float[Tensor, "M S d"]:
    """−∇ℓ · t from the ratios of S seeds."""
    x, draws = at.repeat(seeds)
    return ratio_gradient(ratio, x, None, draws, PLAIN).unflatten(0, (-1, seeds))


def errors(pull: Float[Tensor, "M S d"], at: EvaluationPoints) -> dict[str, float]:
    """Bias, variance and cosine, by weighting and band."""
    found: dict[str, float] = {}
    for name, weight in at.weights().items():
        exact = at.gradient(at.exact[:, None], weight).squeeze(0)
        estimates = at.gradient(pull, weight)
        mean = estimates.mean(0)
        found[f"{name}.bias"] = ((mean - exact).norm() / exact.norm()).item()
        found[f"{name}.variance"] = (estimates.var(0).sum() / exact.square().sum()).item()
        found[f"{name}.cosine"] = F.cosine_similarity(mean, exact, dim=0).item()
    return found


# --- the study --------------------------------------------------------------------------------------------------------


def run_bias(
    out: Path,
    *,
    seeds: int = 8,
    steps: int = 1500,
    widths: Sequence[int] = WIDTHS,
    samples: Sequence[int] = SAMPLES,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure bias and variance of both gradients; writes `bias.json`, `bias.csv`, `bias.md` and `bias.png`.

    Args:
        out: The study's folder; existing files of these names are replaced.
        seeds: Independent trainings, with seeds 0, 1, …
        steps: Updates of each network.
        widths: Widths of the denoisers' two hidden layers, tried with the most of `samples`.
        samples: Numbers of samples of each distribution, tried with width 32.
        say: Called with one line after each setting.

    Returns:
        The contents of `bias.json`.

    Raises:
        UserError: an invalid number, or a folder that cannot be written.
    """
    if seeds < 2:
        raise UserError(f"--seeds: {seeds} leaves no variance to measure; give at least 2")
    for option, values in (("steps", [steps]), ("widths", widths), ("samples", samples)):
        if not values:
            raise UserError(f"--{option}: none given; leave the option out for the default")
        if min(values) < 1:
            raise UserError(f"--{option}: {min(values)} is not positive; give at least 1")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    p, q = distributions()
    at = EvaluationPoints.draw(p, q, POINTS)
    settings = list(dict.fromkeys([*((w, max(samples)) for w in widths), *((WIDTH, n) for n in samples)]))
    rows: list[dict[str, Any]] = []
    for k, (width, n) in enumerate(settings, 1):
        rows += (found := _measure_arms(p, q, at, width, n, steps, seeds))
        words = (f"{row['arm']} {row['uniform.bias']:.2f} ± {row['uniform.variance'] ** 0.5:.2f}" for row in found)
        say(f"{k}/{len(settings)}: width {width}, {n:,} samples: bias ± spread: {', '.join(words)}")
    result = {"study": "bias", "onefold": __version__, "protocol": _protocol(p, q, seeds, steps), "rows": rows}
    with writing(out):
        write_whole(out / "bias.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_whole(out / "bias.csv", _as_csv(rows))
        write_whole(out / "bias.md", _as_markdown(result))
        with mpl.rc_context(STYLE):
            _figure(rows).savefig(out / "bias.png")
    return result


def _measure_arms(
    p: Mixture, q: Mixture, at: EvaluationPoints, width: int, n: int, steps: int, seeds: int
) -> list[dict[str, Any]]:
    """All arms for one setting."""
    d = at.x.shape[1]
    budget = 2 * Ensemble.parameter_count(d, width, d)
    ratio_width = min(range(1, 2 * width + 2), key=lambda w: abs(Ensemble.parameter_count(d, w, 1) - budget))
    rngs_p, rngs_q, rngs_teacher, rngs_student, rngs_ratio, rngs_penalised = (
        [torch.Generator().manual_seed(1000 * role + seed) for seed in range(seeds)] for role in range(6)
    )
    real, fake = (
        torch.stack([mixture.draw(n, rng)[0] for rng in rngs]) for mixture, rngs in ((p, rngs_p), (q, rngs_q))
    )
    both, rngs_both = torch.cat([real, fake]), rngs_teacher + rngs_student

    denoisers = Ensemble.random(d, width, d, rngs_both)

    def denoising_loss(indices: Tensor, draws: NoiseDraws) -> Tensor:
        return denoisers.denoising_loss(select(both, indices[0]), draws)

    train(denoisers, denoising_loss, n, BATCH, steps, LATEST, rngs_both)
    teacher, student = denoisers.members(slice(seeds)), denoisers.members(slice(seeds, None))
    pulls = {"scores": score_pull(teacher.denoise, student.denoise, at, seeds)}

    def ratio_losses(ratio: Ensemble, options: DensityRatio, indices: Tensor, draws: NoiseDraws) -> Tensor:
        return ratio_loss(ratio.logit, select(real, indices[0]), select(fake, indices[1]), None, draws, options)[0]

    for arm, options, rngs in (("ratio", PLAIN, rngs_ratio), ("penalised", DensityRatio(), rngs_penalised)):
        ratio = Ensemble.random(d, ratio_width, 1, rngs)
        train(ratio, partial(ratio_losses, ratio, options), n, BATCH // 2, steps, LATEST, rngs)
        pulls[arm] = ratio_pull(ratio.logit, at, seeds)
    parameters = {arm: Ensemble.parameter_count(d, ratio_width, 1) for arm in pulls} | {"scores": budget}
    return [
        {"arm": arm, "width": width, "samples": n, "parameters": parameters[arm], **errors(pull, at)}
        for arm, pull in pulls.items()
    ]


def _protocol(p: Mixture, q: Mixture, seeds: int, steps: int) -> dict[str, Any]:
    def describe(mixture: Mixture) -> dict[str, Any]:
        std = mixture.variances[:, 0].sqrt()  # the same in all directions
        parts = {"means": mixture.means, "std": std}
        return {name: part.double().round(decimals=4).tolist() for name, part in parts.items()}

    default = DensityRatio()
    return {
        "data": describe(p),
        "generator": describe(q),
        "divergence": "reverse_kl",
        "levels": f"t uniform in [0, {LATEST}]",
        "weightings": WEIGHTINGS,
        "seeds": seeds,
        "steps": steps,
        "batch": {"each denoiser": BATCH, "ratio, of each distribution": BATCH // 2},
        "optimizer": f"Adam, {RATE} to 0 along a cosine",
        "networks": "two hidden SiLU layers; inputs x_t, t, log(1−t)/2",
        "denoisers": "preconditioned, loss weighted, for unit variance (Karras et al., 2022)",
        "penalised": {"penalty": default.penalty, "penalty_step": default.penalty_step},
        "evaluation points": POINTS,
        "bias": "norm of the mean error over seeds, over the norm of the exact gradient",
        "variance": "sum over parameters of the variance over seeds (divisor n − 1), over the squared norm",
        "cosine": "of the mean over seeds with the exact gradient",
    }


# --- files ------------------------------------------------------------------------------------------------------------


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_markdown(result: Mapping[str, Any]) -> str:
    protocol = result["protocol"]
    seeds = protocol["seeds"]
    lines = [
        "# Study: bias",
        "",
        f"Bias ± spread (√variance) of the generator's gradient over {seeds} seeds, in units of the exact gradient's "
        f"norm; {protocol['steps']} updates. Unbiased estimates would show a bias of spread/√{seeds} by chance. In "
        "brackets: cosine of the mean with the exact gradient.",
        "",
        f"| denoisers' width | samples | arm | parameters | {' | '.join(WEIGHTINGS.values())} |",
        "|---:|---:|---|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [
            f"{row[f'{name}.bias']:.3f} ± {row[f'{name}.variance'] ** 0.5:.3f} ({row[f'{name}.cosine']:.3f})"
            for name in WEIGHTINGS
        ]
        own = f"{row['width']} | {row['samples']:,} | {ARMS[row['arm']]} | {row['parameters']:,}"
        lines.append(f"| {own} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bias and spread over width and samples for each weighting; over noise levels, each of the two."""
    most = max(row["samples"] for row in rows)
    by_width = [row for row in rows if row["samples"] == most]
    by_samples = [row for row in rows if row["width"] == WIDTH]
    middles = [LATEST * (k + 0.5) / BANDS for k in range(BANDS)]
    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axes = figure.subplots(2, 3)
    for (left, middle, right), (name, title), kind in zip(axes, WEIGHTINGS.items(), LINES, strict=True):
        _panel(left, f"{title}; {most:,} samples", "width of the denoisers")
        _plot_rows(left, by_width, "width", name)
        _panel(middle, f"{title}; width {WIDTH}", "samples of each distribution")
        _plot_rows(middle, by_samples, "samples", name)
        _panel(right, f"{kind} by noise level", f"t (0 is noise); width {WIDTH}, {most:,} samples")
        for row in by_samples:
            if row["samples"] == most:
                values = [_value(row, f"band{k}", kind) for k in range(BANDS)]
                right.plot(middles, values, LINES[kind], marker=".", color=COLOURS[row["arm"]])
        for ax in (left, middle, right):
            log_axis(ax)
    figure.supylabel("relative to the exact gradient's norm", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), handlelength=3)
    return figure


def _panel(ax: Axes, title: str, label: str) -> None:
    ax.set_title(title)
    ax.set_xlabel(label)


def _plot_rows(ax: Axes, rows: Sequence[Mapping[str, Any]], quantity: str, weighting: str) -> None:
    for arm, title in ARMS.items():
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row[quantity])
        for kind, dash in LINES.items():
            values = [_value(row, weighting, kind) for row in own]
            label = f"{title}: {kind}"
            ax.plot([row[quantity] for row in own], values, dash, marker=".", color=COLOURS[arm], label=label)
    ax.set_xscale("log")
    ticks = sorted({row[quantity] for row in rows})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _value(row: Mapping[str, Any], name: str, kind: str) -> float:
    return row[f"{name}.bias"] if kind == "bias" else row[f"{name}.variance"] ** 0.5
