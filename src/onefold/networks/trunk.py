"""The trunk: one transformer that serves every role of the network.

A token sequence `h` (B, N, W) passes through L pre-norm blocks

    h ← h + g₁ · attention((1 + s₁) · norm(h) + b₁)
    h ← h + g₂ ·   swiglu((1 + s₂) · norm(h) + b₂)

with RMS norms, normalised queries and keys, and rotary positions in two dimensions. The six modulation
vectors (b₁, s₁, g₁ − 1, b₂, s₂, g₂ − 1) come from a conditioning vector through **one** linear map shared by
all blocks, plus a learned offset per block: conditioning costs 6·W² parameters once and 6·W per block, instead of 6·W²
per block (adaLN-single; Chen et al., PixArt-α, 2023).

Residual branches end in zero-initialised projections, so the untrained trunk is the identity.

References: rotary positions: Su et al., 2021; SwiGLU: Shazeer, 2020; query-key norm: Henry et al., 2020.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "TIME_FEATURES",
    "Block",
    "Change",
    "Modulation",
    "Trunk",
    "conditioning",
    "hidden_width",
    "rotary_table",
    "trunk_flops",
]

TIME_FEATURES = 64
"""Number of sine and cosine features that encode the time."""

Change = Mapping[str, tuple[Tensor, Tensor]]
"""Factors (B, A) of what is added to matrices W of a block, by name: W + BA."""


def hidden_width(width: int) -> int:
    """Width of the SwiGLU's hidden layer: 8/3 of the trunk's, to the nearest multiple of 128 (at least 128)."""
    return max(128, 128 * round(8 * width / 3 / 128))


def trunk_flops(tokens: int, width: int, depth: int) -> float:
    """Operations of one image's pass through a trunk of `depth` blocks and its modulation.

    A product of (m × k) by (k × n) matrices counts as 2·m·k·n operations; norms, activations and the like are not
    counted.
    """
    block = 2 * tokens * width * (4 * width + 3 * hidden_width(width)) + 4 * tokens**2 * width
    return depth * block + 14 * width**2


def rotary_table(rows: int, columns: int, head_width: int, *, base: float = 100.0) -> Float[Tensor, "2 N half"]:
    """Cosines and sines of the rotary positions of a grid of tokens in row-major order.

    The first half of the rotated pairs turns with the row, the second with the column; frequencies fall
    geometrically from 1 to 1/`base` radians per token. `head_width` is a multiple of 4.
    """
    frequencies = base ** -torch.linspace(0, 1, head_width // 4, dtype=torch.float64)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1).double() * frequencies for p in (row, column)], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Float[Tensor, "B heads N head"], table: Float[Tensor, "2 N half"]) -> Float[Tensor, "B heads N head"]:
    """Rotate the pairs (x_i, x_{i + half}) by the angles of `table`."""
    cos, sin = table[0], table[1]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    return linear


def _matrix(linear: nn.Linear, name: str, change: Change | None) -> Tensor:
    """The matrix of a linear map, with its change if there is one."""
    if change is None or name not in change:
        return linear.weight
    b, a = change[name]
    return linear.weight + b @ a


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, with query-key norm and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = _zero(nn.Linear(width, width, bias=False))
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, h: Float[Tensor, "B N W"], table: Tensor, change: Change | None = None) -> Float[Tensor, "B N W"]:
        w_in = _matrix(self.project_in, "attention.project_in.weight", change)
        w_out = _matrix(self.project_out, "attention.project_out.weight", change)
        q, k, v = F.linear(h, w_in).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = rotate(self.norm_q(q.float()), table)
        k = rotate(self.norm_k(k.float()), table)
        # Under bf16 autocast a GPU attends in bf16; on a CPU the fused backward pass is many times slower in
        # bf16 than in float32, so attention stays in float32 there while the matrix products around it do not.
        dtype = v.dtype if v.is_cuda else torch.float32
        with torch.autocast(v.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))
        return F.linear(out.transpose(1, 2).flatten(2), w_out)


class SwiGLU(nn.Module):
    """Gated feed-forward layer: W₃(silu(W₁h) · W₂h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(width, 2 * hidden_width(width), bias=False)
        self.project_out = _zero(nn.Linear(hidden_width(width), width, bias=False))

    def forward(self, h: Float[Tensor, "B N W"], change: Change | None = None) -> Float[Tensor, "B N W"]:
        w_in = _matrix(self.project_in, "swiglu.project_in.weight", change)
        w_out = _matrix(self.project_out, "swiglu.project_out.weight", change)
        gate, value = F.linear(h, w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, w_out)


class Block(nn.Module):
    calls: ClassVar[tuple[str, ...]] = ()
    """See `Network.calls`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.swiglu = SwiGLU(width)
        self.norm_attention = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm_swiglu = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.offset = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        h: Float[Tensor, "B N W"],
        modulation: Float[Tensor, "#B 6 W"],
        table: Tensor,
        change: Change | None = None,
    ) -> Float[Tensor, "B N W"]:
        b1, s1, g1, b2, s2, g2 = (modulation + self.offset).unsqueeze(2).unbind(1)
        h = h + (1 + g1) * self.attention(torch.addcmul(b1, 1 + s1, self.norm_attention(h)), table, change)
        return h + (1 + g2) * self.swiglu(torch.addcmul(b2, 1 + s2, self.norm_swiglu(h)), change)


class Trunk(nn.Module):
    """L blocks over the tokens of a `rows` × `columns` grid; tokens in, tokens out, both of width W."""

    table: Tensor
    recomputes = False
    """Whether a backward pass computes each block anew from its input, rather than find all that was inside it kept."""

    def __init__(self, width: int, depth: int, heads: int, rows: int, columns: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.register_buffer("table", rotary_table(rows, columns, width // heads), persistent=False)

    def forward(
        self, h: Float[Tensor, "B N W"], modulation: Float[Tensor, "#B 6 W"], changes: Sequence[Change] = ()
    ) -> Float[Tensor, "B N W"]:
        """With `changes`, one for each block, to its matrices."""
        h = h.float()  # as every block returns it under autocast, so that all share one compiled graph
        for block, change in itertools.zip_longest(self.blocks, changes):
            h = self._through(block, h, modulation, change)
        return self.norm(h)

    def hidden(self, h: Float[Tensor, "B N W"], modulation: Float[Tensor, "#B 6 W"]) -> list[Float[Tensor, "B N W"]]:
        """The tokens after each block."""
        h, states = h.float(), list[Tensor]()
        for block in self.blocks:
            h = self._through(block, h, modulation)
            states.append(h)
        return states

    def _through(self, block: nn.Module, h: Tensor, modulation: Tensor, change: Change | None = None) -> Tensor:
        def run(h: Tensor, modulation: Tensor) -> Tensor:
            return block(h, modulation, self.table, change)

        if self.recomputes and torch.is_grad_enabled():  # nothing in a block is random
            return checkpoint(run, h, modulation, use_reentrant=False, preserve_rng_state=False)
        return run(h, modulation)


class Modulation(nn.Module):
    """From a conditioning vector (B, W) to the six modulation vectors (B, 6, W) that all blocks share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = _zero(nn.Linear(width, 6 * width))
        nn.init.zeros_(self.out.bias)

    def forward(self, condition: Float[Tensor, "B W"]) -> Float[Tensor, "B 6 W"]:
        return self.out(F.silu(self.hidden(F.silu(condition)))).unflatten(1, (6, -1))


def fourier_features(t: Float[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Sines and cosines of π·f·t for `count`/2 frequencies f that rise geometrically from 1/2 to 500."""
    frequencies = 0.5 * 1000 ** torch.linspace(0, 1, count // 2, device=t.device)
    angles = math.pi * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def conditioning(
    time: nn.Linear,
    labels: nn.Embedding,
    t: Float[Tensor, " B"],
    y: Int64[Tensor, " B"] | None = None,
    role: Float[Tensor, "#B W"] | None = None,
) -> Float[Tensor, "B W"]:
    """The conditioning vector [role +] time(features of t) + labels[y], for times t in [0, 1].

    Args:
        time: Maps `TIME_FEATURES` features to the trunk's width.
        labels: One vector per class; the last is for "no class".
        t: Times.
        y: Labels; None: no class.
        role: The vector of the role, if there are several.
    """
    if y is None:
        y = torch.full(t.shape, labels.num_embeddings - 1, device=t.device)
    at = time(fourier_features(t, TIME_FEATURES))
    return (at if role is None else role + at) + labels(y)
