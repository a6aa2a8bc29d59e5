"""Diversity of embeddings of unit length: Vendi score, distances, and their two main axes.

Shape legend: N texts, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.synth.measures.hashed_words import Vectors

BLOCK = 1024  # rows whose similarities to all others are in memory at once


def vendi_score(vectors_ND: Vectors, *, q: float = 1.0) -> float:
    """Return the effective number of different texts, from 1 (all the same) to N (all orthogonal).

    exp of the Rényi entropy of order `q` of the eigenvalues λ of XXᵀ/N: exp(−Σ λ log λ) for q = 1 (Friedman and Dieng
    2023), exp(log(Σ λ^q) / (1 − q)) else (Pasarkar and Dieng 2024), 1 / max λ for q = inf. For D < N the eigenvalues
    are those of XᵀX/N. The score depends on N: compare scores of equally many texts.
    """
    if not q > 0:
        raise ValueError(f"q is {q}; an order above 0 is needed")
    num_texts, width = vectors_ND.shape
    products = vectors_ND.T @ vectors_ND if width < num_texts else vectors_ND @ vectors_ND.T
    values = np.clip(np.linalg.eigvalsh(products / num_texts), 0, None)
    values = values[values > 0] / values.sum()  # the sum is 1 but for rounding
    if q == 1:
        return float(np.exp(-(values * np.log(values)).sum()))
    if math.isinf(q):
        return float(1 / values.max())
    return float((values**q).sum() ** (1 / (1 - q)))


def mean_distance(vectors_ND: Vectors) -> float:
    """Return the mean of 1 − cosine over all pairs of different texts, in O(N·D): N/(N−1) · (1 − ‖mean‖²)."""
    num_texts = len(vectors_ND)
    mean_D = vectors_ND.mean(axis=0)
    return float(num_texts / (num_texts - 1) * (1 - mean_D @ mean_D))


def nearest_distance(vectors_ND: Vectors) -> float:
    """Return the mean over texts of 1 − cosine to the nearest other text, in O(N²·D)."""
    nearest: list[NDArray[np.float64]] = []
    for start in range(0, len(vectors_ND), BLOCK):
        similar = vectors_ND[start : start + BLOCK] @ vectors_ND.T
        rows = np.arange(len(similar))
        similar[rows, start + rows] = -np.inf
        nearest.append(1 - similar.max(axis=1))
    return float(np.concatenate(nearest).mean())


class MainAxes(NamedTuple):
    """Coordinates along the two directions of the largest variance."""

    points_N2: NDArray[np.float64]
    explained: tuple[float, float]  # share of the variance along each


def main_axes(vectors_ND: Vectors) -> MainAxes:
    """Return a principal component analysis in two dimensions; the largest coefficient of each axis is positive."""
    centered = vectors_ND - vectors_ND.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centered, full_matrices=False)
    total = float((sizes**2).sum())
    points = np.zeros((len(vectors_ND), 2))
    explained = [0.0, 0.0]
    for number, (size, axis) in enumerate(zip(sizes[:2], axes[:2], strict=True)):
        sign = np.sign(axis[np.abs(axis).argmax()])
        points[:, number] = centered @ axis * sign
        explained[number] = float(size**2) / total if total else 0.0
    return MainAxes(points, (explained[0], explained[1]))
