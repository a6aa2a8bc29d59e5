"""How evenly optimizer steps are divided among ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from align.data.batching import Indices, Sizes, StepPlan, plan_step


@dataclass(frozen=True, slots=True)
class Balance:
    """Imbalance of some optimizer steps: tokens of the fullest rank over the mean of all ranks; 1.0 is even."""

    num_ranks: int
    mean: float
    worst: float
    lower_bound: float  # mean over the steps of `min_imbalance`


def imbalance(plan: StepPlan, sizes: Sizes) -> float:
    """Return the tokens of the fullest rank over the mean of all ranks; 1.0 is even.

    >>> imbalance(plan_step([0, 1], [60, 30], token_budget=64, num_ranks=2), [60, 30])
    1.3333333333333333
    """
    loads = [sum(int(sizes[group]) for micro in rank for group in micro) for rank in plan.ranks]
    return max(loads) * len(loads) / max(1, sum(loads))


def min_imbalance(groups: Indices, sizes: Sizes, *, num_ranks: int) -> float:
    """Return a lower bound of the imbalance of any plan of these groups.

    One rank has the largest group, and of the `num_ranks + 1` largest groups one rank has two.
    """
    largest_first = sorted((int(sizes[group]) for group in groups), reverse=True)
    two = sum(largest_first[num_ranks - 1 : num_ranks + 1]) if len(largest_first) > num_ranks else 0
    mean = sum(largest_first) / num_ranks
    return max(largest_first[0], two, mean) / max(1, mean)


def balance(steps: Iterable[Indices], sizes: Sizes, *, token_budget: int, num_ranks: int) -> Balance:
    """Return the imbalance of the plans of these steps."""
    found, bounds = list[float](), list[float]()
    for groups in steps:
        found.append(imbalance(plan_step(groups, sizes, token_budget=token_budget, num_ranks=num_ranks), sizes))
        bounds.append(min_imbalance(groups, sizes, num_ranks=num_ranks))
    return Balance(num_ranks, sum(found) / len(found), max(found), sum(bounds) / len(bounds))
