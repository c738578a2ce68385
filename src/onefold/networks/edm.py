"""EDM: the preconditioned denoisers of EDM, on the U-Nets DDPM++, NCSN++ and ADM.

Their path is variance exploding, x = z + σ·ε. With s the standard deviation of the data, their denoiser is

    D(x; σ) = s²/(σ² + s²) · x + σ s/√(σ² + s²) · F(x/√(σ² + s²); log(σ)/4).

On our path σ = (1 − t)/t and x = z_t/t, so that with n² = (1 − t)² + s² t²

    ẑ = (s² t / n²) · z_t + ((1 − t) s / n) · F(z_t / n; log(σ)/4),

which is finite from noise, where F alone answers, to data, where ẑ = z_t. F is told a σ between 0.002 and 80, as it was
in training.

What only training has is left out: dropout, which is random, and labels of augmentation, which are zero. A label of
zeros is "no class".

References: Karras et al., 2022 (EDM); Song et al., 2021 (DDPM++, NCSN++); Dhariwal & Nichol, 2021 (ADM).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.networks.base import NetworkConfig, register
from onefold.networks.foreign import Foreign, described, each
from onefold.networks.jump import Jump

__all__ = ["EDM", "UNETS", "Halves", "Preconditioned", "places"]

SIGMA = (0.002, 80.0)
"""Noise levels that F is asked at."""
ASIDE = ("map_label.", "map_augment.", "emb_label.")
"""Weights that are read otherwise, or not at all."""


class Place(NamedTuple):
    """Where a block is in a U-Net, and what goes in and out."""

    name: str
    """By resolution and kind, as in files: 32x32_block0."""
    size: int
    inner: int
    outer: int


def places(size: int, widths: Sequence[int], first: int, blocks: int) -> tuple[list[Place], list[Place]]:
    """The blocks of a descending and of an ascending half, in order.

    A level has so many `blocks` on the way down, after its convolution or change of resolution, and one more on the way
    up, each of which also reads what one place on the way down has put out.

    Args:
        size: Resolution of the first level, which halves from each to the next.
        widths: Channels of each level.
        first: Channels after the first convolution.
        blocks: Blocks of a level.
    """
    levels = [(size >> level, width) for level, width in enumerate(widths)]
    down, at = list[Place](), first
    for resolution, width in levels:
        kind = "down" if down else "conv"
        down.append(Place(f"{resolution}x{resolution}_{kind}", resolution, at, at))
        for k in range(blocks):
            down.append(Place(f"{resolution}x{resolution}_block{k}", resolution, at, width))
            at = width
    up, kept = list[Place](), [place.outer for place in down]
    for resolution, width in reversed(levels):
        for kind in ("up",) if up else ("in0", "in1"):
            up.append(Place(f"{resolution}x{resolution}_{kind}", resolution, at, at))
        for k in range(blocks + 1):
            up.append(Place(f"{resolution}x{resolution}_block{k}", resolution, at + kept.pop(), width))
            at = width
    return down, up


class Halves(nn.Module):
    """A U-Net in two halves; `width` channels of conditioning, `coarse_width` of the coarsest level."""

    width: int
    label_width: int
    coarse_width: int

    def condition(
        self, c_noise: Float[Tensor, " B"], label: Float[Tensor, "B L"] | None, role: Float[Tensor, "B V"] | None
    ) -> Float[Tensor, "B V"]:
        """The conditioning of a noise level, of the vector of a label, and of a role."""
        raise NotImplementedError

    def descend(
        self, x: Float[Tensor, "B C H W"], condition: Float[Tensor, "B V"]
    ) -> tuple[Float[Tensor, "B c h w"], list[Tensor]]:
        """The coarsest level, and what the ascending half will read of the others."""
        raise NotImplementedError

    def ascend(
        self, h: Float[Tensor, "B c h w"], skips: list[Tensor], condition: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B C H W"]:
        """From there to F."""
        raise NotImplementedError

    def cut(self) -> None:
        """Remove the ascending half."""
        raise NotImplementedError

    def label_vectors(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "K L"]:
        """The vector of each class and, last, of none, from weights by their own names."""
        raise NotImplementedError


class Preconditioned(Foreign):
    """D, with random weights; a subclass says which U-Net it is."""

    body: Halves

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        options = described(config)
        self.scale = float(options["sigma_data"])
        self.body = self.halves(options)
        self.coarse_width = self.body.coarse_width
        self.labels = nn.Embedding(config.classes + 1, self.body.label_width) if config.classes else None
        self.jump = Jump(self.body.width)

    @classmethod
    def halves(cls, options: Mapping[str, Any]) -> Halves:
        """The U-Net F of these options."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        super().check(config)
        options = described(config)
        wanted, found = (
            ((options["img_resolution"],) * 2, options["img_channels"]),
            (config.image_size, config.channels),
        )
        if wanted != found:
            size, channels = wanted
            raise UserError(
                f"network.image_size: the network takes {size[0]}×{size[1]} with {channels} channels, not "
                f"{found[0][0]}×{found[0][1]} with {found[1]}; make other images so with `onefold data convert`"
            )

    def clean(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None,
        role: Float[Tensor, "B V"] | None,
    ) -> Float[Tensor, "B C H W"]:
        """See `Foreign.clean`."""
        s, n = self.scale, self._size(t)
        condition = self._condition(t, y, role)
        out = self.body.ascend(*self.body.descend(x_t / each(n), condition), condition).float()
        return each(s**2 * t / n.square()) * x_t + each((1 - t) * s / n) * out

    def coarsest(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None
    ) -> Float[Tensor, "B c h w"]:
        """See `Foreign.coarsest`."""
        return self.body.descend(x_t / each(self._size(t)), self._condition(t, y, None))[0]

    def cut(self) -> None:
        self.body.cut()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of F, by the names that they have in it."""
        own = {f"body.{name}": value for name, value in weights.items() if not name.startswith(ASIDE)}
        if self.labels is not None:
            own["labels.weight"] = self.body.label_vectors(weights)
        self.load_state_dict(own | {name: value for name, value in self.state_dict().items() if name[:5] == "jump."})

    def _size(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """n, the standard deviation of z_t."""
        return torch.hypot(1 - t, self.scale * t)

    def _condition(self, t: Float[Tensor, " B"], y: Tensor | None, role: Tensor | None) -> Float[Tensor, "B V"]:
        label = None
        if self.labels is not None:
            label = self.labels(torch.full(t.shape, self.config.classes, device=t.device) if y is None else y)
        c_noise = ((1 - t) / t).clamp(*SIGMA).log() / 4
        return self.body.condition(c_noise, label, role)


@register("edm")
class EDM(Preconditioned):
    """The denoisers of EDM, with random weights; `adopt` gives it those of another."""

    @classmethod
    def halves(cls, options: Mapping[str, Any]) -> Halves:
        return UNetHalves(options)


# --- the U-Nets of DDPM++, NCSN++ and ADM -----------------------------------------------------------------------------

UNETS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "resample_filter": [1, 1],
    },
}
"""What files leave out, by the name of the U-Net's class. SongUNet is DDPM++ or NCSN++, DhariwalUNet ADM."""

