"""RatioNet: the log density ratio ℓ(x_t, t, y) = log p_t(x_t|y) / q_t(x_t|y) on a backbone.

The backbone's tokens are pooled by attention with learned queries, one per head, and mapped to a scalar. What such a
network needs most is features at all noise levels, which a denoiser has already learned: `RatioNet.of` starts from a
network's own. Of a network from elsewhere, its descending half takes the backbone's place (`foreign.py`).

Reference: Zhang, Chen, He et al., 2025 (arXiv 2502.08005); attention pooling: Lee et al., 2019.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from torch import Tensor, nn

from onefold import settings
from onefold.errors import UserError, reason
from onefold.files import read_tensors, write_tensors
from onefold.networks.backbone import Backbone
from onefold.networks.base import Network, NetworkConfig, build
from onefold.networks.foreign import Half
from onefold.networks.jump import fill_with_zeros

__all__ = ["RatioConfig", "RatioNet"]

HEADS = 4
"""Of the pooling behind half a network from elsewhere."""


@dataclass(frozen=True)
class RatioConfig:
    """Everything that determines the shape of a ratio network."""

    numbers: int = 4
    """Channels per latent token."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    grid: tuple[int, int] = (4, 4)
    classes: int = 10
    half: NetworkConfig | None = None
    """The network from elsewhere whose descending half it is; None: a backbone of these sizes."""

    def __post_init__(self) -> None:
        sizes = ("numbers", "width", "depth", "heads", "grid")
        settings.check("ratio network", self, positive=sizes, not_negative=("classes",))


class AttentionPool(nn.Module):
    """From tokens (B, N, W) to one scalar per image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(heads, width // heads))
        self.project_in = nn.Linear(width, 2 * width)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, h: Float[Tensor, "B N W"]) -> Float[Tensor, " B"]:
        k, v = self.project_in(h).float().unflatten(-1, (2, *self.queries.shape)).unbind(2)
        attention = torch.einsum("hd,bnhd->bhn", self.queries, self.norm_k(k)) / self.queries.shape[1] ** 0.5
        pooled = torch.einsum("bhn,bnhd->bhd", attention.softmax(-1), v).flatten(1)
        return self.out(F.silu(self.hidden(pooled))).squeeze(-1).float()


class Scale(nn.Module):
    """e^s(t): the factor that calibrates a ratio network at each level; 1 at first, s linear between levels."""

    calls: ClassVar[tuple[str, ...]] = ()
    """See `Network.calls`."""

    def __init__(self, levels: int = 11) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(levels))
        self.register_load_state_dict_pre_hook(fill_with_zeros)

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        at = t * (len(self.logarithm) - 1)
        left = at.long().clamp(max=len(self.logarithm) - 2)
        return torch.lerp(self.logarithm[left], self.logarithm[left + 1], at - left).exp()


class RatioNet(nn.Module):
    """(x_t, t, y) → ℓ, with random weights: starting at zero, training would take long to leave it.

    ℓ is the network's own value, `logit`, times a `scale` that depends only on t.
    """

    calls: ClassVar[tuple[str, ...]] = ("logit",)
    """See `Network.calls`."""

    def __init__(self, config: RatioConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.numbers, config.width, config.depth, config.heads, config.grid, config.classes)
        self.backbone = build(config.half).backbone() if config.half else Backbone(*sizes)
        self.head = AttentionPool(config.width, config.heads)
        self.scale = Scale()

    @classmethod
    def of(cls, network: Network, blocks: int | None = None, *, learned: bool = True) -> "RatioNet":
        """A ratio network with the shape of a given network and a head of its own.

        Args:
            network: The network whose latents are compared.
            blocks: Depth, at most the network's; None for all.
            learned: Start from the network's weights rather than random ones.

        Raises:
            UserError: more blocks than the network has.
        """
        backbone, own = network.backbone(blocks), network.config
        if isinstance(backbone, Half):
            width, depth, heads, half = backbone.width, 1, math.gcd(backbone.width, HEADS), own
        else:
            assert isinstance(backbone, Backbone)
            width, depth, heads, half = own.width, len(backbone.trunk.blocks), own.heads, None
        ratio = cls(RatioConfig(own.latent_channels, width, depth, heads, own.grid, own.classes, half))
        if learned:
            ratio.backbone = backbone
        return ratio.to(network.device)

    def forward(
        self, x_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """ℓ of noised latents at times t in [0, 1], given labels y (None: no class)."""
        return self.scale(t) * self.logit(x_t, t, y)

    def logit(
        self, x_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """The network's own value, before calibration."""
        return self.head(self.backbone(x_t, t, y))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float32) into `folder`."""
        self.save_config(Path(folder))
        write_tensors(self.state_dict(), Path(folder) / "model.safetensors")

    def save_config(self, folder: Path) -> None:
        """Write all but the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RatioNet":
        """Load what `save_pretrained` wrote.

        Raises:
            UserError: no such folder, or files that do not hold a ratio network.
        """
        folder = Path(folder)
        try:
            text = (folder / "config.json").read_text(encoding="utf-8")
            ratio = cls(settings.from_json(RatioConfig, text, str(folder / "config.json")))
            ratio.load_state_dict(read_tensors(folder / "model.safetensors")[0])
        except (OSError, SafetensorError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{folder}: does not hold a ratio network ({reason(error)})") from error
        return ratio.eval()
