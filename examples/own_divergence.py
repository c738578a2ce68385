"""A custom divergence for the one-step generator: the χ² divergence D(p‖q) = E_q (r − 1)², with r = p/q.

On the command line:

    onefold --import examples/own_divergence.py onestep runs/digits --method ratio \
        --onestep.ratio.divergence chi_squared
"""

import torch

import onefold
from onefold.objectives.density_ratio import DIVERGENCES, Divergence


def weight(logit: torch.Tensor) -> torch.Tensor:
    """f″(r) r² = 2 r², with f(r) = (r − 1)² and r = e^ℓ, bounded so that no single sample outweighs all others."""
    return 2 * (2 * logit.clamp(max=3)).exp()


def generator_loss(logit: torch.Tensor) -> torch.Tensor:
    """The loss h with h′ = −weight; linear beyond the bound."""
    bounded = logit.clamp(max=3)
    return -(2 * bounded).exp() * (1 + 2 * (logit - bounded))


DIVERGENCES["chi_squared"] = Divergence(generator_loss, weight)


def main(teacher: str = "runs/digits", out: str = "runs/digits-chi-squared", images: int = 24_000) -> onefold.Run:
    """Turn a trained run into a one-step generator with it."""
    changes = {"onestep.ratio.divergence": "chi_squared"}
    return onefold.onestep(teacher, out, images=images, method="ratio", changes=changes)


if __name__ == "__main__":
    main()
