"""Networks: their common base (`base`) and the built-in ones, which register themselves when imported here."""

from onefold.networks.adopted import adopt
from onefold.networks.backbone import Backbone
from onefold.networks.base import NETWORKS, Network, NetworkConfig, RoleFlops, build, parameter_shares, register
from onefold.networks.edm import EDM
from onefold.networks.edm2 import EDM2
from onefold.networks.frozen_codec import FrozenCodec
from onefold.networks.one_network import OneFold
from onefold.networks.pixel_network import PixelNetwork
from onefold.networks.ratio import RatioConfig, RatioNet
from onefold.networks.three_networks import ThreeNetworks
from onefold.networks.trunk import Trunk
from onefold.networks.unet import UNet

__all__ = [
    "EDM",
    "EDM2",
    "NETWORKS",
    "Backbone",
    "FrozenCodec",
    "Network",
    "NetworkConfig",
    "OneFold",
    "PixelNetwork",
    "RatioConfig",
    "RatioNet",
    "RoleFlops",
    "ThreeNetworks",
    "Trunk",
    "UNet",
    "adopt",
    "build",
    "parameter_shares",
    "register",
]
