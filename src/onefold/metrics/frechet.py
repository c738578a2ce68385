"""Fréchet distance between two sets of features, seen as Gaussians.

    d² = |μ_a − μ_b|² + tr A + tr B − 2 tr (A^½ B A^½)^½

with means μ and unbiased covariances A, B. The middle matrix is symmetric and positive, so a symmetric
eigen-decomposition in float64 gives the trace of its root: no complex numbers, no iteration that may fail,
and singular covariances (n < d) are no special case. With Inception features this is the FID.

The distance of finite sets is biased upwards, by roughly 1/n: compare only numbers of the same n, and
mistrust one with n < 2·d (`Moments.too_few`).

Shapes: features (n, d); mean (d,); covariance (d, d). The value is in squared units of the features, ≥ 0.

Reference: Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onefold.errors import UserError
from onefold.files import read_tensors
from onefold.metrics.arrays import FeatureArray, as_matrix, check_same_width

KEY = "onefold.moments"


@dataclass(frozen=True)
class Moments:
    """First and second moments of n feature rows: all that the Fréchet distance needs to know of a data set.

    `mean` (d,) and `covariance` (d, d) are float64, the covariance with divisor n − 1. `extractor` is the
    SHA-256 of the feature extractor, or "" where it is not known.
    """

    mean: Tensor
    covariance: Tensor
    n: int
    extractor: str = ""

    @classmethod
    def from_features(cls, features: FeatureArray, extractor: str = "") -> "Moments":
        """Moments of features (n, d). Raises `UserError` for n < 2 or numbers that are not finite."""
        x = as_matrix(features, at_least=2)
        mean = x.mean(0)
        x -= mean
        return cls(mean, x.T @ x / (len(x) - 1), len(x), extractor)

    @property
    def too_few(self) -> bool:
        """Whether n < 2·d: too few rows for a covariance that can be trusted."""
        return self.n < 2 * len(self.mean)

    def save(self, path: str | Path) -> None:
        """Write the moments as safetensors: reference statistics of a data set, computed once."""
        about = json.dumps({"n": self.n, "extractor": self.extractor})
        save_file({"mean": self.mean, "covariance": self.covariance}, path, metadata={KEY: about})

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read what `save` wrote. Raises `UserError` if the file is missing or something else."""
        try:
            tensors, described = read_tensors(Path(path))
            about = json.loads(described[KEY])
            return cls(tensors["mean"], tensors["covariance"], about["n"], about["extractor"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; give what `onefold data stats` wrote") from None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            if isinstance(error, UserError):  # which knows what it is instead
                raise
            raise UserError(f"{path}: holds no moments; write them with `onefold data stats`") from None


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, ≥ 0.

    Raises `UserError` if the widths differ, or if both extractors are known and differ.
    """
    check_same_width(len(a.mean), len(b.mean))
    if a.extractor and b.extractor and a.extractor != b.extractor:
        cure = "give `onefold data stats` the run (--run), or both commands one file (--features)"
        raise UserError(f"moments: made by different feature extractors; {cure}")
    root_a = _root(a.covariance)
    middle = root_a @ b.covariance @ root_a
    trace_of_root = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    between_means = (a.mean - b.mean).square().sum()
    distance = between_means + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # below zero only by rounding


def frechet_distance(features_a: FeatureArray, features_b: FeatureArray) -> float:
    """Squared Fréchet distance between features (n, d) and (m, d), numpy or torch; in units of feature², ≥ 0.

    Raises `UserError` for fewer than 2 rows, unequal widths, or numbers that are not finite.
    """
    return frechet_from_moments(Moments.from_features(features_a), Moments.from_features(features_b))


def _root(covariance: Tensor) -> Tensor:
    """Symmetric root of a positive semi-definite matrix; rounding may leave eigenvalues just below zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
