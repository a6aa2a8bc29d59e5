"""Batches of token sequences: merged into a token trie (tree), or padded (plain).

In a tree batch every distinct (prefix, token) is one row and is computed once.
Shape legend: S sequences, T rows of a tree, N targets, R x L rows of a model input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from align.accounting.flops import Work
from align.data.token_groups import TokenSequence, common_prefix
from align.errors import InputError
from align.models.tree.layout import TreeLayout, tree_layout
from align.models.tree.sequence_group import SequenceGroup

HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd; 2^64 over the golden ratio


class EarlyExit(NamedTuple):
    """A forward pass through the first decoder layers alone, followed by the model's own final norm and head."""

    layers: int
    of: int  # layers of the model

    def work(self, work: Work) -> Work:
        """Return the work of all layers that costs as much: tokens and pairs by the share of the layers, all targets.

        >>> EarlyExit(layers=1, of=4).work(Work(tokens=40, attended_pairs=220, targets=7))
        Work(tokens=10, attended_pairs=55, targets=7)
        """
        share = self.layers / self.of
        return Work(round(work.tokens * share), round(work.attended_pairs * share), work.targets)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A model input and its targets: one row [1, T] with a layout (tree), or padded rows [S, L] with a mask (plain)."""

    input_ids: Tensor  # int64 [R, L]
    position_ids: Tensor  # int64 [R, L]
    attention_mask: Tensor | None  # int64 [R, L]; None for a tree
    layout: TreeLayout | None  # None for a padded batch
    rows_N: Tensor  # position, in the flattened [R * L], of the hidden state that predicts each target
    targets_N: Tensor  # token id of each target
    sequence_N: Tensor  # index of the sequence of each target
    last_S: Tensor  # position, in the flattened [R * L], of each sequence's last token
    paths: tuple[NDArray[np.int64], ...]  # positions, in the flattened [R * L], of each sequence's tokens
    key_T: Tensor  # int64 hash of the prefix that each position of the flattened [R * L] ends; 0 for padding
    num_sequences: int
    num_tokens: int  # tokens computed, without padding
    tokens_NK: Tensor | None = None  # K tokens at each target whose log-probabilities are needed, too
    exit: EarlyExit | None = None  # None for all layers

    def work(self) -> Work:
        """Return the work of a forward pass without padding: tokens, attended pairs and targets.

        That of an early exit is the work of all layers that costs as much.
        """
        attended = self.position_ids + 1
        if self.attention_mask is not None:
            attended = attended * self.attention_mask
        work = Work(self.num_tokens, int(attended.sum()), len(self.targets_N))
        return work if self.exit is None else self.exit.work(work)

    def sum_by_sequence(self, logps_N: Tensor) -> Tensor:
        """Return the sum over the targets of each sequence in fp64, shape [S]."""
        sums_S = torch.zeros(self.num_sequences, dtype=torch.float64, device=logps_N.device)
        return sums_S.index_add(0, self.sequence_N, logps_N.double())

    def share_of(self, group: SequenceGroup) -> tuple[TokenBatch, Tensor]:
        """Return the rows of this process as an input of a policy, and the indices of its targets among the N.

        All processes have equally many rows. Those that pad have no targets, and other rows do not attend to them.
        """
        assert self.layout is not None, "only the rows of a tree can be split"
        own = group.rows(self.input_ids.shape[1])
        (targets,) = torch.nonzero((self.rows_N >= own.start) & (self.rows_N < own.stop), as_tuple=True)

        def cut(values: Tensor) -> Tensor:
            held = values[..., own]
            return nn.functional.pad(held, (0, own.stop - own.start - held.shape[-1]))

        share = replace(
            self,
            input_ids=cut(self.input_ids),
            position_ids=cut(self.position_ids),
            key_T=cut(self.key_T),
            layout=replace(self.layout, group=group),
            rows_N=self.rows_N[targets] - own.start,
            targets_N=self.targets_N[targets],
            tokens_NK=None if self.tokens_NK is None else self.tokens_NK[targets],
            sequence_N=self.sequence_N[targets],
        )
        return share, targets

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "rows_N", "targets_N", "sequence_N", "last_S", "key_T")
        moved = {name: getattr(self, name).to(device) for name in names}
        mask = self.attention_mask.to(device) if self.attention_mask is not None else None
        layout = self.layout.to(device) if self.layout is not None else None
        tokens_NK = self.tokens_NK.to(device) if self.tokens_NK is not None else None
        return replace(self, attention_mask=mask, layout=layout, tokens_NK=tokens_NK, **moved)


def tree_batch(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """Merge sequences into one token trie, in depth-first order in one row [1, T].

    Sequences that share a prefix, such as the responses to one prompt, share its rows. A model takes the batch after
    `use_forward("tree")`.

    >>> import numpy as np
    >>> from align.data.token_groups import TokenSequence
    >>> mask = np.array([False, False, True])
    >>> batch = tree_batch([TokenSequence(np.array([5, 6, last], np.int32), mask) for last in (7, 8)])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 2]])
    >>> batch.rows_N.tolist(), batch.targets_N.tolist(), batch.sequence_N.tolist()
    ([1, 1], [7, 8], [0, 1])
    """
    # In sorted order a sequence shares its longest common prefix with the sequence right before it
    order = sorted(range(len(sequences)), key=lambda index: _sort_key(sequences[index]))
    tokens: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    previous_ids = np.empty(0, np.int32)
    path = np.empty(0, np.int64)
    num_rows = 0
    for index in order:
        ids = sequences[index].ids
        shared = common_prefix(previous_ids, ids)
        new = np.arange(num_rows, num_rows + len(ids) - shared)
        path = np.concatenate([path[:shared], new])
        tokens.append(ids[shared:])
        depths.append(np.arange(shared, len(ids)))
        parents.append(np.concatenate([[-1], path])[shared : len(ids)])
        paths[index] = path
        previous_ids = ids
        num_rows += len(new)
    return TokenBatch(
        input_ids=_row(np.concatenate(tokens)),
        position_ids=_row(np.concatenate(depths)),
        attention_mask=None,
        layout=tree_layout(np.concatenate(parents), max_depth=max(len(path) for path in paths)),
        num_sequences=len(sequences),
        num_tokens=num_rows,
        key_T=_prefix_keys(sequences, paths, num_rows),
        **_targets(sequences, paths),
    )


def plain_batch(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """Pad sequences on the right, one in each row, [S, L]; a model takes the batch after `use_forward("plain")`."""
    lengths = [len(sequence.ids) for sequence in sequences]
    ids = np.zeros((len(sequences), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence.ids
        mask[row, : lengths[row]] = 1
    paths = [np.arange(length) + row * ids.shape[1] for row, length in enumerate(lengths)]
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(ids.shape[1]).expand(ids.shape),
        attention_mask=torch.from_numpy(mask),
        layout=None,
        num_sequences=len(sequences),
        num_tokens=sum(lengths),
        key_T=_prefix_keys(sequences, paths, ids.size),
        **_targets(sequences, paths),
    )


def count_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Return the number of rows of the sequences' tree: distinct (prefix, token) pairs."""
    return count_work(sequences).tokens


