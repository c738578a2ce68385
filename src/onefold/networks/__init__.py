"""Networks: what every network is (`base`), and those that there are."""

from typing import NamedTuple

from onefold.networks import base
from onefold.networks.base import Network, NetworkConfig, build
from onefold.networks.one_network import OneFold
from onefold.networks.pixel_network import PixelNetwork
from onefold.networks.ratio import RatioNet
from onefold.networks.three_networks import ThreeNetworks


class RoleFlops(NamedTuple):
    encode: float
    denoise: float
    decode: float


base.RoleFlops = RoleFlops
Network.phases = ("self_distillation",)
ThreeNetworks.phases = ("autoencoder", "diffusion")
NETWORKS = {"one_network": OneFold, "three_networks": ThreeNetworks}


def _rf(cls):
    def f(config):
        return RoleFlops(0.0, 1.0, 0.0) if config.space == "pixels" else RoleFlops(1.0, 1.0, 1.0)

    return f


for c in (OneFold, ThreeNetworks):
    c.role_flops = staticmethod(_rf(c))
