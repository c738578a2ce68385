"""The network of onefold for diffusers: one transformer that encodes, denoises and decodes. Needs torch and diffusers.

A copy of this file lies in each exported folder, beside the weights, which have the same names as in onefold.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.func import functional_call

TIMES = 64


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, h, cos, sin):
        q, k, v = self.project_in(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        return self.project_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = max(128, 128 * round(8 * width / 3 / 128))
        self.project_in = nn.Linear(width, 2 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, width, bias=False)

    def forward(self, h):
        gate, value = self.project_in(h).chunk(2, dim=-1)
        return self.project_out(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.swiglu = SwiGLU(width)
        self.offset = nn.Parameter(torch.zeros(6, width))

    def forward(self, h, modulation, cos, sin):
        b1, s1, g1, b2, s2, g2 = (modulation + self.offset).unsqueeze(2).unbind(1)
        h = h + (1 + g1) * self.attention(b1 + (1 + s1) * rms_norm(h), cos, sin)
        return h + (1 + g2) * self.swiglu(b2 + (1 + s2) * rms_norm(h))


class Trunk(nn.Module):
    def __init__(self, width, depth, heads):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)


class Modulation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 6 * width)

    def forward(self, condition):
        return self.out(F.silu(self.hidden(F.silu(condition)))).unflatten(1, (6, -1))


MATRICES = [f"{layer}.{matrix}.weight" for layer in ("attention", "swiglu") for matrix in ("project_in", "project_out")]
"""Of a block."""


class LowRank(nn.Module):
    """W + BA for each of the trunk's matrices W."""

    def __init__(self, trunk, rank):
        super().__init__()
        shapes = [block.get_parameter(name).shape for block in trunk.blocks for name in MATRICES]
        self.a = nn.ParameterList(torch.zeros(rank, shape[1]) for shape in shapes)
        self.b = nn.ParameterList(torch.zeros(shape[0], rank) for shape in shapes)

    def of(self, k, block):
        """The changed matrices of block k."""
        pairs = enumerate(MATRICES, k * len(MATRICES))
        return {name: block.get_parameter(name) + self.b[i] @ self.a[i] for i, name in pairs}


class Jump(nn.Module):
    """What generating in one step has of its own."""

    def __init__(self, trunk, width, rank):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))
        self.arrival = nn.Parameter(torch.zeros(width, TIMES))
        self.change = LowRank(trunk, rank) if rank else None


class OneFoldNetwork(ModelMixin, ConfigMixin):
    """Images are (B, C, H, W) in [-1, 1], latents (B, N, D); t is 0 for noise and 1 for data; label K is "no class"."""

    @register_to_config
    def __init__(
        self,
        image_size=(8, 8),
        channels=1,
        classes=10,
        class_names=(),
        patch=2,
        latent_channels=4,
        width=128,
        depth=4,
        heads=4,
        latent_norm="rms",
        jump_rank=0,
        output="clean",
    ):
        super().__init__()
        self.patches_in = nn.Linear(patch**2 * channels, width)
        self.latents_in = nn.Linear(latent_channels, width)
        self.latents_out = nn.Linear(width, latent_channels)
        self.patches_out = nn.Linear(width, patch**2 * channels)
        self.roles = nn.Embedding(3, width)
        self.time = nn.Linear(TIMES, width, bias=False)
        self.labels = nn.Embedding(classes + 1, width)
        self.modulation = Modulation(width)
        self.trunk = Trunk(width, depth, heads)
        self.jump = Jump(self.trunk, width, jump_rank)
        self.norm = nn.LayerNorm(latent_channels, eps=1e-6) if latent_norm == "layer_norm" else nn.Identity()

    @property
    def grid(self):
        """Rows and columns of latent tokens."""
        return tuple(size // self.config.patch for size in self.config.image_size)

    def encode(self, x):
        """Latents (B, N, D) of images (B, C, H, W)."""
        p, norm = self.config.patch, self.config.latent_norm
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        z = self.latents_out(self._run(self.patches_in(patches), self.roles.weight[:1]))
        if norm.startswith("rms"):
            return z * (z.square().mean((1, 2) if norm == "rms_image" else 2, keepdim=True) + 1e-6).rsqrt()
        return self.norm(z)

    def denoise(self, z_t, t, y):
        """Clean latents predicted from noised ones at times t (B,), given labels y (B,)."""
        return self._predict(z_t, t, self.roles.weight[1] + self.time(times(t)) + self.labels(y))

    def generate(self, z_t, t, y):
        """A sample of the clean latents: one step from time t to data."""
        jump = self.jump.vector + F.linear(times(torch.ones_like(t)), self.jump.arrival)
        condition = self.roles.weight[1] + jump + self.time(times(t)) + self.labels(y)
        return self._predict(z_t, t, condition, self.jump.change)

    def decode(self, z):
        """Images (B, C, H, W) of latents (B, N, D)."""
        patches, p = self.patches_out(self._run(self.latents_in(z), self.roles.weight[2:])), self.config.patch
        return (
            patches.unflatten(1, self.grid).unflatten(3, (-1, p, p)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        )

    def _predict(self, z_t, t, condition, change=None):
        out = self.latents_out(self._run(self.latents_in(z_t), condition, change))
        return out if self.config.output == "clean" else z_t + (1 - t[:, None, None]) * out

    def _run(self, h, condition, change=None):
        modulation, (cos, sin) = self.modulation(condition), rotary(*self.grid, self.config.width // self.config.heads)
        for k, block in enumerate(self.trunk.blocks):
            matrices = {} if change is None else change.of(k, block)
            h = functional_call(block, matrices, (h, modulation, cos.to(h), sin.to(h)))
        return self.trunk.norm(h)


def rms_norm(h):
    """Unit root mean square of each token."""
    return F.rms_norm(h, h.shape[-1:], eps=1e-6)


def rotary(rows, columns, head_width):
    """Cosines and sines of the tokens' positions: half of the pairs turns with the row, half with the column."""
    frequencies = 100.0 ** -torch.linspace(0, 1, head_width // 4, dtype=torch.float64)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([p.reshape(-1, 1).double() * frequencies for p in (row, column)], dim=1)
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_(i + half))."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def times(t):
    """Cosines and sines of the times t (B,)."""
    angles = math.pi * t.float()[:, None] * 0.5 * 1000 ** torch.linspace(0, 1, TIMES // 2, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(t.dtype)
