"""A weighted mixture of sources: which row of which source comes when, as a function of the epoch alone."""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from align.data.batching import order
from align.errors import InputError

# What happens when a source has given all its rows: the epoch ends with the first that runs out (stop); it ends with
# the last and the others begin anew (repeat); it ends with the last and what is left takes the place of what ran out,
# each row once (down_weight).
StoppingStrategy = Literal["first_exhausted", "all_exhausted", "down_weight"]

ALMOST = 1e-9  # of rounding, where a number of rows is a quotient


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sources side by side: a row is known by its index in all of them together, in the order of the sources."""

    sizes: tuple[int, ...]  # rows of each source
    shares: tuple[float, ...]  # of each source in an epoch; 1 in all
    stopping_strategy: StoppingStrategy = "first_exhausted"
    seed: int = 0
    replayed: int = 0  # how many of the last sources are replayed: they do not decide how long an epoch is

    def __post_init__(self) -> None:
        if any(share <= 0 for share in self.shares) or not math.isclose(sum(self.shares), 1):
            raise InputError(f"the shares of a mixture are above 0 and 1 in all, not {self.shares}")
        if not all(self.sizes):
            raise InputError(f"a mixture of {self.sizes} rows: each source needs one at least")

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        own = slice(len(self.sizes) - self.replayed)
        lasts = [size / share for size, share in zip(self.sizes[own], self.shares[own], strict=True)]
        if self.stopping_strategy == "first_exhausted":
            return math.floor(min(lasts) + ALMOST)
        if self.stopping_strategy == "all_exhausted":
            return math.ceil(max(lasts) - ALMOST)
        return round(sum(self.sizes[own]) / sum(self.shares[own]))

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each source in an epoch: its share to within one row; down-weighted, all rows of the step's own."""
        if self.stopping_strategy == "down_weight":
            own = self.sizes[: len(self.sizes) - self.replayed]
            return *own, *_apportioned(self.num_rows - sum(own), self.shares[len(own) :])
        return _apportioned(self.num_rows, self.shares)

    def epoch(self, number: int) -> array[int]:
        """The rows of an epoch in their order, every source spread evenly over as much of it as its share asks."""
        quotas, starts = self.quotas, [sum(self.sizes[:source]) for source in range(len(self.sizes))]
        weights = self.shares if self.stopping_strategy == "down_weight" else quotas
        digest = hashlib.sha256(repr((self.seed, "mixture", number)).encode()).digest()
        draw = random.Random(digest)
        # Stride scheduling (Waldspurger & Weihl 1995): who is due first gives the next row.
        due = [(draw.random() / weight, source, 0) for source, weight in enumerate(weights) if quotas[source]]
        heapq.heapify(due)
        rows = [self._stream(source, number * quota, quota) for source, quota in enumerate(quotas)]
        found = array("I")
        while due:
            at, source, given = heapq.heappop(due)
            found.append(starts[source] + rows[source][given])
            if given + 1 < quotas[source]:
                heapq.heappush(due, (at + 1 / weights[source], source, given + 1))
        return found

    def _stream(self, source: int, start: int, number: int) -> array[int]:
        """Rows of one source from place `start` of its passes, each of which is a permutation of its own."""
        size, found = self.sizes[source], array("I")
        for passed in range(start // size, -(-(start + number) // size)):
            found += order(size, seed=self.seed, epoch=passed, place=f"source {source}")
        first = start % size
        return found[first : first + number]


def _apportioned(number: int, shares: Sequence[float]) -> tuple[int, ...]:
    """The number in parts as near to the shares as whole numbers can be: largest remainders."""
    exact = [share * number / sum(shares) for share in shares]
    whole = [math.floor(each + ALMOST) for each in exact]
    left = sorted(range(len(exact)), key=lambda source: whole[source] - exact[source])
    for source in left[: number - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


def shares_of(weights: Mapping[str, float], replay: Mapping[str, float], share: float) -> dict[str, float]:
    """Each source's share of an epoch, of which replayed sources have `share` in all; errors name the step's keys."""
    for name, weight in (*weights.items(), *replay.items()):
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"the weight is {weight}; a number above 0 is needed", ("data", name))
    if both := sorted(weights.keys() & replay.keys()):
        raise InputError(
            f"{both[0]!r} is one of the step's own sources, and cannot be replayed beside itself", ("replay",)
        )
    own = {name: (1 - share) * weight / sum(weights.values()) for name, weight in weights.items()}
    return own | {name: share * weight / sum(replay.values()) for name, weight in replay.items()}


def told(mixture: Mixture, names: Sequence[str]) -> str:
    """The mixture in one line."""
    parts = zip(names, mixture.quotas, mixture.sizes, strict=True)
    rows = ", ".join(f"{quota:,} of {size:,} rows of {name}" for name, quota, size in parts)
    return f"an epoch of {mixture.num_rows:,} rows: {rows} ({mixture.stopping_strategy} when a source runs out)"
