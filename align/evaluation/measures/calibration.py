"""Calibration: whether a confidence is as high as the share of right decisions that are made with it."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import TYPE_CHECKING

from align.evaluation.statistics import Score, bootstrap_interval
from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

NUM_BINS = 10  # of equal width, from 0.5 to 1; a decision between two is never less confident


def confidence(lead: float) -> float:
    """Return the confidence of a decision between two, given the difference of their log-probabilities or rewards.

    It is max(p, 1 - p) with p = 1 / (1 + exp(-lead)), the Bradley-Terry probability.

    >>> confidence(0.0), round(confidence(-2.0), 3)
    (0.5, 0.881)
    """
    return 1 / (1 + exp(-abs(lead)))


def calibration_error(confidences: Sequence[float], right: Sequence[float]) -> Score:
    """Return the expected calibration error with its interval over decisions (Guo et al. 2017, eq. 3).

    It is the mean over bins of |share that is right - mean confidence|, weighted by the decisions of a bin. Few
    decisions in a bin raise it: it is positive for a calibrated judge, too.

    >>> calibration_error([0.75] * 4, [1, 1, 1, 0]).value
    0.0
    """
    values, outcomes = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    bins = np.minimum(((values - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)

    def error(chosen: np.ndarray) -> float:
        gaps = np.bincount(bins[chosen], weights=outcomes[chosen] - values[chosen], minlength=NUM_BINS)
        return float(np.abs(gaps).sum() / len(chosen))

    low, high = bootstrap_interval(error, len(values))
    return Score(error(np.arange(len(values))), low, high, len(values))
