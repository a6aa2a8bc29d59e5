"""Two halves of the rows, for references that have not seen the rows that they score (cross-fitting)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from align.data.token_groups import LazyGroups, TokenGroup
from align.train.references.cache import References

FOLDS = 2


def fold_of(group: TokenGroup) -> int:
    """Return the half of a group, 1 or 2, by a hash of the tokens of its prompt, so that equal prompts stay together.

    The prompt is what precedes the first trained token, however the responses are cut.
    """
    ids = group.sequences[0].ids[: group.prompt_length].astype("<i4")
    return hashlib.sha256(ids.tobytes()).digest()[0] % FOLDS + 1


def folds_of(groups: Sequence[TokenGroup]) -> NDArray[np.int8]:
    """Return the half of each group, shape [B]."""
    return np.fromiter(map(fold_of, groups), np.int8, len(groups))


class SomeGroups(LazyGroups):
    """The groups at some indices; each is read when it is accessed."""

    def __init__(self, groups: Sequence[TokenGroup], indices: Sequence[int]) -> None:
        self._groups, self._indices = groups, indices

    def __len__(self) -> int:
        return len(self._indices)

    def group(self, index: int) -> TokenGroup:
        """Return the group at one of the indices."""
        return self._groups[self._indices[index]]


class FoldedReferences:
    """The reference values of all groups, each from the reference that scores its half."""

    def __init__(self, parts: Sequence[References], indices: Sequence[Sequence[int]]) -> None:
        """`indices` are those of the groups that each part covers."""
        number = sum(map(len, indices))
        self._part_B, self._place_B = np.empty(number, np.int8), np.empty(number, np.int64)
        for part, each in enumerate(indices):
            self._part_B[each] = part
            self._place_B[each] = np.arange(len(each))
        self._parts = parts

    def of(self, index: int) -> list[float]:
        """Return what the reference has for each response of a group."""
        return self._parts[self._part_B[index]].of(int(self._place_B[index]))
