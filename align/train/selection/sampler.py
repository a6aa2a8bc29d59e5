"""Joint example selection: sample the rows to train on from a larger batch by their scores and pairwise couplings.

Evans et al. 2024, "Data curation via joint example selection further accelerates multimodal learning" (JEST,
arXiv:2406.17711), algorithm 1. Shape legend: B rows of the super-batch, b rows chosen, N chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.errors import InputError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Chosen(NamedTuple):
    """The chosen rows in the order of choice."""

    rows_b: Indices  # positions in the super-batch
    scores_b: Floats  # conditional score of each when it was chosen


def select(
    scores_B: Floats,
    coupling_BB: Floats | None = None,
    *,
    size: int,
    chunks: int = 1,
    gain: float | None = None,
    noise_NB: Floats | None = None,
) -> Chosen:
    """Choose `size` rows without replacement, in `chunks` nearly equal parts.

    The conditional score of a row given the chosen rows C is scores_i + sum over j in C of coupling_ij + coupling_ji.
    Each chunk samples rows with probability proportional to exp(gain * conditional score), which is done exactly by
    taking the largest values of gain * score + Gumbel noise (Kool et al. 2019, arXiv:1903.06059). `noise_NB` holds the
    noise of each chunk (`gumbel_noise`). Without a gain each chunk takes the rows with the highest scores, the first
    among equals. The diagonal of `coupling_BB` is not read; without couplings the rows are independent, and neither the
    distribution of the chosen set nor, without a gain, the set itself depends on `chunks`.

    Raises `InputError` if there are not enough rows, or fewer rows to choose than chunks.
    """
    if not 1 <= chunks <= size <= len(scores_B):
        raise InputError(
            f"cannot choose {size} of {len(scores_B)} rows in {chunks} chunks: use at most {len(scores_B)} rows and at "
            "most one chunk for each row chosen"
        )
    scores_B = np.array(scores_B, np.float64)  # a copy: it becomes the conditional scores
    is_free_B = np.ones(len(scores_B), np.bool_)
    pairs_BB = None if coupling_BB is None else coupling_BB + coupling_BB.T
    rows = list[Indices]()
    values = list[Floats]()
    for chunk in range(chunks):
        number = size // chunks + (chunk < size % chunks)
        keys_B = scores_B if gain is None else gain * scores_B + _noise(noise_NB, chunk)
        chosen = np.argsort(np.where(is_free_B, -keys_B, np.inf), kind="stable")[:number]
        rows.append(chosen)
        values.append(scores_B[chosen])
        is_free_B[chosen] = False
        if pairs_BB is not None:
            scores_B += pairs_BB[:, chosen].sum(axis=1)
    return Chosen(np.concatenate(rows), np.concatenate(values))


def _noise(noise_NB: Floats | None, chunk: int) -> Floats:
    assert noise_NB is not None, "a finite gain needs the noise of each chunk"
    return noise_NB[chunk]


def gumbel_noise(seed: int, step: int, groups: Sequence[int], chunks: int) -> Floats:
    """Return Gumbel noise for each chunk and group, shape [N, B].

    It depends on (seed, step, chunk, group) only, and for a group that occurs several times on the number of the
    occurrence, so that each of them is drawn independently.
    """
    group_B = np.asarray(groups, np.uint64)
    occurrence_B = _occurrences(group_B)
    keys = [hashlib.sha256(repr((seed, "selection", step, chunk)).encode()).digest()[:8] for chunk in range(chunks)]
    key_N1 = np.array([int.from_bytes(key, "little") for key in keys], np.uint64)[:, None]
    raw_NB = _mixed(_mixed(group_B + np.uint64(1))[None] ^ key_N1)
    raw_NB = np.where(occurrence_B > 0, _mixed(raw_NB + occurrence_B), raw_NB)
    uniform_NB = ((raw_NB >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform_NB))


def _occurrences(values_B: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return how often each value occurs before its position."""
    order = np.argsort(values_B, kind="stable")
    _, starts, counts = np.unique(values_B[order], return_index=True, return_counts=True)
    found_B = np.empty(len(values_B), np.uint64)
    found_B[order] = np.arange(len(values_B)) - np.repeat(starts, counts)
    return found_B


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's hash of each value (Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def effective_sample_size(scores_B: Floats, gain: float) -> float:
    """Return Kish's effective sample size, (sum w)^2 / sum w^2, of the first draw's weights exp(gain * score).

    >>> effective_sample_size(np.zeros(8), gain=1.0)
    8.0
    """
    weights_B = np.exp(gain * (scores_B - scores_B.max()))
    return float(weights_B.sum() ** 2 / np.square(weights_B).sum())
