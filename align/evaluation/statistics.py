"""Rates with their bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000  # of the bootstrap (Efron 1979)
LEVEL = 0.95


class Score(NamedTuple):
    """A rate with its bootstrap interval over prompts."""

    value: float
    low: float
    high: float
    n: int  # prompts


def score(grades: Sequence[float], counts: Sequence[float] | None = None, *, seed: int = 0) -> Score:
    """Sum of the grades over sum of the counts (1 each where left out), with its 95 % percentile interval.

    Each place belongs to one prompt; prompts are resampled whole, so that what hangs together stays together.
    """
    totals = np.asarray(grades, dtype=np.float64)
    parts = np.ones_like(totals) if counts is None else np.asarray(counts, dtype=np.float64)
    assert len(totals) == len(parts) > 0, "a score needs grades"

    def rate(chosen: np.ndarray) -> float:
        return float(totals[chosen].sum() / parts[chosen].sum())

    low, high = interval(rate, len(totals), seed=seed)
    return Score(float(totals.sum() / parts.sum()), low, high, len(totals))


def interval(
    statistic: Callable[[np.ndarray], float], num_prompts: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of the indices of prompts that are drawn with replacement."""
    draw = np.random.default_rng(seed)
    values = sorted(statistic(draw.integers(num_prompts, size=num_prompts)) for _ in range(resamples))
    tail = round(resamples * (1 - LEVEL) / 2)
    return values[tail], values[-1 - tail]
