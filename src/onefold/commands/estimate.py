"""`onefold estimate`."""

from typing import Literal

from tyro.conf import Positional

from onefold import estimate as costs
from onefold import tables
from onefold.commands.terminal import console
from onefold.recipes import recipe

__all__ = ["estimate"]


def estimate(
    name: Positional[str],
    /,
    architecture: Literal["one-network", "three-networks"] | None = None,
    seconds: float = 20.0,
    device: str = "auto",
    micro_batch: int | None = None,
) -> None:
    """Say what a recipe costs: parameters, arithmetic, memory, and the time by a short measurement.

    The measurement also tells the largest micro-batch that fits, and what 8 and 64 such devices would need at least.

    Example: onefold estimate imagenet256-b --seconds 0

    Args:
        name: A recipe.
        architecture: One network, or the baseline of three, trained in two stages. Default: the recipe's.
        seconds: Length of the measurement; 0 counts only.
        device: auto, cpu, cuda, …
        micro_batch: Images per pass of the measurement.
    """
    config = recipe(name).with_changes({"training.device": device, "training.micro_batch": micro_batch})
    if architecture is not None:
        config = config.with_changes({"network.architecture": architecture.replace("-", "_")})
    tables.show_estimate(console, name, config, costs.estimate(config, seconds=seconds))
