"""Tokenized rows: a group of K responses to one prompt, each a sequence of T tokens with a loss mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """Token ids of a dialogue up to its last end of turn; `loss_mask` is never true for the first token."""

    ids: Ids  # [T]
    loss_mask: Mask  # [T]


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """The K responses to a prompt, each as a whole sequence; a demonstration is one sequence without a reward."""

    sequences: tuple[TokenSequence, ...]
    rewards: tuple[float, ...] | None
    chosen: int | None
    attributes: tuple[Mapping[str, float], ...]
    row: int
    prompt_hash: int | None = None  # of 32 bits, of all that is asked, cut or not; a store does not keep it

    @property
    def lengths(self) -> tuple[int, ...]:
        """Trained tokens of each sequence."""
        return tuple(int(sequence.loss_mask.sum()) for sequence in self.sequences)


def common_prefix(first: Ids, second: Ids) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    different = first[:shorter] != second[:shorter]
    return int(different.argmax()) if different.any() else shorter
