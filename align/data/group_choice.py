"""Which of the responses to a prompt are trained on, by their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

REJECTED_SIGMAS = 2.0  # below the mean; Xiao et al. 2025 (arXiv 2502.16825): the minimum gets worse with more responses


def most_variance(rewards: Sequence[float], number: int) -> list[int]:
    """Return the indices of the `number` responses whose rewards have the most variance, best first.

    These are the i best and the `number` - i worst for some i, since the variance is convex in each reward (PODS,
    arXiv 2504.13818). Of equal variances the most of the best ones are taken, and equal rewards keep their order.

    >>> most_variance([0.5, 0.9, 0.1, 1.0], 3)
    [3, 1, 2]
    """
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    if len(order) <= number:
        return order
    choices = [[*order[:best], *order[len(order) - number + best :]] for best in range(number, -1, -1)]
    return max(choices, key=lambda chosen: pstdev([rewards[index] for index in chosen]))


def best_and_low(rewards: Sequence[float]) -> list[int]:
    """Return the indices of the best response, and of the one whose reward is closest to two deviations below the mean.

    Mean and standard deviation are those of the group (Xiao et al. 2025, arXiv 2502.16825). Raise `ValueError` for
    fewer than two responses.

    >>> best_and_low([0.0, 0.8, 0.9, 1.0, 0.7, 0.85, 0.95])
    [3, 0]
    """
    if len(rewards) < 2:
        raise ValueError(f"a pair needs two responses, not {len(rewards)}")
    best = max(range(len(rewards)), key=lambda index: rewards[index])
    aim = fmean(rewards) - REJECTED_SIGMAS * pstdev(rewards)
    others = (index for index in range(len(rewards)) if index != best)
    return [best, min(others, key=lambda index: (abs(rewards[index] - aim), rewards[index]))]
