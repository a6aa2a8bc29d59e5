"""Groups whose responses are cut, for a cheaper score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from align.data.token_groups import LazyGroups, TokenGroup, TokenSequence


class CutGroups(LazyGroups):
    """Groups with only the first `num_tokens` trained tokens of each sequence; each is cut when it is accessed."""

    def __init__(self, groups: Sequence[TokenGroup], num_tokens: int) -> None:
        self._groups, self._num_tokens = groups, num_tokens

    def __len__(self) -> int:
        return len(self._groups)

    def group(self, index: int) -> TokenGroup:
        """Return a group, its sequences cut."""
        group = self._groups[index]
        return replace(group, sequences=tuple(self._cut(sequence) for sequence in group.sequences))

    def _cut(self, sequence: TokenSequence) -> TokenSequence:
        trained = np.flatnonzero(sequence.loss_mask)
        if len(trained) <= self._num_tokens:
            return sequence
        end = int(trained[self._num_tokens - 1]) + 1
        return TokenSequence(sequence.ids[:end], sequence.loss_mask[:end], is_cut=True)