def count_work(sequences: Sequence[TokenSequence]) -> Work:
    """Return the work of a forward pass over the sequences' tree, without making its batch.

    >>> import numpy as np
    >>> from align.data.token_groups import TokenSequence
    >>> mask = np.array([False, False, True])
    >>> sequences = [TokenSequence(np.array([5, 6, last], np.int32), mask) for last in (7, 8)]
    >>> count_work(sequences) == tree_batch(sequences).work() == Work(tokens=4, attended_pairs=9, targets=2)
    True
    """
    ids = [sequence.ids for sequence in sorted(sequences, key=_sort_key)]
    shared = [common_prefix(first, second) for first, second in pairwise(ids)]
    lengths = [len(each) for each in ids]
    return Work(
        tokens=sum(lengths) - sum(shared),
        attended_pairs=sum(map(_pairs, lengths)) - sum(map(_pairs, shared)),
        targets=sum(int(sequence.loss_mask.sum()) for sequence in sequences),
    )


def _pairs(length: int) -> int:
    """Return the (query, key) pairs of a sequence whose tokens attend to themselves and to those before."""
    return length * (length + 1) // 2


def count_rows(batch: TokenBatch, sequences: Sequence[TokenSequence], sizes: Sequence[int]) -> Tensor:
    """Return the number of groups that each row counts for, fp64 [R * L]; `sizes` are the sequences of each group.

    Every distinct (prefix, token) of a group counts once, however the groups are batched: in a tree, a row that groups
    share counts for each of them; in a padded batch, only the first copy of a prefix counts.

    >>> import numpy as np
    >>> from align.data.token_groups import TokenSequence
    >>> mask = np.array([False, True])
    >>> sequences = [TokenSequence(np.array([5, last], np.int32), mask) for last in (7, 8, 8)]
    >>> count_rows(tree_batch(sequences), sequences, [2, 1]).tolist()
    [2.0, 1.0, 2.0]
    >>> count_rows(plain_batch(sequences), sequences, [2, 1]).tolist()
    [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    """
    counts = np.zeros(batch.input_ids.numel())
    for start, size in zip(accumulate(sizes, initial=0), sizes):  # noqa: B905 - accumulate ends with the total
        previous = np.empty(0, np.int32)
        for index in sorted(range(start, start + size), key=lambda index: _sort_key(sequences[index])):
            ids = sequences[index].ids
            counts[batch.paths[index][common_prefix(previous, ids) :]] += 1
            previous = ids
    return torch.from_numpy(counts)


