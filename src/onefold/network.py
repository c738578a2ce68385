"""OneFold: encoder, denoiser and decoder as three roles of one trunk.

    encode:   image patches  → trunk → latents out → norm        z  = E(x)
    denoise:  latents in     → trunk → latents out               ẑ  ≈ E[z | z_t, t, y]
    decode:   latents in     → trunk → patches out               x̂  = D(z)

The trunk knows its role from a conditioning vector: a learned vector per role, to which denoising adds features of
the time t and a learned vector of the class y. All three roles share the trunk and its modulation; only the four
linear entrances and exits, the time map and the class vectors serve fewer (under 5 % of the parameters).

Conventions: images (B, C, H, W) in [−1, 1]; latents (B, N, D), one token for each of the N = (H/p)·(W/p) patches;
t in [0, 1] with 0 noise and 1 data; label K means "no class".
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onefold import sampling, settings
from onefold.errors import UserError
from onefold.pixels import to_uint8
from onefold.trunk import Modulation, Trunk, fourier_features

__all__ = ["NetworkConfig", "OneFold", "parameter_shares"]

TIME_FEATURES = 64
ROLES = ("encode", "denoise", "decode")


class ImageRMSNorm(nn.Module):
    """Unit RMS over all the numbers of an image's latent (B, N, D) together: tokens may differ in size."""

    def forward(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return z * (z.square().mean((1, 2), keepdim=True) + 1e-6).rsqrt()


LATENT_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": lambda channels: nn.RMSNorm(channels, eps=1e-6, elementwise_affine=False),
    "rms_image": lambda channels: ImageRMSNorm(),
    "layer_norm": lambda channels: nn.LayerNorm(channels, eps=1e-6),
    "none": lambda channels: nn.Identity(),
}


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that fixes the network's shape. `classes` = 0 is unconditional."""

    image_size: tuple[int, int] = (8, 8)
    """Height and width in pixels; multiples of `patch`."""
    channels: int = 1
    classes: int = 10
    patch: int = 2
    latent_channels: int = 4
    """Numbers per latent token."""
    width: int = 128
    depth: int = 6
    heads: int = 4
    latent_norm: Literal["rms", "rms_image", "layer_norm", "none"] = "rms"
    """rms: unit RMS per token; rms_image: per image; layer_norm: per token, with learned scale and shift."""
    output: Literal["clean", "velocity"] = "clean"
    """What the denoising exit computes: ẑ itself, or v with ẑ = z_t + (1 − t)·v. `denoise` always returns ẑ."""

    def __post_init__(self) -> None:
        height, width = self.image_size
        for name in ("channels", "patch", "latent_channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"network.{name}: {getattr(self, name)} is not positive; give at least 1")
        if self.classes < 0:
            raise UserError(f"network.classes: {self.classes} is negative; 0 means unconditional")
        if min(height, width) < self.patch:
            raise UserError(
                f"network.patch: {self.patch} is larger than the image ({height}×{width}); "
                "choose a smaller patch or larger images"
            )
        if height % self.patch or width % self.patch:
            raise UserError(
                f"network.image_size: {height}×{width} is not divisible by patch {self.patch}; choose another patch "
                f"or convert the images to {height // self.patch * self.patch}×{width // self.patch * self.patch}"
            )
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"network.heads: width {self.width} over {self.heads} heads must give a multiple of 4 per head"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class OneFold(nn.Module):
    """One network with random weights; see the module's docstring. Methods run on the device of their input."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        patch_width = config.patch**2 * config.channels
        self.patches_in = nn.Linear(patch_width, config.width)
        self.latents_in = nn.Linear(config.latent_channels, config.width)
        self.latents_out = nn.Linear(config.width, config.latent_channels)
        self.patches_out = nn.Linear(config.width, patch_width)
        self.roles = nn.Embedding(len(ROLES), config.width)
        self.time = nn.Linear(TIME_FEATURES, config.width, bias=False)
        self.labels = nn.Embedding(config.classes + 1, config.width)
        self.modulation = Modulation(config.width)
        self.trunk = Trunk(config.width, config.depth, config.heads, *config.grid)
        self.norm = LATENT_NORMS[config.latent_norm](config.latent_channels)

    # --- the three roles ---

    def encode(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Latents of images in [−1, 1], normalised as `config.latent_norm` says."""
        h = self.trunk(self.patches_in(self.patchify(x)), self._condition("encode"))
        return self.norm(self.latents_out(h).float())

    def denoise(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], y: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Clean latents ẑ behind noised latents at times t in [0, 1], given labels y (None: no class)."""
        h = self.trunk(self.latents_in(z_t), self._condition("denoise", t, y))
        return self._clean(h, z_t, t)

    def decode(self, z: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        """Images of latents; in [−1, 1] up to the network's error (not clamped)."""
        return self._image(self.trunk(self.latents_in(z), self._condition("decode")))

    def decode_and_denoise(
        self, z: Tensor, z_t: Tensor, t: Tensor, y: Tensor | None
    ) -> tuple[Float[Tensor, "A C H W"], Float[Tensor, "B N D"]]:
        """(decode(z), denoise(z_t, t, y)) in one packed call of the trunk, which is cheaper than two."""
        decoding = self._condition("decode").expand(len(z), -1, -1)
        condition = torch.cat([decoding, self._condition("denoise", t, y)])
        h = self.trunk(self.latents_in(torch.cat([z, z_t])), condition)
        return self._image(h[: len(z)]), self._clean(h[len(z) :], z_t, t)

    def features(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B N W"]]:
        """The encoder's hidden tokens after each block: a perceptual space that needs no other network."""
        return self.trunk.hidden(self.patches_in(self.patchify(x)), self._condition("encode"))

    # --- entrances, exits and conditioning ---

    def patchify(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
        """Cut images into rows of p²·C numbers, one for each patch, in row-major order."""
        p = self.config.patch
        return x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B C H W"]:
        """The inverse of `patchify`."""
        (rows, columns), p = self.config.grid, self.config.patch
        blocks = patches.unflatten(1, (rows, columns)).unflatten(3, (-1, p, p))
        return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _image(self, h: Tensor) -> Tensor:
        return self.unpatchify(self.patches_out(h).float())

    def _clean(self, h: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        out = self.latents_out(h).float()
        return out if self.config.output == "clean" else z_t + (1 - t[:, None, None]) * out

    def _condition(self, role: str, t: Tensor | None = None, y: Tensor | None = None) -> Float[Tensor, "#B 6 W"]:
        condition = self.roles.weight[ROLES.index(role)].unsqueeze(0)
        if t is not None:
            if y is None:
                y = torch.full(t.shape, self.config.classes, device=t.device)
            condition = condition + self.time(fourier_features(t, TIME_FEATURES)) + self.labels(y)
        return self.modulation(condition)

    # --- sampling ---

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Sequence[int] | None = None,
        steps: int = 50,
        guidance: float = 1.0,
        seed: int = 0,
        solver: Literal["euler", "heun"] = "euler",
        shift: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batch: int = 256,
    ) -> UInt8[np.ndarray, "n H W C"]:
        """Generate `n` images; image k is drawn from the seed `seed + k` alone, whatever `n` and `batch` are.

        Args:
            n: Number of images.
            labels: A label 0…K−1, or K for "no class", for each image. Default: (seed + k) mod K.
            steps: Intervals of the solver's time grid; 1 is one-step generation.
            guidance: Weight of classifier-free guidance; 1 is unguided and costs half.
            seed: Seed of the first image.
            solver: See `sampling.Sampler`, as for the next two.
            shift: Bends the time grid.
            guidance_interval: Times within which guidance acts.
            batch: Images per call of the network.

        Raises:
            UserError: a count, label, seed or option that makes no sense.
        """
        sampler = sampling.Sampler(steps, solver, guidance, guidance_interval, shift)
        y = sampling.resolve_labels(n, labels, seed, self.config.classes)
        latents = self.sample_latents(range(seed, seed + n), y, sampler, batch=batch)
        return torch.cat([to_uint8(self.decode(z)).permute(0, 2, 3, 1).cpu() for z in latents]).numpy()

    def sample_latents(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        sampler: sampling.Sampler,
        *,
        batch: int = 256,
    ) -> Iterator[Float[Tensor, "B N D"]]:
        """Clean latents for `seeds` and `labels`, batch by batch (see `sampling.generate`)."""
        return sampling.generate(
            self.denoise,
            (self.config.tokens, self.config.latent_channels),
            seeds,
            labels,
            sampler,
            null_label=self.config.classes,
            batch=batch,
            device=self.latents_in.weight.device,
        )

    # --- files ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (float32) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(settings.to_json(self.config))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load a network from its folder, a run's folder, or a repository "owner/name" on the Hugging Face hub.

        Raises:
            UserError: no such folder, or files that do not hold a OneFold network.
        """
        folder = Path(source)
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            folder = _download(str(source))
        folder = folder / "model" if (folder / "model").is_dir() else folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: no config.json there; give the folder of a run or of a saved network")
        config = settings.from_json(NetworkConfig, (folder / "config.json").read_text(), str(folder / "config.json"))
        network = cls(config)
        try:
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / 'model.safetensors'}: does not hold this network ({reason})") from error
        return network.eval()


def parameter_shares(network: OneFold) -> dict[str, float]:
    """Number of parameters, and the share of them that serves all three roles.

    Shared by all: the trunk and the modulation, and the role table, which each role reads. Not shared: the four
    linear entrances and exits, the time map, the class vectors and the latent norm.
    """
    total = sum(p.numel() for p in network.parameters())
    shared = sum(p.numel() for part in (network.trunk, network.modulation) for p in part.parameters())
    return {"parameters": total, "shared": shared, "share": shared / total}


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError) as error:
        raise UserError(
            f"{repository}: neither a folder here nor a network that the hub gives out ({type(error).__name__}); "
            "check the name and the connection"
        ) from error
