"""Tokenized rows: the K responses to one prompt, each a sequence of T tokens with a loss mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """Token ids of a prompt and a response, up to the last end-of-turn token, with a loss mask.

    Where the mask is true, the token's log-probability enters the loss. The first token is never in the loss, because
    nothing precedes it. A sequence that `is_cut` lacks its end of turn: the response was cut off, or the row was.
    """

    ids: Ids  # int32, shape [T]
    loss_mask: Mask  # bool, shape [T]
    is_cut: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """The K responses to one prompt, each as a whole sequence that repeats the prompt.

    A demonstration is a group of one sequence without rewards, whose mask may cover several turns.
    """

    sequences: tuple[TokenSequence, ...]
    rewards: tuple[float, ...] | None  # one per response, or None if the row has neither rewards nor a label
    chosen: int | None  # index of the response that the row labels as preferred
    attributes: tuple[Mapping[str, float], ...]  # one per response; empty if a response has none
    row: int  # index among the records of the source
    prompt_hash: int | None = None  # 32 bits, of the prompt before any cut; not kept in a store

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Number of tokens in the loss, per sequence."""
        return tuple(int(sequence.loss_mask.sum()) for sequence in self.sequences)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first response token of any sequence."""
        return min(int(sequence.loss_mask.argmax()) for sequence in self.sequences)


class LazyGroups(Sequence[TokenGroup]):
    """Groups of which each is made when it is accessed; a slice is a list of them."""

    @abstractmethod
    def group(self, index: int) -> TokenGroup:
        """Return one group; raise `IndexError` beyond the last one."""

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self.group(index)


def common_prefix(first: Ids, second: Ids) -> int:
    """Return the number of leading tokens that two sequences share.

    >>> common_prefix(np.array([5, 6, 7], np.int32), np.array([5, 6, 8, 9], np.int32))
    2
    """
    shorter = min(len(first), len(second))
    different = first[:shorter] != second[:shorter]
    return int(different.argmax()) if different.any() else shorter
