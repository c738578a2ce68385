"""onefold: image generators as one network, trained in one run, sampled in one step."""

__version__ = "0.1.0"

from onefold import data, metrics, objectives
from onefold.errors import TrainingAborted, UserError
from onefold.evaluation import evaluate
from onefold.networks.one_network import NetworkConfig, OneFold
from onefold.networks.ratio import RatioNet
from onefold.recipes import recipe
from onefold.reconstruction import reconstruct
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
    "evaluate",
    "load_run",
    "metrics",
    "objectives",
    "recipe",
    "reconstruct",
    "train",
]
