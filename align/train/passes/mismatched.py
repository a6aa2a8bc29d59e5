"""Mismatched pairs: each prompt of a run with the responses to another prompt of the same optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from align.data.batching import Indices
from align.data.token_groups import LazyGroups, TokenGroup, TokenSequence


class MismatchedGroups(LazyGroups):
    """Every prompt that a run trains on, in order, with the responses to the prompt before it in its optimizer step.

    Over a step these are its own prompts and its own responses, in other pairs, the same as in TRL: the first prompt
    has the responses to the last one. A step of one prompt pairs it with itself. Groups are made on access. They have
    no more than `max_length` tokens; responses are cut on the right.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        epoch_of: Callable[[int], Indices],
        *,
        num_rows: int,
        prompts_per_step: int,
        num_steps: int,
        max_length: int,
    ) -> None:
        self._groups, self._epoch_of, self._max_length = groups, epoch_of, max_length
        self._num_rows, self._per_step, self._num_steps = num_rows, prompts_per_step, num_steps

    def step(self, number: int) -> range:
        """Return the indices of the groups of optimizer step `number`, from 0."""
        epoch, within = divmod(number, -(-self._num_rows // self._per_step))
        start = within * self._per_step
        stop = min(start + self._per_step, self._num_rows)
        return range(epoch * self._num_rows + start, epoch * self._num_rows + stop)

    def __len__(self) -> int:
        return self.step(self._num_steps - 1).stop if self._num_steps else 0

    def group(self, index: int) -> TokenGroup:
        """Return the prompt of a group with the responses of another one."""
        epoch, offset = divmod(range(len(self))[index], self._num_rows)  # raises IndexError
        order = self._epoch_of(epoch)
        start = offset - offset % self._per_step
        size = min(self._per_step, self._num_rows - start)
        other = start + (offset - start - 1) % size
        return mismatched(self._groups[order[offset]], self._groups[order[other]], max_length=self._max_length)


def mismatched(group: TokenGroup, other: TokenGroup, *, max_length: int) -> TokenGroup:
    """Return the prompt of a group with the responses of another one, cut to `max_length` tokens.

    Every sequence of the first group is at most that long, so at least one token of each response is left.
    """
    prompt = group.sequences[0].ids[: group.prompt_length]
    sequences: list[TokenSequence] = []
    for sequence in other.sequences:
        start = int(sequence.loss_mask.argmax())
        ids = np.concatenate([prompt, sequence.ids[start:]])
        loss_mask = np.concatenate([np.zeros(len(prompt), np.bool_), sequence.loss_mask[start:]])
        is_cut = sequence.is_cut or len(ids) > max_length
        sequences.append(TokenSequence(ids[:max_length], loss_mask[:max_length], is_cut))
    return TokenGroup(tuple(sequences), None, None, ({},) * len(sequences), group.row)
