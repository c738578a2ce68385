"""EDM2: the magnitude-preserving U-Net of EDM2, preconditioned as EDM's (`edm.py`).

Every operation keeps the mean square of its activations, of independent inputs of mean square 1:

    conv        weights of unit mean square per output, over √(inputs)
    silu        silu(x) / 0.596
    sum         ((1 − b)·x + b·y) / √((1 − b)² + b²)
    cat         [x·(1 − b)·√(n/n_x), y·b·√(n/n_y)] / √((1 − b)² + b²),     n = n_x + n_y

Weights are normalised whenever they are used; that they are also stored so in the course of its training is left out,
as is dropout.

Reference: Karras et al., 2024 (arXiv 2312.02696).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from onefold.networks.base import register
from onefold.networks.edm import Halves, Place, Preconditioned, places

__all__ = ["EDM2", "MagnitudeHalves"]

BOUND = 256.0
"""Of activations."""
DEFAULTS: dict[str, Any] = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "channels_per_head": 64,
    "res_balance": 0.3,
    "attn_balance": 0.3,
}
"""What files leave out."""


@register("edm2")
class EDM2(Preconditioned):
    """The denoisers of EDM2, with random weights; `adopt` gives it those of another."""

    @classmethod
    def halves(cls, options: Mapping[str, Any]) -> Halves:
        return MagnitudeHalves(options)


def unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """X over its root mean square along `dims`."""
    return x / (x.float().square().mean(dims, keepdim=True).sqrt() + 1e-4).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def mixed(x: Tensor, y: Tensor, share: float) -> Tensor:
    """The sum of x and `share` of y."""
    return x.lerp(y, share) / math.hypot(1 - share, share)


def joined(x: Float[Tensor, "B a h w"], y: Float[Tensor, "B b h w"], share: float) -> Float[Tensor, "B c h w"]:
    """The channels of x and, as a `share` of what is there, of y."""
    n = x.shape[1] + y.shape[1]
    parts = (1 - share) * math.sqrt(n / x.shape[1]) * x, share * math.sqrt(n / y.shape[1]) * y
    return torch.cat(parts, dim=1) / math.hypot(1 - share, share)


class Waves(nn.Module):
    """Cosines of random frequencies and phases."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(count))
        self.register_buffer("phases", 2 * math.pi * torch.rand(count))

    def forward(self, c_noise: Float[Tensor, " B"]) -> Float[Tensor, "B count"]:
        return math.sqrt(2) * (torch.outer(c_noise, self.freqs) + self.phases).cos()


class Magnitude(nn.Module):
    """A convolution, or with `size` 0 a linear map, without bias."""

    def __init__(self, inner: int, outer: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner, *(size, size) * bool(size)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        inner = self.weight[0].numel()
        w = (unit(self.weight, tuple(range(1, self.weight.ndim))) * (gain / math.sqrt(inner))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MagnitudeBlock(nn.Module):
    """A block of the descending or of the ascending half."""

    def __init__(
        self,
        inner: int,
        outer: int,
        width: int,
        options: Mapping[str, Any],
        descends: bool,
        change: str,
        attends: bool,
    ) -> None:
        """`change` of the resolution: "up", "down" or "keep"."""
        super().__init__()
        self.descends, self.change = descends, change
        self.balances: tuple[float, float] = options["res_balance"], options["attn_balance"]
        self.heads = outer // options["channels_per_head"] if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Magnitude(outer if descends else inner, outer, 3)
        self.emb_linear = Magnitude(width, outer, 0)
        self.conv_res1 = Magnitude(outer, outer, 3)
        self.conv_skip = Magnitude(inner, outer, 1) if inner != outer else None
        if self.heads:
            self.attn_qkv, self.attn_proj = Magnitude(outer, 3 * outer, 1), Magnitude(outer, outer, 1)

    def forward(self, x: Float[Tensor, "B c h w"], condition: Float[Tensor, "B V"]) -> Float[Tensor, "B C H W"]:
        if self.change != "keep":
            x = F.avg_pool2d(x, 2) if self.change == "down" else F.interpolate(x, scale_factor=2.0)
        if self.descends:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), (1,))
        told = 1 + self.emb_linear(condition, self.emb_gain)[:, :, None, None]
        h = self.conv_res1(silu(self.conv_res0(silu(x)) * told))
        if not self.descends and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mixed(x, h, self.balances[0])
        if self.heads:
            q, k, v = unit(self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4), (2,)).unbind(3)
            seen = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
            x = mixed(x, self.attn_proj(seen.reshape(x.shape)), self.balances[1])
        return x.clamp(-BOUND, BOUND)


class MagnitudeHalves(Halves):
    """The U-Net of EDM2; blocks by the names that they have in files."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        options = {**DEFAULTS, **options}
        base, size, channels = options["model_channels"], options["img_resolution"], options["img_channels"]
        widths = [base * factor for factor in options["channel_mult"]]
        noise = base * (options["channel_mult_noise"] or options["channel_mult"][0])
        self.width = self.label_width = base * (options["channel_mult_emb"] or max(options["channel_mult"]))
        self.shares: tuple[float, float] = options["label_balance"], options["concat_balance"]
        self.emb_fourier = Waves(noise)
        self.emb_noise = Magnitude(noise, self.width, 0)
        self.out_gain = nn.Parameter(torch.zeros([]))

        attended = options["attn_resolutions"]
        down, up = places(size, widths, widths[0], options["num_blocks"])

        def block(place: Place, descends: bool) -> MagnitudeBlock:
            attends = "in0" in place.name or ("block" in place.name and place.size in attended)
            change = next((change for change in ("up", "down") if place.name.endswith(change)), "keep")
            return MagnitudeBlock(place.inner, place.outer, self.width, options, descends, change, attends)

        first = {down[0].name: Magnitude(channels + 1, down[0].outer, 3)}
        self.enc = nn.ModuleDict(first | {place.name: block(place, True) for place in down[1:]})
        self.dec = nn.ModuleDict({place.name: block(place, False) for place in up})
        self.out_conv = Magnitude(up[-1].outer, channels, 3)
        self.coarse_width = down[-1].outer

    def condition(
        self, c_noise: Float[Tensor, " B"], label: Float[Tensor, "B L"] | None, role: Float[Tensor, "B V"] | None
    ) -> Float[Tensor, "B V"]:
        condition = self.emb_noise(self.emb_fourier(c_noise))
        if label is not None:
            condition = mixed(condition, label, self.shares[0])
        return silu(condition if role is None else condition + role)

    def descend(
        self, x: Float[Tensor, "B C H W"], condition: Float[Tensor, "B V"]
    ) -> tuple[Float[Tensor, "B c h w"], list[Tensor]]:
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), list[Tensor]()
        for block in self.enc.values():
            x = block(x) if isinstance(block, Magnitude) else block(x, condition)
            skips.append(x)
        return x, skips

    def ascend(
        self, h: Float[Tensor, "B c h w"], skips: list[Tensor], condition: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B C H W"]:
        for name, block in self.dec.items():
            h = block(joined(h, skips.pop(), self.shares[1]) if "block" in name else h, condition)
        return self.out_conv(h, self.out_gain)

    def cut(self) -> None:
        self.dec = nn.ModuleDict()
        self.out_conv = nn.Identity()
        self.out_gain = None

    def label_vectors(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "K L"]:
        rows = unit(weights["emb_label.weight"], (1,)).T
        return torch.cat([rows, torch.zeros_like(rows[:1])])
