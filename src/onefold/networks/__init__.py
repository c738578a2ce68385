"""Networks: their common base (`base`) and the built-in ones, which register themselves when imported here."""

from onefold.networks.backbone import Backbone
from onefold.networks.base import NETWORKS, Network, NetworkConfig, RoleFlops, build, parameter_shares, register
from onefold.networks.one_network import OneFold
from onefold.networks.pixel_network import PixelNetwork
from onefold.networks.ratio import RatioConfig, RatioNet
from onefold.networks.three_networks import ThreeNetworks
from onefold.networks.trunk import Trunk

__all__ = [
    "NETWORKS",
    "Backbone",
    "Network",
    "NetworkConfig",
    "OneFold",
    "PixelNetwork",
    "RatioConfig",
    "RatioNet",
    "RoleFlops",
    "ThreeNetworks",
    "Trunk",
    "build",
    "parameter_shares",
    "register",
]
