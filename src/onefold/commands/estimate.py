"""`onefold estimate`."""

from typing import Annotated

import tyro

from onefold import estimate as costs
from onefold.commands import tables
from onefold.commands.arguments import parse
from onefold.commands.terminal import console, recipe_first, with_architecture
from onefold.data import open_dataset
from onefold.recipes import recipe
from onefold.training.config import Config
from onefold.training.one_run import with_one_step
from onefold.training.prepare import fit_to_data

__all__ = ["estimate"]


def estimate(arguments: list[str]) -> None:
    """Say what a training costs: parameters, arithmetic, memory, time."""
    name, options = recipe_first("estimate", arguments)
    default = recipe(name or "digits")

    def estimate_recipe(
        data: str | None = None,
        architecture: str | None = None,
        one_step: bool = False,
        seconds: float = 20.0,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Say what a training costs: parameters, arithmetic, memory, and the time by a short measurement.

        The measurement also tells the largest micro-batch that fits, and what 8 and 64 such devices would need at
        least. RECIPE comes first: digits, fashion, cifar10, imagenet256-s, -m or -b; settings are those of `train`.

        Example: onefold estimate imagenet256-b --network.width 512 --seconds 0

        Args:
            data: The images to train on, which give the size, channels and classes. Default: those of the recipe.
            architecture: one-network, three-networks (a baseline, in two stages) or pixels. Default: the recipe's.
            one_step: Of a run that also learns to generate in one step, as with `train --one-step`.
            seconds: Length of the measurement, without compilation; 0 counts only.
            config: All settings of the run; the defaults shown are the recipe's.
        """
        config = with_architecture(config, architecture)
        if data is not None:
            config = fit_to_data(config, open_dataset(data))
        if one_step:
            config = with_one_step(config)
        if seconds:
            console.print("measuring this device; a large network takes a minute or more")
        tables.show_estimate(console, default.recipe, config, costs.estimate(config, seconds=seconds))

    parse(estimate_recipe, options, f"onefold estimate {name or 'RECIPE'}")
