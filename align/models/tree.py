"""The token trie of a micro-batch: every distinct (prefix, token) is one row, computed once.

Shape legend: S sequences, T rows (tokens computed), N targets, R x L rows of a model input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from align.accounting.formulas import Work
from align.data.token_groups import TokenSequence, common_prefix


@dataclass(frozen=True, slots=True)
class Span:
    """A node of the trie: rows [start, stop) of a path without a branch; its descendants follow, to `subtree_stop`."""

    start: int
    stop: int
    subtree_stop: int
    ancestors: tuple[int, ...]  # indices of the spans above it, from the root down


@dataclass(frozen=True, slots=True)
class PathIndex:
    """Root paths as gathered rows, in the form that variable-length attention takes."""

    kv_rows: Tensor  # int64, for each span its ancestors' rows and then its own
    cu_queries: Tensor  # int32 [spans + 1], cumulative rows
    cu_keys: Tensor  # int32 [spans + 1], cumulative gathered rows
    max_queries: int
    max_keys: int
    subtree_stops: Tensor  # int64 [T], where the rows below a row end, which follow it

    def to(self, device: torch.device) -> PathIndex:
        """The same index with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("kv_rows", "cu_queries", "cu_keys", "subtree_stops")}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """Which rows a row attends to: its root path and nothing else."""

    spans: tuple[Span, ...]
    num_rows: int
    max_depth: int  # longest root path, in tokens
    paths: PathIndex

    def to(self, device: torch.device) -> TreeLayout:
        """The same layout with its tensors on `device`."""
        return replace(self, paths=self.paths.to(device))


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A model input and the tokens that are asked about: their log-probabilities, or what is said after the last.

    As a tree it is one row of T tokens with a layout; as its plain twin it is S padded rows with a mask.
    """

    input_ids: Tensor  # int64 [R, L]
    position_ids: Tensor  # int64 [R, L]
    attention_mask: Tensor | None  # int64 [R, L], None for a tree
    layout: TreeLayout | None
    rows_N: Tensor  # position, in the flattened [R * L], whose hidden state predicts the target
    targets_N: Tensor  # target token id
    sequence_N: Tensor  # index of the sequence that the target belongs to
    last_S: Tensor  # position, in the flattened [R * L], of each sequence's last token
    num_sequences: int
    num_tokens: int  # tokens computed, padding not counted

    def work(self) -> Work:
        """What a forward pass over the batch has to do, padding not counted; a token attends to its whole prefix."""
        attended = self.position_ids + 1
        if self.attention_mask is not None:
            attended = attended * self.attention_mask
        return Work(self.num_tokens, int(attended.sum()), len(self.targets_N))

    def sums(self, logps_N: Tensor) -> Tensor:
        """Sum of each sequence's targets in fp64, so that a long sum loses nothing, shape [S]."""
        sums_S = torch.zeros(self.num_sequences, dtype=torch.float64, device=logps_N.device)
        return sums_S.index_add(0, self.sequence_N, logps_N.double())

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "rows_N", "targets_N", "sequence_N", "last_S")
        moved = {name: getattr(self, name).to(device) for name in names}
        mask = self.attention_mask.to(device) if self.attention_mask is not None else None
        layout = self.layout.to(device) if self.layout is not None else None
        return replace(self, attention_mask=mask, layout=layout, **moved)


def tree_batch(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """The sequences merged into one token trie, laid out depth first in one row [1, T]."""
    # Sorted by token, a sequence shares with the one before it the longest prefix that it shares with any earlier one.
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].ids.astype(">u4").tobytes())
    tokens: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    previous_ids, path, num_rows = np.empty(0, np.int32), np.empty(0, np.int64), 0
    for index in order:
        ids = sequences[index].ids
        shared = common_prefix(previous_ids, ids)
        new = np.arange(num_rows, num_rows + len(ids) - shared)
        path = np.concatenate([path[:shared], new])
        tokens.append(ids[shared:])
        depths.append(np.arange(shared, len(ids)))
        parents.append(np.concatenate([[-1], path])[shared : len(ids)])
        paths[index] = path
        previous_ids, num_rows = ids, num_rows + len(new)
    spans = _spans(np.concatenate(parents))
    layout = TreeLayout(spans, num_rows, max(len(path) for path in paths), _path_index(spans))
    return TokenBatch(
        input_ids=_row(np.concatenate(tokens)),
        position_ids=_row(np.concatenate(depths)),
        attention_mask=None,
        layout=layout,
        num_sequences=len(sequences),
        num_tokens=num_rows,
        **_targets(sequences, paths),
    )


def plain_batch(sequences: Sequence[TokenSequence]) -> TokenBatch:
    """The plain twin: one row a sequence, padded on the right, [S, longest]."""
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
        **_targets(sequences, paths),
    )


def count_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Distinct (prefix, token) pairs of the sequences: the rows of their tree."""
    ids = sorted((sequence.ids for sequence in sequences), key=lambda ids: ids.astype(">u4").tobytes())
    shared = sum(common_prefix(first, second) for first, second in pairwise(ids))
    return sum(len(each) for each in ids) - shared


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


def _targets(sequences: Sequence[TokenSequence], paths: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """A target is predicted from the row of the token before it; a shared row has a target for each continuation."""
    where = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]
    rows = np.concatenate([path[at - 1] for path, at in zip(paths, where, strict=True)])
    ids = np.concatenate([sequence.ids[at] for sequence, at in zip(sequences, where, strict=True)])
    owner = np.repeat(np.arange(len(sequences)), [len(at) for at in where])
    last = np.array([path[-1] for path in paths])
    named = {"rows_N": rows, "targets_N": ids, "sequence_N": owner, "last_S": last}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in named.items()}


def _spans(parents_T: np.ndarray) -> tuple[Span, ...]:
    """The trie's nodes in depth-first order; a node ends where the path branches."""
    num_rows = len(parents_T)
    children = np.bincount(parents_T + 1, minlength=num_rows + 1)  # of the root (index 0) and of each row
    follows = (parents_T == np.arange(num_rows) - 1) & (children[parents_T + 1] == 1)
    starts = np.flatnonzero(~follows | (np.arange(num_rows) == 0))
    stops = np.append(starts[1:], num_rows)
    span_of_row = np.repeat(np.arange(len(starts)), stops - starts)
    above = [int(span_of_row[parent]) if parent >= 0 else -1 for parent in parents_T[starts]]
    subtree_stops = stops.copy()
    ancestors: list[tuple[int, ...]] = []
    for span, parent in enumerate(above):
        ancestors.append((*ancestors[parent], parent) if parent >= 0 else ())
        for ancestor in ancestors[span]:
            subtree_stops[ancestor] = stops[span]
    columns = zip(starts.tolist(), stops.tolist(), subtree_stops.tolist(), ancestors, strict=True)
    return tuple(Span(*column) for column in columns)


def _path_index(spans: tuple[Span, ...]) -> PathIndex:
    rows = [
        np.concatenate([np.arange(spans[node].start, spans[node].stop) for node in (*span.ancestors, index)])
        for index, span in enumerate(spans)
    ]
    queries = [span.stop - span.start for span in spans]
    keys = [len(each) for each in rows]
    return PathIndex(
        kv_rows=torch.from_numpy(np.concatenate(rows)),
        cu_queries=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        cu_keys=torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
        max_queries=max(queries),
        max_keys=max(keys),
        subtree_stops=torch.tensor([span.subtree_stop for span in spans]).repeat_interleave(torch.tensor(queries)),
    )
