"""The batch plan: groups to optimizer steps, ranks and micro-batches. It does not change results, only their cost."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import NamedTuple, Protocol, SupportsInt, TypeAlias

Indices: TypeAlias = "Sequence[int] | array[int]"
MIN_GAIN = 1.02  # one more micro-batch per rank must make the fullest rank lighter by this factor


class Sizes(Protocol):
    """Number of tokens of each group, by its index: a list or an array."""

    def __getitem__(self, group: int, /) -> SupportsInt:
        """Return the number of tokens of one group."""
        ...


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The groups of one optimizer step, and the micro-batches of each rank.

    All ranks have equally many micro-batches; an empty one adds nothing to the loss.
    """

    groups: tuple[int, ...]
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # [rank][micro-batch] -> group indices
    num_exits: int = 0  # micro-batches of each rank, the first ones, that take an early exit of the model


def order(num_groups: int, *, seed: int, epoch: int, name: str = "order") -> array[int]:
    """Return a permutation of the group indices that depends on (seed, name, epoch) only; four bytes per group.

    >>> sorted(order(4, seed=0, epoch=0))
    [0, 1, 2, 3]
    >>> order(4, seed=0, epoch=0) == order(4, seed=0, epoch=0)
    True
    """
    indices = array("I", range(num_groups))
    digest = hashlib.sha256(repr((seed, name, epoch)).encode()).digest()
    random.Random(digest).shuffle(indices)
    return indices


def steps_per_epoch(num_groups: int, prompts_per_step: int) -> int:
    """Return the number of optimizer steps of one epoch. The last step of an epoch may have fewer groups.

    >>> steps_per_epoch(10, 4)
    3
    """
    return -(-num_groups // prompts_per_step)


def groups_in_steps(num_steps: int, num_groups: int, prompts_per_step: int) -> int:
    """Return how many groups the first steps take together, each as often as it is taken.

    >>> groups_in_steps(4, 10, 4)
    14
    """
    epochs, steps = divmod(num_steps, steps_per_epoch(num_groups, prompts_per_step))
    return epochs * num_groups + min(num_groups, steps * prompts_per_step)


def groups_of_step(
    step: int,
    num_groups: int,
    prompts_per_step: int,
    *,
    seed: int = 0,
    epoch_of: Callable[[int], Indices] | None = None,
) -> tuple[int, ...]:
    """Return the group indices of optimizer step `step`, from 0. They do not depend on earlier steps.

    `epoch_of` returns the `num_groups` indices of an epoch, for example `Mixture.epoch`; the default is `order`.
    """
    epoch, within = divmod(step, steps_per_epoch(num_groups, prompts_per_step))
    indices = epoch_of(epoch) if epoch_of is not None else order(num_groups, seed=seed, epoch=epoch)
    return tuple(indices[within * prompts_per_step : (within + 1) * prompts_per_step])


def plan_step(groups: Indices, sizes: Sizes, *, token_budget: int, num_ranks: int = 1) -> StepPlan:
    """Assign groups to ranks with nearly equal tokens, in micro-batches of at most `token_budget` tokens.

    `sizes[group]` is the number of tokens of a group. All ranks get equally many micro-batches. A group larger than the
    budget is a micro-batch without others.

    >>> plan_step([0, 1, 2], [60, 30, 30], token_budget=64, num_ranks=2).ranks
    (((0,),), ((1, 2),))
    """
    largest_first = sorted((-int(sizes[group]), group) for group in groups)
    tokens = sum(min(-size, token_budget) for size, _ in largest_first)
    max_rounds = -(-len(largest_first) // num_ranks)  # with one group per micro-batch
    rounds = min(max_rounds, -(-tokens // (token_budget * num_ranks)))
    while (found := _assign(largest_first, rounds, num_ranks=num_ranks, token_budget=token_budget)) is None:
        rounds = min(max_rounds, rounds + max(1, rounds // 32))  # a large plan needs more than one round at a time
    if found.is_tight and rounds < max_rounds:
        wider = _assign(largest_first, rounds + 1, num_ranks=num_ranks, token_budget=token_budget)
        found = wider if wider is not None and wider.max_tokens * MIN_GAIN < found.max_tokens else found
    return StepPlan(tuple(groups), found.ranks)


class _Assignment(NamedTuple):
    ranks: tuple[tuple[tuple[int, ...], ...], ...]  # micro-batches of each rank, fullest first
    max_tokens: int  # of a rank
    is_tight: bool  # whether a group did not fit on the rank with the fewest tokens


def _assign(
    largest_first: Sequence[tuple[int, int]], rounds: int, *, num_ranks: int, token_budget: int
) -> _Assignment | None:
    """Assign the (negative size, group) pairs to `rounds` micro-batches per rank, or return None if they do not fit.

    Largest first, each group goes to the rank with the fewest tokens, and there to the emptiest micro-batch: longest
    processing time first, twice (Graham 1969). A rank without room for a group waits for a group that fits.
    """
    micros = [[list[int]() for _ in range(rounds)] for _ in range(num_ranks)]
    filled = [[(0, micro) for micro in range(rounds)] for _ in range(num_ranks)]  # per rank, a heap of (tokens, micro)
    ready = [(0, rank) for rank in range(num_ranks)]  # a heap of (tokens, rank)
    waiting: list[tuple[int, int, int]] = []  # a heap of (negative room, tokens, rank)
    is_tight = False
    for negative_size, group in largest_first:
        while waiting and waiting[0][0] <= negative_size:
            heappush(ready, heappop(waiting)[1:])
        while ready:
            load, rank = ready[0]
            tokens, micro = filled[rank][0]
            if tokens == 0 or tokens - negative_size <= token_budget:
                break
            heappop(ready)
            heappush(waiting, (tokens - token_budget, load, rank))
            is_tight = True
        else:
            return None
        micros[rank][micro].append(group)
        heapreplace(filled[rank], (tokens - negative_size, micro))
        heapreplace(ready, (load - negative_size, rank))
    ranks = tuple(
        tuple(tuple(sorted(micros[rank][micro])) for _, micro in sorted(filled[rank], key=_fullest_first))
        for rank in range(num_ranks)
    )
    return _Assignment(ranks, max(load for *_, load, _ in (*ready, *waiting)), is_tight)


def _fullest_first(filled: tuple[int, int]) -> tuple[int, int]:
    tokens, micro = filled
    return -tokens, micro
