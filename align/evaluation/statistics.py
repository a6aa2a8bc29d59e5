"""Scores with bootstrap confidence intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from align.registry import LazyModule

if TYPE_CHECKING:
    import numpy as np
else:
    np = LazyModule("numpy")  # a recipe's tasks are validated without it

RESAMPLES = 1000  # of the bootstrap (Efron 1979)
CONFIDENCE = 0.95


class Score(NamedTuple):
    """The value of a metric with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: int  # prompts


def score(grades: Sequence[float], counts: Sequence[float] | None = None, *, seed: int = 0) -> Score:
    """Return sum(grades) / sum(counts) with its 95 % percentile-bootstrap interval.

    Each element belongs to one prompt; `counts` are 1 by default. Prompts are resampled whole, so dependent values
    within a prompt do not narrow the interval.

    >>> score([1.0, 0.0, 1.0, 1.0]).value
    0.75
    >>> score([3.0, 1.0], [4, 2]).value
    0.6666666666666666
    """
    sums = np.asarray(grades, dtype=np.float64)
    sizes = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    assert len(sums) == len(sizes) > 0, "a score needs grades"

    def ratio(chosen: np.ndarray) -> float:
        return float(sums[chosen].sum() / sizes[chosen].sum())

    low, high = bootstrap_interval(ratio, len(sums), seed=seed)
    return Score(float(sums.sum() / sizes.sum()), low, high, len(sums))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], num_prompts: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over indices of prompts drawn with replacement."""
    rng = np.random.default_rng(seed)
    values = sorted(statistic(rng.integers(num_prompts, size=num_prompts)) for _ in range(resamples))
    tail = round(resamples * (1 - CONFIDENCE) / 2)
    return values[tail], values[-1 - tail]