Change = Literal["keep", "up", "down"]


class Convolution(nn.Module):
    """A convolution with a change of resolution by a separable filter before it or, if `late`, after it.

    Without a kernel (size 0), only the change.
    """

    resample_filter: Tensor

    def __init__(
        self,
        inner: int,
        outer: int,
        size: int,
        change: Change = "keep",
        taps: list[int] | None = None,
        late: bool = False,
    ) -> None:
        super().__init__()
        self.change, self.late, self.size = change, late, size
        if size:
            self.weight = nn.Parameter(torch.randn(outer, inner, size, size) / math.sqrt(inner * size**2))
            self.bias = nn.Parameter(torch.zeros(outer))
        if change != "keep":
            one = torch.tensor(taps or [1, 1], dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(one, one) / one.sum() ** 2)[None, None])

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        if not self.size:
            return self._changed(x, self._reach)
        if self.late:  # the change takes no padding of its own: the convolution's is that much larger
            return self._changed(F.conv2d(x, self.weight, self.bias, padding=self.size // 2 + self._reach), 0)
        x = x if self.change == "keep" else self._changed(x, self._reach)
        return F.conv2d(x, self.weight, self.bias, padding=self.size // 2)

    @property
    def _reach(self) -> int:
        return (self.resample_filter.shape[-1] - 1) // 2

    def _changed(self, x: Tensor, padding: int) -> Tensor:
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.change == "up":
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class ResidualBlock(nn.Module):
    """Two convolutions, told the conditioning in between, and attention; each added to what came in."""

    def __init__(
        self,
        inner: int,
        outer: int,
        width: int,
        adm: bool,
        taps: list[int],
        change: Change = "keep",
        attends: bool = False,
    ) -> None:
        """`adm`: scaled and shifted by the conditioning, 64 channels per head; else shifted, one head, and each sum
        divided by √2.
        """
        super().__init__()
        self.adm = adm
        eps = 1e-5 if adm else 1e-6
        self.norm0 = group_norm(inner, eps)
        self.conv0 = Convolution(inner, outer, 3, change, taps)
        self.affine = nn.Linear(width, 2 * outer if adm else outer)
        self.norm1 = group_norm(outer, eps)
        self.conv1 = Convolution(outer, outer, 3)
        projects = inner != outer or (change != "keep" and not adm)
        self.skip = Convolution(inner, outer, int(projects), change, taps) if projects or change != "keep" else None
        self.heads = (outer // 64 if adm else 1) if attends else 0
        if self.heads:
            self.norm2 = group_norm(outer, eps)
            self.qkv = Convolution(outer, 3 * outer, 1)
            self.proj = Convolution(outer, outer, 1)

    def forward(self, x: Float[Tensor, "B c h w"], condition: Float[Tensor, "B V"]) -> Float[Tensor, "B C H W"]:
        scale = 1.0 if self.adm else math.sqrt(0.5)
        h = self.conv0(F.silu(self.norm0(x)))
        told = self.affine(condition)[:, :, None, None]
        if self.adm:
            by, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, 1 + by, self.norm1(h))
        else:
            h = self.norm1(h + told)
        h = scale * (self.conv1(F.silu(h)) + (x if self.skip is None else self.skip(x)))
        if not self.heads:
            return h
        q, k, v = self.qkv(self.norm2(h)).unflatten(1, (self.heads, -1, 3)).flatten(4).unbind(3)
        seen = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return scale * (h + self.proj(seen.reshape(h.shape)))


class Frequencies(nn.Module):
    """Random frequencies of the features of a noise level."""

    freqs: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(count))


class UNetHalves(Halves):
    """DDPM++, NCSN++ or ADM; blocks by the names that they have in files."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.adm = options["kind"] == "DhariwalUNet"
        options = {**UNETS[options["kind"]], **options}
        base, size, channels = options["model_channels"], options["img_resolution"], options["img_channels"]
        noise, self.width = base * options["channel_mult_noise"], base * options["channel_mult_emb"]
        self.label_width = self.width if self.adm else noise
        self.noise = noise
        self.map_noise = Frequencies(noise // 2) if options.get("embedding_type") == "fourier" else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, self.width), nn.Linear(self.width, self.width)

        widths = [base * factor for factor in options["channel_mult"]]
        down, up = places(size, widths, widths[0] if self.adm else base, options["num_blocks"])
        taps, attended, aside = options["resample_filter"], options["attn_resolutions"], channels

        def block(place: Place, change: Change = "keep", attends: bool = False) -> ResidualBlock:
            return ResidualBlock(place.inner, place.outer, self.width, self.adm, taps, change, attends)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for place in down:
            if place.name.endswith("conv"):
                self.enc[place.name] = Convolution(channels, place.outer, 3)
            elif place.name.endswith("down"):
                self.enc[place.name] = block(place, "down")
                if options["encoder_type"] == "residual":
                    name = place.name.replace("down", "aux_residual")
                    self.enc[name] = Convolution(aside, place.outer, 3, "down", taps, late=True)
                    aside = place.outer
            else:
                self.enc[place.name] = block(place, attends=place.size in attended)
        for place in up:
            last = place.name.endswith(f"block{options['num_blocks']}")
            attends = "in0" in place.name or ("block" in place.name and place.size in attended and (self.adm or last))
            self.dec[place.name] = block(place, "up" if "up" in place.name else "keep", attends)
        self.coarse_width, ends = down[-1].outer, up[-1].outer
        if self.adm:
            self.out_norm, self.out_conv = group_norm(ends, 1e-5), Convolution(ends, channels, 3)
        else:
            self.dec[f"{size}x{size}_aux_norm"] = group_norm(ends, 1e-6)
            self.dec[f"{size}x{size}_aux_conv"] = Convolution(ends, channels, 3)

    def condition(
        self, c_noise: Float[Tensor, " B"], label: Float[Tensor, "B L"] | None, role: Float[Tensor, "B V"] | None
    ) -> Float[Tensor, "B V"]:
        half = self.noise // 2
        if self.map_noise is not None:
            frequencies = 2 * math.pi * self.map_noise.freqs
        else:
            steps = torch.arange(half, device=c_noise.device) / (half if self.adm else half - 1)
            frequencies = 1e-4**steps
        angles = torch.outer(c_noise, frequencies)
        waves = (angles.cos(), angles.sin()) if self.adm else (angles.sin(), angles.cos())
        at = torch.cat(waves, dim=1)
        if label is not None and not self.adm:
            at = at + label
        condition = self.map_layer1(F.silu(self.map_layer0(at)))
        if label is not None and self.adm:
            condition = condition + label
        return F.silu(condition if role is None else condition + role)

    def descend(
        self, x: Float[Tensor, "B C H W"], condition: Float[Tensor, "B V"]
    ) -> tuple[Float[Tensor, "B c h w"], list[Tensor]]:
        skips, aside = list[Tensor](), x
        for name, block in self.enc.items():
            if name.endswith("aux_residual"):
                x = aside = skips[-1] = (x + block(aside)) / math.sqrt(2)
            else:
                x = block(x) if isinstance(block, Convolution) else block(x, condition)
                skips.append(x)
        return x, skips

    def ascend(
        self, h: Float[Tensor, "B c h w"], skips: list[Tensor], condition: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B C H W"]:
        for name, block in self.dec.items():
            if name.endswith("aux_norm"):
                h = F.silu(block(h))
            elif name.endswith("aux_conv"):
                h = block(h)
            else:
                h = block(torch.cat([h, skips.pop()], dim=1) if "block" in name else h, condition)
        return self.out_conv(F.silu(self.out_norm(h))) if self.adm else h

    def cut(self) -> None:
        self.dec = nn.ModuleDict()
        self.out_norm = self.out_conv = nn.Identity()

    def label_vectors(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "K L"]:
        rows = weights["map_label.weight"].T
        if not self.adm:
            rows = math.sqrt(len(rows)) * rows
        vectors = torch.cat([rows, torch.zeros_like(rows[:1])])
        return vectors if self.adm else vectors + weights["map_label.bias"]
