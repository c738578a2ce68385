"""A custom network: encoder and decoder are linear maps, the denoiser is the package's trunk."""

import torch
from torch import Tensor, nn

import onefold
from onefold.networks import Backbone, Network, NetworkConfig, RoleFlops, register
from onefold.networks.base import forward_flops


@register("linear_codec")
class LinearCodec(Network):
    """z = norm(A·patch), x̂ = B·z, ẑ = C·trunk(z_t, t, y)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        patch, latent = config.patch**2 * config.channels, config.latent_channels
        self.encoder, self.decoder = nn.Linear(patch, latent), nn.Linear(latent, patch)
        self.norm = nn.RMSNorm(latent, elementwise_affine=False)
        self.body = Backbone(latent, config.width, config.depth, config.heads, config.grid, config.classes)
        self.exit = nn.Linear(config.width, latent)

    @classmethod
    def role_flops(cls, config: NetworkConfig) -> RoleFlops:
        codec = 2.0 * config.tokens * config.patch**2 * config.channels * config.latent_channels
        return RoleFlops(codec, forward_flops(config), codec)

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(self.encoder(self.patchify(x)).float())

    def denoise(self, z_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self._clean(self.exit(self.body(z_t, t, y)), z_t, t)

    def decode(self, z: Tensor) -> Tensor:
        return self.unpatchify(self.decoder(z).float())


def main(out: str = "runs/linear-codec", images: int = 12_800) -> onefold.Run:
    """Train it by self-distillation and load it again."""
    config = onefold.recipe("digits", **{"network.architecture": "linear_codec", "training.images": images})
    run = onefold.train(config, out)
    network = LinearCodec.from_pretrained(out)
    print(torch.allclose(network.encoder.weight, run.network.encoder.weight))
    return run


if __name__ == "__main__":
    main()
