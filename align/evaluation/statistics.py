"""Scores with bootstrap confidence intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    within a prompt do not narrow the interval. Counts that add up to 0 give 0.

    >>> score([1.0, 0.0, 1.0, 1.0]).value
    0.75
    >>> score([3.0, 1.0], [4, 2]).value
    0.6666666666666666
    """
    sums = np.asarray(grades, dtype=np.float64)
    sizes = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    assert len(sums) == len(sizes) > 0, "a score needs grades"

    def of_chosen(chosen: np.ndarray) -> float:
        return ratio(float(sums[chosen].sum()), float(sizes[chosen].sum()))

    low, high = bootstrap_interval(of_chosen, len(sums), seed=seed)
    return Score(ratio(float(sums.sum()), float(sizes.sum())), low, high, len(sums))


def ratio(total: float, count: float) -> float:
    """Return total / count, and 0 for 0 / 0, as a precision is where nothing is predicted."""
    return total / count if count else 0.0


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], num_prompts: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over indices of prompts drawn with replacement.

    Draws for which the statistic is not defined (NaN) are left out.
    """
    rng = np.random.default_rng(seed)
    found = (statistic(rng.integers(num_prompts, size=num_prompts)) for _ in range(resamples))
    return _percentiles(sorted(value for value in found if not math.isnan(value)))


def stratified_score(
    values: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None, *, seed: int = 0
) -> Score:
    """Return the weighted mean of the strata's means, with its 95 % interval by a bootstrap within each stratum.

    `values` holds one value per prompt, by stratum. A stratum weighs as much as it has prompts by default, which makes
    the value the plain mean of all prompts. Prompts are resampled within their stratum, so that the interval does not
    contain the differences between strata, whose sizes are fixed by the benchmark. Strata of one prompt each, which do
    not show how much their prompts differ, are resampled together.

    >>> stratified_score({"easy": [1.0, 1.0], "hard": [0.0]}, {"easy": 1, "hard": 1}).value
    0.5
    """
    assert values and all(values.values()), "a stratum needs values"
    rng = np.random.default_rng(seed)
    total = sum(len(each) if weights is None else weights[name] for name, each in values.items())
    value = 0.0
    resampled = np.zeros(RESAMPLES)
    alone: list[tuple[float, float]] = []  # (share, value) of strata of one prompt
    for name, each in values.items():
        share = (len(each) if weights is None else weights[name]) / total
        own = np.asarray(each, dtype=np.float64)
        value += share * float(own.mean())
        if len(own) == 1:
            alone.append((share, float(own[0])))
            continue
        resampled += share * own[rng.integers(len(own), size=(RESAMPLES, len(own)))].mean(axis=1)
    if alone:
        share_S, own_S = np.array(alone).T
        chosen = own_S[rng.integers(len(own_S), size=(RESAMPLES, len(own_S)))].mean(axis=1)
        resampled += share_S @ own_S + share_S.sum() * (chosen - own_S.mean())
    low, high = _percentiles(sorted(resampled.tolist()))
    return Score(value, low, high, sum(map(len, values.values())))


def _percentiles(ordered: Sequence[float]) -> tuple[float, float]:
    tail = round(len(ordered) * (1 - CONFIDENCE) / 2)
    return ordered[tail], ordered[-1 - tail]
