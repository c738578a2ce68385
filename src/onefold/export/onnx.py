"""ONNX: each role of a network as a file that onnxruntime runs, on any number of images, in float32.

    encoder.onnx      images (B, C, H, W) in [−1, 1]                      → latents (B, N, D)
    decoder.onnx      latents                                             → images
    denoiser.onnx     z_t (B, N, D), t (B,) in [0, 1], labels (B,) int64  → z_hat (B, N, D)
    generator.onnx    noise (B, N, D), standard normal; labels            → images, in one step

Images that a file gives are in [−1, 1] up to the network's error, not clipped. The last file is written for a one-step
generator only, and decodes too, so that a program which only generates needs one file. Label K is "no
class"; a network without classes has no labels.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onefold import settings
from onefold.errors import UserError, writing
from onefold.networks.base import Network

__all__ = ["write"]

ROLES = ("encoder", "decoder", "denoiser", "generator")


class Role(nn.Module):
    """One role of a network. The names of `forward`'s arguments are those of the file's inputs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network


class Encoder(Role):
    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return self.network.encode(images)


class Decoder(Role):
    def forward(self, latents: Float[Tensor, "B N D"]) -> Float[Tensor, "B C H W"]:
        return self.network.decode(latents)


class Denoiser(Role):
    def forward(
        self, z_t: Float[Tensor, "B N D"], t: Float[Tensor, " B"], labels: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B N D"]:
        return self.network.denoise(z_t, t, labels)


class Generator(Role):
    def forward(
        self, noise: Float[Tensor, "B N D"], labels: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        start = self.network.sampler.start
        t = torch.full_like(noise[:, 0, 0], start)
        return self.network.decode(self.network.generate((1 - start) * noise, t, labels))


def write(network: Network, folder: Path, *, roles: Collection[str] = ROLES) -> list[Path]:
    """Write `roles`, and `config.json` with the shapes, the classes' names and the sampler; returns the roles' files.

    Raises:
        UserError: the exporter is not installed, or a file cannot be written.
    """
    for module in ("onnx", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--to onnx and --to web: need {module}; pip install 'onefold[export]'")
    network, config = network.to("cpu").eval(), network.config
    x = torch.zeros(2, config.channels, *config.image_size)
    z = torch.zeros(2, config.tokens, config.latent_channels)
    t, y = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    labels = {"labels": y} if config.classes else {}
    every: list[tuple[str, Role, dict[str, Tensor], str]] = [
        ("encoder", Encoder(network), {"images": x}, "latents"),
        ("decoder", Decoder(network), {"latents": z}, "images"),
        ("denoiser", Denoiser(network), {"z_t": z, "t": t, **labels}, "z_hat"),
    ]
    if network.sampler.jumps:
        every.append(("generator", Generator(network), {"noise": z, **labels}, "images"))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        described = {"network": _plain(config), "sampler": _plain(network.sampler)}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return [
        _write(role, inputs, [output], folder / f"{name}.onnx") for name, role, inputs, output in every if name in roles
    ]


def _plain(value: object) -> object:
    return json.loads(settings.to_json(value))


def _write(role: Role, inputs: dict[str, Tensor], outputs: Sequence[str], path: Path) -> Path:
    batch = torch.export.Dim("batch", min=1)
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)  # it would name each operator of torchvision that is not installed
    try:
        with warnings.catch_warnings(), writing(path):
            warnings.simplefilter("ignore")  # the exporter's own, of torch's future
            program = torch.onnx.export(
                role.eval(),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes={name: {0: batch} for name in inputs},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.save(path)
    finally:
        registry.setLevel(level)
    return path
