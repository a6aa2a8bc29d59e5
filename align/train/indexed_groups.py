"""An indexed view of token groups: the groups themselves, decoded on access, and the columns stored for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from align.data.store import columns_of
from align.data.token_groups import TokenGroup, TokenSequence
from align.models.tree.batch import count_tokens

ROWS = "rows"  # subfolder of a step's working folder that holds its token groups until the step is finished

Column = Literal["tree", "plain", "trained", "longest"]


class GroupView(Sequence[TokenGroup]):
    """Token groups by index: the training groups, followed by the held-out groups; or a selection of them.

    Groups are decoded one at a time, when they are accessed. Token counts and keys come from columns.
    """

    def __init__(self, train: Sequence[TokenGroup], held_out: Sequence[TokenGroup] = ()) -> None:
        self.num_train = len(train)
        self._parts = (train, held_out)
        self._columns = tuple(columns_of(part, count_tokens) for part in self._parts)
        self._indices: Sequence[int] = range(len(train) + len(held_out))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> GroupView: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | GroupView:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        part, position = self._locate(self._indices[index])
        return self._parts[part][position]

    def select(self, indices: Sequence[int]) -> GroupView:
        """Return a view of the groups at these indices, in this order; nothing is decoded or copied."""
        view = copy(self)
        view._indices = [self._indices[index] for index in indices]
        return view

    def column(self, name: Column) -> NDArray[Any]:
        """Return a number of each group, from its column.

        `tree`: tokens that the tree forward computes; `plain`: tokens that the padded forward computes, without
        padding; `trained`: trained tokens; `longest`: tokens of the longest sequence.
        """
        if isinstance(self._indices, range):  # all groups
            return np.concatenate([columns.groups[name] for columns in self._columns])
        places = map(self._locate, self._indices)
        return np.array([self._columns[part].groups[name][position] for part, position in places], np.int64)

    @property
    def num_trained_tokens(self) -> int:
        """Return the number of trained tokens of all groups of the view, from its column."""
        return int(self.column("trained").sum())

    def probe_sequences(self) -> list[tuple[TokenSequence, ...]]:
        """Return sequences to choose a forward by: the first two groups, and the longest of each part."""
        longest = [int(columns.groups["longest"].argmax()) if len(columns.groups) else 0 for columns in self._columns]
        ends = [part[position] for part, position in zip(self._parts, longest, strict=True) if len(part)]
        return [group.sequences for group in (*self[:2], *ends)]

    def digests(self, *, held_out: bool) -> list[str]:
        """Return a hash of the content of the training groups, and of the held-out groups if asked for."""
        return [columns.digest for columns in self._columns[: 2 if held_out else 1]]

    def sequence_keys(self) -> NDArray[np.bytes_]:
        """Return the keys of the sequences of all groups, group by group (`align.data.group_columns.sequence_key`)."""
        return np.concatenate([columns.keys for columns in self._columns])

    def sequence_starts(self) -> NDArray[np.int64]:
        """Return the position of the first sequence of each group among the sequences of all groups."""
        train, held_out = (columns.groups["start"] for columns in self._columns)
        return np.concatenate([train, held_out + len(self._columns[0].keys)])

    def sequence_span(self, index: int) -> slice:
        """Return the positions of the sequences of a group among the sequences of all groups."""
        part, position = self._locate(self._indices[index])
        span = self._columns[part].span(position)
        offset = len(self._columns[0].keys) if part else 0
        return slice(offset + span.start, offset + span.stop)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the part (0: training, 1: held out) and the position in it."""
        return (0, index) if index < self.num_train else (1, index - self.num_train)


def end_of_turn(groups: Sequence[TokenGroup]) -> int | None:
    """Return the token that most whole sequences end with; None if no token ends more than half of them."""
    whole = (sequence for group in groups for sequence in group.sequences if not sequence.is_cut)
    ends = Counter(int(sequence.ids[-1]) for sequence in whole)
    token, number = next(iter(ends.most_common(1)), (None, 0))
    return token if 2 * number > ends.total() else None
