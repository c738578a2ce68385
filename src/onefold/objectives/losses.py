"""Losses: what every objective returns, and the errors that several of them share.

A loss is a plain function of networks, images, labels and draws. All randomness is drawn beforehand for the whole
batch, so that a batch split into micro-batches (or across processes) has the same gradient: **the losses of the parts
of a batch add up to that of the batch**. To this end, each part knows its `Span`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from onefold.networks import Network

__all__ = ["Draws", "Losses", "Span", "each_tensor", "perceptual_error", "reconstruction_error"]


class Span(NamedTuple):
    """Images `start` to `stop` of a batch of `batch`."""

    start: int
    stop: int
    batch: int

    @property
    def share(self) -> float:
        """Fraction of the batch."""
        return (self.stop - self.start) / self.batch

    def part(self, start: int, stop: int) -> "Span":
        """Images `start` to `stop` of these."""
        return Span(self.start + start, self.start + stop, self.batch)

    def spread(self, count: int, device: torch.device) -> Int64[Tensor, " k"]:
        """Of `count` images spread evenly over the whole batch, the positions within the span of those it contains.

        Computed on the device, since copying a list there would make the host wait.
        """
        first, last = (-(-place * count // self.batch) for place in (self.start, self.stop))
        return torch.arange(first, last, device=device) * self.batch // max(1, count) - self.start


D = TypeVar("D", bound="tuple[Any, ...]")


def each_tensor(draws: D, act: Callable[[Tensor], Tensor]) -> D:
    """Draws with `act` applied to all their tensors, including those within tuples."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return act(value)
        return each_tensor(value, act) if isinstance(value, tuple) and not isinstance(value, Span) else value

    return type(draws)(*map(changed, draws))


class Draws(Protocol):
    """The randomness of a batch; each objective has its own."""

    def part(self, start: int, stop: int) -> Self:
        """The draws of images `start` to `stop`."""
        ...


class Losses(NamedTuple):
    """The loss to minimise, and its logged terms by name (detached); all for a part's share of the batch.

    A `balanced` loss comes with a norm instead of a weight: over the whole batch, its gradient is scaled to this
    multiple of the norm that `total`'s has in the same weights. So neither the size of the latents nor the method
    decides how much it counts. It shares weights with `total`, and no part of the graph.
    """

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]
    balanced: Mapping[str, tuple[float, Float[Tensor, ""]]] = MappingProxyType({})
    """(multiple, loss) by name."""

    @classmethod
    def weighted(cls, terms: Mapping[str, Float[Tensor, ""]], weights: Mapping[str, float], span: Span) -> "Losses":
        """The share of `span` in Σ weight · term, where each term is a mean over the images of `span`."""
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return cls(span.share * total, {name: span.share * term.detach() for name, term in terms.items()})


def reconstruction_error(x_hat: Tensor, x: Tensor, kind: Literal["l1", "l2", "charbonnier"]) -> Float[Tensor, ""]:
    """Mean over all values of |e|, e² or √(e² + 10⁻⁶) with e = x̂ − x."""
    error = x_hat - x
    if kind == "l1":
        return error.abs().mean()
    if kind == "l2":
        return error.square().mean()
    return (error.square() + 1e-6).sqrt().mean()


def perceptual_error(target: Network, x_hat: Tensor, x: Tensor) -> Float[Tensor, ""]:
    """Mean squared distance of unit-length tokens in the hidden layers of the target network's encoder.

    The gradient passes through the features of x̂ to x̂, but not into the target network's weights, which do not
    require one.
    """
    with torch.no_grad():
        expected = target.features(x)
    distances = [
        (F.normalize(seen, dim=-1) - F.normalize(wanted, dim=-1)).square().sum(-1).mean()
        for seen, wanted in zip(target.features(x_hat), expected, strict=True)
    ]
    return torch.stack(distances).mean()
