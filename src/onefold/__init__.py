"""onefold: image generators as one network, trained in one run, sampled in one step."""

__version__ = "0.1.0"

from onefold import data, metrics, networks, objectives
from onefold.errors import TrainingAborted, UserError
from onefold.networks import NetworkConfig, OneFold, RatioNet
from onefold.recipes import recipe
from onefold.training.config import Config
from onefold.training.loop import train
from onefold.training.run import Run, load_run

__all__ = [
    "Config",
    "NetworkConfig",
    "OneFold",
    "RatioNet",
    "Run",
    "TrainingAborted",
    "UserError",
    "__version__",
    "data",
    "load_run",
    "metrics",
    "networks",
    "objectives",
    "recipe",
    "train",
]
