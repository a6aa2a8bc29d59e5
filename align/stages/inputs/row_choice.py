"""Which rows of a source a step reads: a range of them, in the file or in a random order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class RowChoice:
    """The rows at `skip` to `skip + limit`: of the file, or of a permutation of its rows."""

    skip: int
    limit: int | None  # None: all others
    seed: int | None  # of the permutation; None: the file's order

    def places(self, number: int) -> frozenset[int]:
        """Return the places in the file, from 0, of the chosen rows of a permutation of `number` rows."""
        found = list(range(number))
        Random(self.seed).shuffle(found)
        return frozenset(found[self.skip :][: self.limit])

    def of(self, rows: Iterable[Row], item: Callable[[Row], str | None] | None = None) -> Iterator[Row]:
        """Yield the chosen rows, as in the file.

        Rows with one `item` count as one, and are chosen together; None is a row by itself.
        """
        end = sys.maxsize if self.limit is None else min(self.skip + self.limit, sys.maxsize)
        if self.seed is None and item is None:
            yield from islice(rows, min(self.skip, end), end)
            return
        numbers: dict[str | int, int] = {}  # of the items, by their first rows

        def number(place: int, row: Row) -> int:
            name = None if item is None else item(row)
            return numbers.setdefault(place if name is None else name, len(numbers))

        numbered = ((number(place, row), row) for place, row in enumerate(rows))
        chosen = range(self.skip, end)
        if self.seed is not None:
            numbered = list(numbered)
            chosen = self.places(len(numbers))
        yield from (row for place, row in numbered if place in chosen)
