"""Whitening: a linear map after which the vectors have zero mean and the identity as covariance.

Shape legend: N texts, D width, K kept dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.curate.embeddings.cache import Vectors
from align.errors import InputError

# Eigenvalues below this share of the largest are dropped: dead dimensions of a model would be divided by zero
MIN_EIGENVALUE = 1e-6


class Whitening(NamedTuple):
    """The map x -> (x - mean) @ weights."""

    mean_D: NDArray[np.float64]
    weights_DK: NDArray[np.float64]

    def apply(self, vectors_ND: Vectors) -> Vectors:
        """Return the whitened vectors, fp32 [N, K]."""
        return ((vectors_ND - self.mean_D) @ self.weights_DK).astype(np.float32)


def fit_whitening(vectors_ND: Vectors, size: int | None = None) -> Whitening:
    """Return W = U Λ^(-1/2) of the covariance U Λ Uᵀ, its first `size` columns (Su et al. 2021, sec. 3).

    Columns are in descending order of eigenvalue, each with its largest entry positive. Eigenvalues under 1e-6 of the
    largest are dropped, so that K may be below `size`. The others are shrunk towards the mean of all (`shrinkage`), by
    nearly nothing for many rows. Raise `InputError` for fewer than two different vectors.
    """
    vectors = vectors_ND.astype(np.float64)
    mean_D = vectors.mean(axis=0)
    centred_ND = vectors - mean_D
    covariance_DD = centred_ND.T @ centred_ND / len(vectors)
    values, basis_DD = np.linalg.eigh(covariance_DD)
    if not values[-1] > 0:
        raise InputError(f"{len(vectors)} equal vectors cannot be whitened; give different texts")
    kept = np.flatnonzero(values > MIN_EIGENVALUE * values[-1])[::-1][:size]
    basis_DK = basis_DD[:, kept]
    signs_K = np.sign(basis_DK[np.abs(basis_DK).argmax(axis=0), np.arange(len(kept))])
    share = shrinkage(centred_ND, covariance_DD)
    shrunk_K = (1 - share) * values[kept] + share * values.mean()
    return Whitening(mean_D, basis_DK * signs_K / np.sqrt(shrunk_K))


def shrinkage(centred_ND: NDArray[np.float64], covariance_DD: NDArray[np.float64]) -> float:
    """Return the share s of the mean eigenvalue μ in a covariance (1 - s) S + s μ I (Ledoit and Wolf 2004, sec. 3).

    s = min(b², d²) / d², where d² = ‖S - μ I‖² and b² is the mean squared error of S that the rows' x xᵀ show.
    `sklearn.covariance.ledoit_wolf` computes the same.
    """
    num_rows, width = centred_ND.shape
    squared = float(np.sum(covariance_DD**2))
    distance = squared - float(np.trace(covariance_DD)) ** 2 / width
    error = (float(np.mean(np.sum(centred_ND**2, axis=1) ** 2)) - squared) / num_rows
    return min(error, distance) / distance if distance > 0 else 0.0
