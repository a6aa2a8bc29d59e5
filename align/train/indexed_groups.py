"""The groups of a step as the loop sees them: by index, with what is known of all of them in columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import SupportsInt, overload

import numpy as np
from numpy.typing import NDArray

from align.data.store import columns_of
from align.data.token_groups import TokenGroup, TokenSequence
from align.models.tree.batch import count_tokens

ROWS = "rows"  # in a step's working folder, what is kept of its rows until it is finished


class Groups(Sequence[TokenGroup]):
    """Those that are trained on, and behind them those that are held out."""

    def __init__(self, train: Sequence[TokenGroup], held_out: Sequence[TokenGroup] = ()) -> None:
        self.num_trained = len(train)
        self._parts = (train, held_out)
        self._columns = (columns_of(train, count_tokens), columns_of(held_out, count_tokens))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        part, at = self._place(index)
        return self._parts[part][at]

    def __iter__(self) -> Iterator[TokenGroup]:
        for part in self._parts:
            yield from part

    def sizes(self, forward: str) -> Sizes:
        """Tokens that each group takes: its tree's rows, or its sequences' lengths where it is run plain."""
        return Sizes(self, "tree" if forward == "tree" else "plain")

    def trained_tokens(self, indices: Sequence[int]) -> int:
        """Trained tokens of some of the groups."""
        return sum(map(int, map(Sizes(self, "trained").__getitem__, indices)))

    def probed(self) -> list[tuple[TokenSequence, ...]]:
        """Some groups that a forward can be chosen by: the first two, and one with the longest sequence of all."""
        longest = [int(columns.groups["longest"].argmax()) if len(columns.groups) else 0 for columns in self._columns]
        ends = [part[at] for part, at in zip(self._parts, longest, strict=True) if len(part)]
        return [group.sequences for group in (*self[:2], *ends)]

    def some(self, indices: Sequence[int]) -> Some:
        """The groups of these indices, each made when it is asked for."""
        return Some(self, indices)

    def digests(self, *, held_out: bool) -> list[str]:
        """What is decisive in the groups that are trained on, and in those that are held out where they decide too."""
        return [columns.digest for columns in self._columns[: 2 if held_out else 1]]

    def keys(self) -> NDArray[np.bytes_]:
        """The keys of all sequences, one group's after another's."""
        return np.concatenate([columns.keys for columns in self._columns])

    def starts(self) -> NDArray[np.int64]:
        """Where each group's sequences start among all."""
        first, second = (columns.groups["start"] for columns in self._columns)
        return np.concatenate([first, second + len(self._columns[0].keys)])

    def span(self, index: int) -> slice:
        """Where the sequences of a group lie among all."""
        part, at = self._place(index)
        span = self._columns[part].span(at)
        before = len(self._columns[0].keys) if part else 0
        return slice(before + span.start, before + span.stop)

    def column(self, index: int, name: str) -> SupportsInt:
        """A number that is known of a group."""
        part, at = self._place(index)
        return self._columns[part].groups[name][at]

    def _place(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]  # or an IndexError
        return (0, index) if index < self.num_trained else (1, index - self.num_trained)


class Some(Sequence[TokenGroup]):
    """Some of the groups, in an order of their own."""

    def __init__(self, groups: Groups, indices: Sequence[int]) -> None:
        self._groups, self._indices = groups, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | Sequence[TokenGroup]:
        at = self._indices[index]
        return self._groups[at] if isinstance(at, int) else Some(self._groups, at)


class Sizes:
    """A column of the groups, by their index."""

    def __init__(self, groups: Groups, name: str) -> None:
        self._groups, self._name = groups, name

    def __getitem__(self, index: int) -> SupportsInt:
        """The number of one group."""
        return self._groups.column(index, self._name)
