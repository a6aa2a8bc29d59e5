"""The batch plan: groups to optimizer steps to ranks to micro-batches. It decides how things are computed, not what."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import NamedTuple, Protocol, SupportsInt, TypeAlias

Indices: TypeAlias = "Sequence[int] | array[int]"
WORTH = 1.02  # by this much the fullest rank has to become lighter for all ranks to run one micro-batch more


class Sizes(Protocol):
    """Tokens of each group, by its index: a list or a column of numbers."""

    def __getitem__(self, group: int, /) -> SupportsInt:
        """The tokens of one group."""
        ...


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step: its groups, and each rank's micro-batches, equally many (an empty one computes nothing)."""

    groups: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> group indices


def order(num_groups: int, *, seed: int, epoch: int, place: str = "order") -> array[int]:
    """A permutation of the groups that depends on (seed, place, epoch) only, in four bytes a group."""
    indices = array("I", range(num_groups))
    digest = hashlib.sha256(repr((seed, place, epoch)).encode()).digest()
    random.Random(digest).shuffle(indices)
    return indices


def steps_per_epoch(num_groups: int, prompts_per_step: int) -> int:
    """Optimizer steps of one epoch; the last takes what is left."""
    return -(-num_groups // prompts_per_step)


def groups_of_step(
    step: int,
    num_groups: int,
    prompts_per_step: int,
    *,
    seed: int = 0,
    epoch_of: Callable[[int], Indices] | None = None,
) -> tuple[int, ...]:
    """The groups of optimizer step `step` (from 0), whatever was computed before it.

    An epoch is the permutation of `order`, or `num_groups` indices as `epoch_of` gives them, a mixture's for example.
    """
    epoch, within = divmod(step, steps_per_epoch(num_groups, prompts_per_step))
    indices = epoch_of(epoch) if epoch_of is not None else order(num_groups, seed=seed, epoch=epoch)
    return tuple(indices[within * prompts_per_step : (within + 1) * prompts_per_step])


def plan_step(groups: Indices, sizes: Sizes, *, token_budget: int, num_ranks: int = 1) -> StepPlan:
    """The groups dealt to ranks with nearly equal tokens, and cut into micro-batches of at most `token_budget` tokens.

    `sizes[group]` is a group's number of tokens. Every rank gets the same number of micro-batches. A group larger than
    the budget makes a micro-batch of its own.
    """
    falling = sorted((-int(sizes[group]), group) for group in groups)
    tokens = sum(min(-size, token_budget) for size, _ in falling)
    most = -(-len(falling) // num_ranks)  # then every group is alone
    rounds = min(most, -(-tokens // (token_budget * num_ranks)))
    while (deal := _deal(falling, rounds, num_ranks=num_ranks, token_budget=token_budget)) is None:
        rounds = min(most, rounds + max(1, rounds // 32))  # a large plan is not tried one round at a time
    if deal.is_tight and rounds < most:
        wider = _deal(falling, rounds + 1, num_ranks=num_ranks, token_budget=token_budget)
        deal = wider if wider is not None and wider.largest * WORTH < deal.largest else deal
    return StepPlan(tuple(groups), deal.ranks)


def imbalance(plan: StepPlan, sizes: Sizes) -> float:
    """Largest over mean number of tokens of a rank; 1.0 is perfect."""
    loads = [sum(int(sizes[group]) for micro in share for group in micro) for share in plan.ranks]
    return max(loads) * len(loads) / max(1, sum(loads))


def least_imbalance(groups: Indices, sizes: Sizes, *, num_ranks: int) -> float:
    """What no plan of these groups can be below: somebody has the largest, and of ranks + 1 groups somebody has two."""
    falling = sorted((int(sizes[group]) for group in groups), reverse=True)
    two = sum(falling[num_ranks - 1 : num_ranks + 1]) if len(falling) > num_ranks else 0
    mean = sum(falling) / num_ranks
    return max(falling[0], two, mean) / max(1, mean)


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly some steps are dealt to a number of ranks: imbalances, each 1.0 where all ranks get the same."""

    num_ranks: int
    mean: float
    worst: float
    least: float  # mean of what no plan of these steps could be below


def balance(steps: Iterable[Indices], sizes: Sizes, *, token_budget: int, num_ranks: int) -> Balance:
    """How evenly the steps' groups are dealt."""
    found, least = list[float](), list[float]()
    for groups in steps:
        found.append(imbalance(plan_step(groups, sizes, token_budget=token_budget, num_ranks=num_ranks), sizes))
        least.append(least_imbalance(groups, sizes, num_ranks=num_ranks))
    return Balance(num_ranks, sum(found) / len(found), max(found), sum(least) / len(least))


class _Deal(NamedTuple):
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # micro-batches of each, from the fullest to the emptiest
    largest: int  # tokens of a rank
    is_tight: bool  # whether some group did not fit where it should have gone


def _deal(falling: Sequence[tuple[int, int]], rounds: int, *, num_ranks: int, token_budget: int) -> _Deal | None:
    """The groups in `rounds` micro-batches a rank; None if so few cannot hold them.

    Largest first, each group to the rank with the least so far, into the emptiest of its micro-batches (Graham 1969,
    LPT, twice). A rank that has no room for a group waits until one comes that it has room for.
    """
    micros = [[list[int]() for _ in range(rounds)] for _ in range(num_ranks)]
    filled = [[(0, micro) for micro in range(rounds)] for _ in range(num_ranks)]  # a heap for each rank
    ready = [(0, rank) for rank in range(num_ranks)]  # a heap of (tokens, rank)
    waiting: list[tuple[int, int, int]] = []  # a heap of (less its room, tokens, rank)
    is_tight = False
    for less_size, group in falling:
        while waiting and waiting[0][0] <= less_size:
            heappush(ready, heappop(waiting)[1:])
        while ready:
            load, rank = ready[0]
            held, micro = filled[rank][0]
            if held == 0 or held - less_size <= token_budget:
                break
            heappop(ready)
            heappush(waiting, (held - token_budget, load, rank))
            is_tight = True
        else:
            return None
        micros[rank][micro].append(group)
        heapreplace(filled[rank], (held - less_size, micro))
        heapreplace(ready, (load - less_size, rank))
    ranks = tuple(
        tuple(tuple(sorted(micros[rank][micro])) for _, micro in sorted(filled[rank], key=_fullest_first))
        for rank in range(num_ranks)
    )
    return _Deal(ranks, max(load for *_, load, _ in (*ready, *waiting)), is_tight)


def _fullest_first(filled: tuple[int, int]) -> tuple[int, int]:
    held, micro = filled
    return -held, micro
