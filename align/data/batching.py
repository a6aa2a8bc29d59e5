"""The batch plan: groups to optimizer steps to micro-batches to ranks. It decides how things are computed, not what."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: its groups, and each rank's micro-batches, equally many (an empty one computes nothing)."""

    groups: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> group indices


def order(num_groups: int, *, seed: int, epoch: int, place: str = "order") -> list[int]:
    """A permutation of the groups that depends on (seed, place, epoch) only."""
    indices = list(range(num_groups))
    digest = hashlib.sha256(repr((seed, place, epoch)).encode()).digest()
    random.Random(digest).shuffle(indices)
    return indices


def steps_per_epoch(num_groups: int, groups_per_step: int) -> int:
    """Optimizer steps of one epoch; the last takes what is left."""
    return -(-num_groups // groups_per_step)


def groups_of_step(
    step: int,
    num_groups: int,
    groups_per_step: int,
    *,
    seed: int = 0,
    epoch_of: Callable[[int], Sequence[int]] | None = None,
) -> tuple[int, ...]:
    """The groups of optimizer step `step` (from 0), whatever was computed before it.

    An epoch is the permutation of `order`, or `num_groups` indices as `epoch_of` gives them, a mixture's for example.
    """
    epoch, within = divmod(step, steps_per_epoch(num_groups, groups_per_step))
    indices = epoch_of(epoch) if epoch_of is not None else order(num_groups, seed=seed, epoch=epoch)
    return tuple(indices[within * groups_per_step : (within + 1) * groups_per_step])


def plan_step(groups: Sequence[int], sizes: Sequence[int], *, token_budget: int, num_ranks: int = 1) -> StepPlan:
    """The groups cut into micro-batches of at most `token_budget` tokens and dealt to ranks with nearly equal tokens.

    `sizes[group]` is a group's number of tokens. Every rank gets the same number of micro-batches. A group larger than
    the budget makes a micro-batch of its own.
    """
    tokens = sum(min(sizes[group], token_budget) for group in groups)
    most = -(-len(groups) // num_ranks)  # then every group is alone
    rounds = min(most, -(-tokens // (token_budget * num_ranks)))
    while True:
        bins = _deal(groups, sizes, rounds * num_ranks)
        if all(len(each) <= 1 or sum(sizes[group] for group in each) <= token_budget for each in bins):
            break
        rounds = min(most, rounds + max(1, rounds // 32))  # a large plan is not tried one round at a time
    # Full bins and empty ones alternate over the ranks: the r-th largest bin goes to the rank with the least so far.
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for start in range(0, len(bins), num_ranks):
        loads.sort()
        dealt: list[tuple[int, int]] = []
        for (load, rank), each in zip(loads, bins[start : start + num_ranks], strict=True):
            shares[rank].append(each)
            dealt.append((load + sum(sizes[group] for group in each), rank))
        loads = dealt
    return StepPlan(tuple(groups), tuple(tuple(share) for share in shares))


def imbalance(plan: StepPlan, sizes: Sequence[int]) -> float:
    """Largest over mean number of tokens of a rank; 1.0 is perfect."""
    loads = [sum(sizes[group] for micro in share for group in micro) for share in plan.ranks]
    return max(loads) * len(loads) / max(1, sum(loads))


def _deal(groups: Sequence[int], sizes: Sequence[int], num_bins: int) -> list[tuple[int, ...]]:
    """Largest first, each into the emptiest bin (Graham 1969, LPT); bins from the fullest to the emptiest."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for group in sorted(groups, key=lambda group: (-sizes[group], group)):
        load, index = heapq.heappop(heap)
        bins[index].append(group)
        heapq.heappush(heap, (load + sizes[group], index))
    loads = {index: load for load, index in heap}
    return [tuple(sorted(bins[index])) for index in sorted(loads, key=lambda index: (-loads[index], index))]
