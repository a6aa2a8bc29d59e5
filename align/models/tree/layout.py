"""The token trie of a micro-batch as spans of rows, and each row's root path.

Shape legend: T rows (distinct tokens); of a part of a tree, its own rows after the shared rows that they attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from align.models.tree.sequence_group import SequenceGroup

Heads = tuple[Tensor, Tensor]  # keys and values, each [1, G, T, D]


@dataclass(frozen=True, slots=True)
class Span:
    """A node of the trie: rows [start, stop) without a branch; its descendants are [subtree_start, subtree_stop)."""

    start: int
    stop: int
    subtree_start: int  # `stop`, except of a shared span above a part of a tree
    subtree_stop: int
    ancestors: tuple[int, ...]  # indices of the spans above it, from the root down


@dataclass(frozen=True, slots=True)
class PathIndex:
    """Root paths as gathered rows, in the format of variable-length attention."""

    kv_rows: Tensor  # int64, for each span the rows of its ancestors and then its own
    cu_queries: Tensor  # int32 [spans + 1], cumulative number of rows
    cu_keys: Tensor  # int32 [spans + 1], cumulative number of gathered rows
    max_queries: int
    max_keys: int
    # int64 [T]: a row is on the root paths of the rows in [subtree_starts, subtree_stops), itself included
    subtree_starts: Tensor
    subtree_stops: Tensor

    def to(self, device: torch.device) -> PathIndex:
        """Return the index with its tensors on `device`."""
        names = ("kv_rows", "cu_queries", "cu_keys", "subtree_starts", "subtree_stops")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """The rows that each row attends to: its root path.

    In a part of a tree the first `num_shared` rows have no queries; `shared` has their keys and values.
    """

    spans: tuple[Span, ...]
    num_rows: int
    max_depth: int  # length of the longest root path in tokens
    paths: PathIndex
    num_shared: int = 0
    shared: Mapping[nn.Module, Heads] | None = None  # by attention module
    record: Callable[[nn.Module, Tensor, Tensor], None] | None = None  # called with the keys and values of each module
    group: SequenceGroup | None = None  # of processes that split the rows that have queries

    @property
    def own_spans(self) -> tuple[Span, ...]:
        """Return the spans whose rows have queries."""
        return tuple(span for span in self.spans if span.start >= self.num_shared)

    def to(self, device: torch.device) -> TreeLayout:
        """Return the layout with its tensors on `device`."""
        return replace(self, paths=self.paths.to(device))


def tree_layout(parents_T: np.ndarray, *, max_depth: int) -> TreeLayout:
    """Return the layout of rows in depth-first order; `parents_T` holds the row of each row's parent, -1 at a root."""
    spans = _spans(parents_T)
    return TreeLayout(spans, len(parents_T), max_depth, path_index(spans))


def _spans(parents_T: np.ndarray) -> tuple[Span, ...]:
    """Return the nodes of the trie in depth-first order; a node ends where the path branches."""
    num_rows = len(parents_T)
    children = np.bincount(parents_T + 1, minlength=num_rows + 1)  # of the root (index 0) and of each row
    follows = (parents_T == np.arange(num_rows) - 1) & (children[parents_T + 1] == 1)
    starts = np.flatnonzero(~follows | (np.arange(num_rows) == 0))
    stops = np.append(starts[1:], num_rows)
    span_of_row = np.repeat(np.arange(len(starts)), stops - starts)
    parent_spans = [int(span_of_row[parent]) if parent >= 0 else -1 for parent in parents_T[starts]]
    subtree_stops = stops.copy()
    ancestors: list[tuple[int, ...]] = []
    for span, parent in enumerate(parent_spans):
        ancestors.append((*ancestors[parent], parent) if parent >= 0 else ())
        for ancestor in ancestors[span]:
            subtree_stops[ancestor] = stops[span]
    columns = zip(starts.tolist(), stops.tolist(), stops.tolist(), subtree_stops.tolist(), ancestors, strict=True)
    return tuple(Span(*column) for column in columns)


def path_index(spans: Sequence[Span], num_shared: int = 0) -> PathIndex:
    """Return the root paths of the rows from `num_shared` on."""
    first = sum(span.start < num_shared for span in spans)
    rows = [
        np.concatenate([np.arange(spans[node].start, spans[node].stop) for node in (*span.ancestors, index)])
        for index, span in enumerate(spans[first:], start=first)
    ]
    lengths = [span.stop - span.start for span in spans]
    queries = lengths[first:]
    keys = [len(each) for each in rows]
    starts = np.arange(sum(lengths))
    for span in spans[:first]:
        starts[span.start : span.stop] = span.subtree_start
    return PathIndex(
        kv_rows=torch.from_numpy(np.concatenate(rows)),
        cu_queries=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        cu_keys=torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
        max_queries=max(queries),
        max_keys=max(keys),
        subtree_starts=torch.from_numpy(starts),
        subtree_stops=torch.tensor([span.subtree_stop for span in spans]).repeat_interleave(torch.tensor(lengths)),
    )