def _prefix_keys(sequences: Sequence[TokenSequence], paths: Sequence[np.ndarray], num_rows: int) -> Tensor:
    """Return a hash of the prefix that ends in each row: a polynomial in the ids, modulo 2^64."""
    keys = np.zeros(num_rows, np.uint64)
    powers = np.cumprod(np.full(max(map(len, paths)), HASH_BASE, np.uint64), dtype=np.uint64)
    for sequence, path in zip(sequences, paths, strict=True):
        ids = (sequence.ids.astype(np.uint64) + np.uint64(1)) * HASH_BASE
        keys[path] = np.cumsum((ids ^ (ids >> np.uint64(31))) * powers[: len(ids)], dtype=np.uint64)
    return torch.from_numpy(keys.view(np.int64))


def _sort_key(sequence: TokenSequence) -> bytes:
    return sequence.ids.astype(">u4").tobytes()  # big-endian bytes sort like the token ids


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


def _targets(sequences: Sequence[TokenSequence], paths: Sequence[np.ndarray]) -> dict[str, Any]:
    """Return the fields of a batch about targets; the row of the token before a target predicts it.

    A shared row has one target for each sequence that continues from it.
    """
    positions = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]
    if any(0 in at[:1] for at in positions):
        raise InputError("the loss mask of a sequence holds its first token, which nothing predicts; exclude it there")
    rows = np.concatenate([path[at - 1] for path, at in zip(paths, positions, strict=True)])
    ids = np.concatenate([sequence.ids[at] for sequence, at in zip(sequences, positions, strict=True)])
    owner = np.repeat(np.arange(len(sequences)), [len(at) for at in positions])
    last = np.array([path[-1] for path in paths])
    fields = {"rows_N": rows, "targets_N": ids, "sequence_N": owner, "last_S": last}
    tensors = {name: torch.from_numpy(values.astype(np.int64)) for name, values in fields.items()}
    return {**tensors, "paths": tuple(paths)}
