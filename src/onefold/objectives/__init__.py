"""Objectives: the losses to minimise, as plain functions of networks, data and draws."""

from onefold.objectives.density_ratio import DIVERGENCES

__all__ = ["DIVERGENCES"]
