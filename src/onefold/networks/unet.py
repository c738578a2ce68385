"""UNet: a `UNet2DModel` of diffusers with its scheduler, a denoising diffusion model (DDPM) of images.

Its path is variance preserving, x_s = √ᾱ_s·z + √(1 − ᾱ_s)·ε, with a table of levels s = 0 … T − 1. On ours, the level
of equal signal-to-noise ratio has

    log ᾱ_s/(1 − ᾱ_s) = 2 log t/(1 − t),     x = z_t / √(t² + (1 − t)²),

and lies between two of the table, where the logarithm is interpolated; beyond its ends, the network is asked at the
end. What it predicts becomes

    epsilon         ẑ = (x − √(1 − ᾱ) ε̂) / √ᾱ
    v_prediction    ẑ = √ᾱ x − √(1 − ᾱ) v
    sample          ẑ

and is clipped where the scheduler says so (`clip_sample`), with the gradient of what is not. A mean squared error of ẑ
would train ε̂ with the weight (1 − ᾱ)/ᾱ, without bound towards noise; there, the gradient in the weights is that of an
error of ε̂ itself. So each level is weighted by min(1, SNR) (Hang et al., 2023, with γ = 1), and the minimum at every
level is the same.

References: Ho et al., 2020 (DDPM); Salimans & Ho, 2022 (v). Dropout is left out: whatever is random in a step is drawn
before it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold.errors import UserError
from onefold.networks.base import NetworkConfig, register
from onefold.networks.foreign import Foreign, described, each
from onefold.networks.jump import Jump
from onefold.networks.library import diffusers

__all__ = ["UNet", "level_table"]

LEAST = 1e-12
"""Of ᾱ: a schedule may end in pure noise, whose logarithm is infinite."""


@register("unet")
class UNet(Foreign):
    """The U-Net of diffusers with random weights; `adopt` gives it those of another."""

    levels: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        parts = described(config)
        settings = {**parts["unet"], "class_embed_type": "identity", "num_class_embeds": None, "dropout": 0.0}
        self.body: Any = diffusers().UNet2DModel.from_config(settings)
        self.width: int = self.body.time_embedding.linear_2.out_features
        self.labels = nn.Embedding(config.classes + 1, self.width) if config.classes else None
        self.jump = Jump(self.width)
        self.coarse_width = self.body.config.block_out_channels[-1]
        scheduler = diffusers().DDPMScheduler.from_config(parts["scheduler"])
        self.predicts: str = scheduler.config.prediction_type
        self.clip: float | None = scheduler.config.clip_sample_range if parts["scheduler"].get("clip_sample") else None
        self.register_buffer("levels", level_table(scheduler.alphas_cumprod), persistent=False)

    @classmethod
    def check(cls, config: NetworkConfig) -> None:
        super().check(config)
        unet = described(config)["unet"]
        if config.channels != unet["in_channels"]:
            raise UserError(
                f"network.channels: {config.channels}, but the U-Net takes {unet['in_channels']}; give other images"
            )
        factor = 2 ** (len(unet["block_out_channels"]) - 1)
        if any(size % factor for size in config.image_size):
            height, width = config.image_size
            raise UserError(
                f"network.image_size: {height}×{width} cannot be halved as often as the U-Net does; "
                f"convert the images to a multiple of {factor}"
            )

    def clean(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        y: Int64[Tensor, " B"] | None,
        role: Float[Tensor, "B V"] | None,
    ) -> Float[Tensor, "B C H W"]:
        """See `Foreign.clean`."""
        log_snr = torch.maximum(2 * torch.logit(t.float()), self.levels[-1])
        a, b = (each(torch.sigmoid(sign * log_snr).sqrt()) for sign in (1, -1))
        x = x_t / each(torch.hypot(t, 1 - t))
        out = self._ask(x, log_snr, y, role)
        if self.predicts == "epsilon":
            share = (a / b).square().clamp(max=1)
            z = (x - b * (share * out + ((1 - share) * out).detach())) / a
        else:
            z = out if self.predicts == "sample" else a * x - b * out
        return z if self.clip is None else z + (z.clamp(-self.clip, self.clip) - z).detach()

    def coarsest(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None
    ) -> Float[Tensor, "B c h w"]:
        """See `Foreign.coarsest`; of a network that is `cut`."""
        return self._ask(x_t / each(torch.hypot(t, 1 - t)), 2 * torch.logit(t.float()), y, None)

    def cut(self) -> None:
        self.body.up_blocks = nn.ModuleList()
        self.body.conv_norm_out = self.body.conv_act = self.body.conv_out = nn.Identity()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a `UNet2DModel`.

        One vector more than there are classes is that of "no class"; without it, their mean stands in.
        """
        own = {f"body.{name}": value for name, value in weights.items() if not name.startswith("class_embedding.")}
        if self.labels is not None:
            rows = weights["class_embedding.weight"]
            missing = self.labels.num_embeddings - len(rows)
            own["labels.weight"] = torch.cat([rows, rows.mean(0, keepdim=True)]) if missing else rows
        self.load_state_dict(self.state_dict() | own)

    def _ask(
        self, x: Float[Tensor, "B C H W"], log_snr: Float[Tensor, " B"], y: Tensor | None, role: Tensor | None
    ) -> Tensor:
        """What the body makes of x at the levels of these signal-to-noise ratios."""
        condition = torch.zeros(len(x), self.width, device=x.device) if role is None else role
        if self.labels is not None:
            no_class = torch.full((len(x),), self.config.classes, device=x.device)
            condition = condition + self.labels(no_class if y is None else y)
        return self.body(x, position(log_snr, self.levels), class_labels=condition).sample.float()


def level_table(survival: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Log ᾱ/(1 − ᾱ) of each level, falling."""
    return torch.logit(survival.double().clamp(min=LEAST)).float()


def position(log_snr: Float[Tensor, " B"], levels: Float[Tensor, " T"]) -> Float[Tensor, " B"]:
    """Where values lie in a falling table: from 0 to T − 1, linear between its entries."""
    right = torch.searchsorted(-levels, -log_snr).clamp(1, len(levels) - 1)
    high, low = levels[right - 1], levels[right]
    return (right - 1 + (high - log_snr) / (high - low)).clamp(0, len(levels) - 1)
