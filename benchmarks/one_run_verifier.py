"""The density ratio that the two denoisers of one run imply, as a verifier: does it choose better samples?

    python benchmarks/one_run_verifier.py runs/one-run/digits0 runs/one-run/digits1 --json-file verifier.json

For x_t = t x + (1−t) ε with SNR = t²/(1−t)², the divergence of x_t given x from noised data grows with the denoiser's
error (Guo, Shamai & Verdú, 2005),

    d/dSNR KL(x_t | x ‖ p_t) = ½ E‖x − f_p(x_t)‖²,      so that      with the student f_q of the generator's samples

    ℓ_T(x) = E[log p_T(x_T)/q_T(x_T) | x] = ½ ∫₀^SNR(T) E[‖x − f_q(x_t)‖² − ‖x − f_p(x_t)‖²] dSNR:

the log-ratio of data and samples at the latest noise level T, averaged over its noise, without a network of its own.
The integral is a sum over levels evenly apart in log SNR, and all candidates see the same noise, as do the two
denoisers. It costs 2 passes of the trunk per level and candidate, where a ratio network takes one.

The student is not published, so it is read from the run's newest checkpoint. `auc` is the probability that ℓ of a test
image exceeds that of a one-step sample of its class: ½ where ℓ tells nothing.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import Positional

import command
import onefold
from onefold.data import read_all
from onefold.files import read_tensors
from onefold.networks import Network, RatioNet
from onefold.networks.jump import Jump
from onefold.objectives.score_distillation import Denoiser
from onefold.paths import Linear, noised, per_token
from onefold.pixels import to_float
from onefold.training.checkpoint import checkpoints
from onefold.training.run import Run
from onefold.verifier import Verifier
from onestep_digits import Measured, measured, summarised

FIRST = 0.02
"""The earliest level: what lies before it is as good as nothing."""
SEED = 2**41
"""Of the noise that all candidates see."""


@dataclass(frozen=True)
class TwoRoles:
    """(x, t, y) → ℓ_T(x) of clean latents x, whatever t is: for a `Verifier` of level 1."""

    data: Denoiser
    """f_p."""
    own: Denoiser
    """f_q."""
    eps: Float[Tensor, "draws N D"]
    """Noise, the same at each level."""
    levels: int = 8
    latest: float = 0.9
    """T: as far as the student is trained (`onerun.t_max`)."""
    known: dict[bytes, Tensor] = field(default_factory=dict)
    """What it has been asked before: `best` and `resample` choose among the same candidates."""

    def __call__(self, x: Float[Tensor, "B N D"], t: Tensor, y: Tensor | None) -> Float[Tensor, " B"]:
        key = x.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.ratio(x, y)
        return self.known[key]

    def ratio(self, x: Float[Tensor, "B N D"], y: Tensor | None) -> Float[Tensor, " B"]:
        """ℓ_T by the midpoint rule in log SNR."""
        first, last = (2 * math.log(t / (1 - t)) for t in (FIRST, self.latest))
        apart, found = (last - first) / self.levels, torch.zeros_like(x[:, 0, 0])
        for k in range(self.levels):
            snr = math.exp(first + (k + 0.5) * apart)
            t = torch.full_like(found, 1 / (1 + snr**-0.5))
            for eps in self.eps:
                x_t = noised(Linear(), x, eps.expand_as(x), per_token(t))
                errors = [(x - f(x_t, t, y)).square().flatten(1).sum(1) for f in (self.own, self.data)]
                found = found + 0.5 * snr * apart * (errors[0] - errors[1]) / len(self.eps)
        return found


def roles_of(run: Run, levels: int, draws: int, latest: float | None = None) -> TwoRoles:
    """The average's denoiser and the student, both as training left them; up to its latest level by default."""
    network = run.network
    student = Jump(network.denoising_trunk, network.config.jump_rank)
    student.load_state_dict(read_tensors(checkpoints(run.folder)[-1] / "student.safetensors")[0])
    rng = torch.Generator().manual_seed(SEED)
    eps = torch.randn(draws, network.config.tokens, network.config.latent_channels, generator=rng)
    own = partial(network.generate_with, student)
    return TwoRoles(network.denoise, own, eps, levels, latest or run.config.onerun.t_max)


@torch.no_grad()
def auc(run: Run, roles: TwoRoles) -> float:
    """Of test images against samples of the same classes."""
    x, y = read_all((test := run.open_data()[1]), range(len(test)))
    z = run.network.encode(to_float(x))
    made = torch.cat(list(run.network.sample_latents(range(len(y)), y.tolist(), run.network.sampler)))
    of_data, of_samples = (roles.ratio(each, y) for each in (z, made))
    return (of_data[:, None] > of_samples).double().mean().item()


def rows_of(run: Run, roles: TwoRoles, candidates: int) -> dict[str, Measured]:
    """One step without a choice, and with each."""

    def chooser(choice: Any) -> Callable[[Network], Verifier]:
        return lambda network: Verifier(network, cast(RatioNet, roles), candidates, choice, level=1.0)

    rows = {"1 step": measured(run)}
    for name, choice in (("best of", "best"), ("resampled from", "resample")):
        rows[f"{name} {candidates}"] = measured(run, verifier=chooser(choice))
    return rows


def main(
    runs: Positional[tuple[Path, ...]],
    /,
    levels: int = 8,
    draws: int = 1,
    latest: float | None = None,
    candidates: int = 4,
    json_file: Path | None = None,
) -> None:
    """Measure finished runs of `onefold train … --one-step`.

    `levels`, `draws`: of noise, for each candidate; `latest`: T, by default that of the student.
    """
    found: list[dict[str, Measured]] = []
    told: list[float] = []
    for folder in runs:
        run = onefold.load_run(folder)
        roles = roles_of(run, levels, draws, latest)
        told.append(auc(run, roles))
        print(f"{folder}: auc {told[-1]:.3f}")
        found.append(rows_of(run, roles, candidates))
    summary = summarised(found)
    if json_file is not None:
        about = {"onefold": onefold.__version__, "levels": levels, "draws": draws, "latest": latest, "auc": told}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, "rows": summary}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main)
