"""Weighted mixtures of sources: the rows of every epoch, in order, as a function of the epoch's number."""

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

# When an epoch ends. first_exhausted: with the first source that runs out. all_exhausted: with the last; the others
# start again. down_weight: with the last; the remaining sources take the place of one that runs out, each row once.
StoppingStrategy = Literal["first_exhausted", "all_exhausted", "down_weight"]

ROUNDING = 1e-9  # tolerance for a number of rows that is a quotient


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several sources in fixed shares. A row's index counts the rows of all sources, one source after another.

    `sizes` are the rows of each source, `shares` the share of each in an epoch, which must sum to 1. The last
    `num_replayed` sources are replayed: they do not affect the length of an epoch. Raise `InputError` for a share that
    is not positive, and for a source without rows.

    >>> mixture = Mixture(sizes=(60, 40), shares=(0.75, 0.25))
    >>> mixture.num_rows, mixture.quotas
    (80, (60, 20))
    >>> epoch = mixture.epoch(0)
    >>> sum(row < 60 for row in epoch), sum(row >= 60 for row in epoch)
    (60, 20)
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    stopping_strategy: StoppingStrategy = "first_exhausted"
    seed: int = 0
    num_replayed: int = 0

    def __post_init__(self) -> None:
        if any(share <= 0 for share in self.shares) or not math.isclose(sum(self.shares), 1):
            raise InputError(f"the shares of a mixture must be above 0 and sum to 1, not {self.shares}")
        if not all(self.sizes):
            raise InputError(f"the sources of a mixture have {self.sizes} rows; each needs at least one")

    @property
    def num_rows(self) -> int:
        """Number of rows in an epoch."""
        own = slice(len(self.sizes) - self.num_replayed)
        lengths = [size / share for size, share in zip(self.sizes[own], self.shares[own], strict=True)]
        if self.stopping_strategy == "first_exhausted":
            return math.floor(min(lengths) + ROUNDING)
        if self.stopping_strategy == "all_exhausted":
            return math.ceil(max(lengths) - ROUNDING)
        return round(sum(self.sizes[own]) / sum(self.shares[own]))

    @property
    def quotas(self) -> tuple[int, ...]:
        """Rows of each source in an epoch: its share, to within one row. With `down_weight`, all rows not replayed."""
        if self.stopping_strategy == "down_weight":
            own = self.sizes[: len(self.sizes) - self.num_replayed]
            return *own, *_apportion(self.num_rows - sum(own), self.shares[len(own) :])
        return _apportion(self.num_rows, self.shares)

    def epoch(self, number: int) -> array[int]:
        """Return the row indices of an epoch in order, the rows of every source spread evenly over it."""
        quotas = self.quotas
        starts = [sum(self.sizes[:source]) for source in range(len(self.sizes))]
        weights = self.shares if self.stopping_strategy == "down_weight" else quotas
        digest = hashlib.sha256(repr((self.seed, "mixture", number)).encode()).digest()
        rng = random.Random(digest)
        # Stride scheduling (Waldspurger & Weihl 1995): the source that is due first gives the next row.
        due = [(rng.random() / weight, source, 0) for source, weight in enumerate(weights) if quotas[source]]
        heapq.heapify(due)
        rows = [self._source_rows(source, number * quota, quota) for source, quota in enumerate(quotas)]
        found = array("I")
        while due:
            time, source, num_given = heapq.heappop(due)
            found.append(starts[source] + rows[source][num_given])
            if num_given + 1 < quotas[source]:
                heapq.heappush(due, (time + 1 / weights[source], source, num_given + 1))
        return found

    def _source_rows(self, source: int, start: int, num_rows: int) -> array[int]:
        """Return rows of one source, from position `start` of its passes; each pass is another permutation."""
        size = self.sizes[source]
        found = array("I")
        for number in range(start // size, -(-(start + num_rows) // size)):
            found += order(size, seed=self.seed, epoch=number, name=f"source {source}")
        first = start % size
        return found[first : first + num_rows]

    def describe(self, names: Sequence[str]) -> str:
        """Return the mixture of sources with these names in one line."""
        parts = zip(names, self.quotas, self.sizes, strict=True)
        rows = ", ".join(f"{quota:,} of {size:,} rows of {name}" for name, quota, size in parts)
        return f"an epoch of {self.num_rows:,} rows: {rows} ({self.stopping_strategy} when a source runs out)"


def _apportion(number: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the number split by shares into integers: largest remainders."""
    exact = [share * number / sum(shares) for share in shares]
    whole = [math.floor(each + ROUNDING) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: whole[source] - exact[source])
    for source in by_remainder[: number - sum(whole)]:
        whole[source] += 1
    return tuple(whole)


def shares_of(weights: Mapping[str, float], replay: Mapping[str, float], replay_share: float) -> dict[str, float]:
    """Return the share of each source in an epoch, replayed sources last.

    Weights are relative; all replayed sources together have `replay_share`. Raise `InputError`, located in the step,
    for a weight that is not positive, and for a replayed source that is one of the step's own.

    >>> shares_of({"chat": 3, "maths": 1}, {"code": 1}, 0.2)
    {'chat': 0.6000000000000001, 'maths': 0.2, 'code': 0.2}
    """
    for name, weight in (*weights.items(), *replay.items()):
        if not (weight > 0 and math.isfinite(weight)):
            raise InputError(f"the weight is {weight}; a number above 0 is needed", ("data", name))
    if both := sorted(weights.keys() & replay.keys()):
        raise InputError(f"{both[0]!r} is a source of the step itself, so it cannot be replayed", ("replay",))
    own = {name: (1 - replay_share) * weight / sum(weights.values()) for name, weight in weights.items()}
    return own | {name: replay_share * weight / sum(replay.values()) for name, weight in replay.items()}
