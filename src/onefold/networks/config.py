"""A network's configuration, and the architectures by name; see `base`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Suppress

from onefold import settings
from onefold.errors import UserError

if TYPE_CHECKING:
    from onefold.networks.base import Network

__all__ = ["NETWORKS", "NetworkConfig", "architectures", "register"]

NETWORKS: dict[str, "type[Network]"] = {}
"""Registered networks by architecture name; see `register`."""

Kind = TypeVar("Kind", bound="type[Network]")


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: from then on, `NetworkConfig(architecture=name)` describes the network and `build` creates it.

    A class with the same module and name replaces an earlier one, so that a notebook cell can run twice.

    Raises:
        UserError: a name that is not an identifier, or is taken by another class.
    """
    if not name.isidentifier():
        raise UserError(f"register: {name!r} is no name for an architecture; give letters, digits and underscores")

    def registered(kind: Kind) -> Kind:
        other = NETWORKS.get(name, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(
                f"register: {name!r} is the architecture of {other.__module__}.{other.__qualname__} already; "
                "choose another name"
            )
        NETWORKS[name] = kind
        return kind

    return registered


def architectures() -> list[str]:
    """Names of the registered networks that can be made from nothing."""
    return sorted(name for name, kind in NETWORKS.items() if not kind.adopted)


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that determines the network's shape, and the names of its classes. `classes` = 0 is unconditional."""

    image_size: tuple[int, int] = (8, 8)
    """Height and width in pixels; multiples of `patch`."""
    channels: int = 1
    classes: int = 10
    patch: int = 2
    latent_channels: int = 4
    """Channels per latent token."""
    width: int = 128
    depth: int = 6
    heads: int = 4
    latent_norm: Literal["rms", "rms_image", "layer_norm", "none"] = "rms"
    """rms: unit RMS per token; rms_image: per image; layer_norm: per token, with learned scale and shift."""
    jump_rank: int = 0
    """Rank of the changes to the trunk's matrices that generating has of its own. 0: it shares them all."""
    jump_exit: bool = False
    """Whether generating also has an exit to pixels, so that one pass of the trunk makes an image."""
    output: Literal["clean", "velocity"] = "clean"
    """What the denoising exit computes: ẑ itself, or v with ẑ = z_t + (1 − t)·v. `denoise` always returns ẑ."""
    architecture: Annotated[str, Suppress] = "one_network"  # --architecture on the command line
    """one_network: one trunk in three roles; three_networks: a baseline, one network per role; pixels: only a denoiser,
    with patch² · channels values per token; or any other name in `NETWORKS`."""
    equal: Literal["parameters", "compute"] = "parameters"
    """What three networks match of one network with the same settings: its total parameters, or its compute in each
    role, which takes three times the parameters."""
    class_names: Annotated[tuple[str, ...], Suppress] = ()  # read from the data
    """One per class, in the order of their numbers. Empty: the numbers themselves, or unknown."""
    foreign: Annotated[str, Suppress] = ""  # read from what is adopted
    """What else describes a network that comes from elsewhere, as JSON (see `networks.adopted`)."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "channels", "patch", "latent_channels", "width", "depth", "heads")
        settings.check("network", self, positive=sizes, not_negative=("classes", "jump_rank"))
        for name, value in self.kind.implied(self).items():
            object.__setattr__(self, name, value)
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise UserError(
                f"network.heads: width {self.width} over {self.heads} heads must give a multiple of 4 per head"
            )
        if self.jump_exit and not self.kind.paints:
            raise UserError(f"network.jump_exit: {self.kind.__name__} has no exit for its generator; leave it out")
        self.kind.check(self)
        if self.class_names and len(self.class_names) != self.classes:
            names = len(self.class_names)
            raise UserError(
                f"network.class_names: {names} given where network.classes is {self.classes}; name each class, or none"
            )

    @property
    def kind(self) -> "type[Network]":
        """The class of the network. Raises a UserError if the architecture is not registered."""
        if self.architecture not in NETWORKS:
            raise UserError(
                f"network.architecture: {self.architecture!r} is not one of {', '.join(architectures())}; "
                "import the module that registers it first, if it is a network of your own"
            )
        return NETWORKS[self.architecture]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens. Raises a UserError if the patch does not divide the images."""
        height, width = self.image_size
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
        return height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]
