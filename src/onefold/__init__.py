"""onefold: image generators as one network, trained in one run, sampled in one step.

    import onefold

    run = onefold.train(onefold.recipe("digits"), "runs/digits")    # or data=(images, labels), your own
    images = run.network.sample(16, labels=[3] * 16, seed=0)        # uint8 (n, H, W, C)
    record = onefold.evaluate(run)                                  # every number with its protocol
    fast = onefold.onestep(run)                                     # the same network, in one step
    z = run.network.encode(onefold.to_tensor(images))               # float (B, C, H, W) in [-1, 1] -> (B, N, D)
    again = onefold.to_images(run.network.decode(z))                # and back to uint8 (n, H, W, C)

Start from `recipe`, `train`, `onestep`, `evaluate`, `reconstruct`, `load_run` and `OneFold.from_pretrained`. Wrong
input raises a `UserError`: one line that says what is wrong and how to fix it. Anything not named here may change. The
documentation is in `docs/`.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Threads that wait for one another sleep. Where they spin, as is OpenMP's default, and another process needs a core,
# sampling takes several times as long. Read when torch loads, so it has no effect on a torch that is there already;
# who sets OMP_WAIT_POLICY (or GOMP_SPINCOUNT, KMP_BLOCKTIME, which go before it) decides.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from onefold import data, loggers, metrics, networks, objectives
    from onefold.errors import TrainingAborted, UserError
    from onefold.evaluation import evaluate
    from onefold.networks import NetworkConfig, OneFold, RatioNet, adopt
    from onefold.pixels import to_images, to_tensor
    from onefold.planner import plan
    from onefold.recipes import recipe
    from onefold.reconstruction import reconstruct
    from onefold.training.config import Config
    from onefold.training.conversion import onestep
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
    "adopt",
    "data",
    "evaluate",
    "load_run",
    "loggers",
    "metrics",
    "networks",
    "objectives",
    "onestep",
    "plan",
    "recipe",
    "reconstruct",
    "to_images",
    "to_tensor",
    "train",
]

_ROOMS = {
    "errors": ("TrainingAborted", "UserError"),
    "evaluation": ("evaluate",),
    "networks": ("NetworkConfig", "OneFold", "RatioNet", "adopt"),
    "planner": ("plan",),
    "pixels": ("to_images", "to_tensor"),
    "recipes": ("recipe",),
    "reconstruction": ("reconstruct",),
    "training.config": ("Config",),
    "training.conversion": ("onestep",),
    "training.loop": ("train",),
    "training.run": ("Run", "load_run"),
}
"""Where the public names live. Each is imported on first use, which keeps `import onefold` fast."""


def __getattr__(name: str) -> Any:
    if name in ("data", "loggers", "metrics", "networks", "objectives"):
        return importlib.import_module(f"onefold.{name}")
    for room, names in _ROOMS.items():
        if name in names:
            value = getattr(importlib.import_module(f"onefold.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'onefold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
