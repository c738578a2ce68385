"""onefold: image generators as one network, trained in one run, sampled in one step."""

__version__ = "0.1.0"
