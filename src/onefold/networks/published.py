"""Published networks before they are built: fetched from the hub, or refused for filling the memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from onefold.errors import UserError

if TYPE_CHECKING:
    from onefold.networks.base import NetworkConfig

__all__ = ["check_fits", "download"]


def check_fits(config: "NetworkConfig", tensors: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of numbers so large that they cannot be those of these weights.

    Raises:
        ValueError: a network of this size would have far more weights.
    """
    if not config.kind.__module__.startswith("onefold."):  # whose weights only it knows
        return
    numbers = 2**22 + sum(value.numel() for value in tensors.values())
    inputs = config.channels * config.patch**2 + config.latent_channels + config.classes
    matrix = config.width * max(config.width, inputs)
    if matrix > numbers or config.depth > 100 + len(tensors) or config.tokens > 2**24:
        raise ValueError("config.json describes a far larger one")


def download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"no such folder: {repository}; nor does the hub give out a network of that name "
            f"({type(error).__name__}); check the spelling, or the connection"
        ) from error
