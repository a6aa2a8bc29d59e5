"""A tree larger than a forward pass may be, in parts: the rows that sequences share run once, then the others in turn.

The keys and values of the shared rows are kept for all parts, and their gradients are added up over the parts, so the
backward pass of the shared rows also runs once. A part's own activations are dropped after its forward pass and
computed again in its backward pass, except those of the last one, whose backward pass comes first. The results are
those of the whole tree (schedule-level reuse: arXiv:2606.01143).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from align.errors import InputError
from align.models.tree.batch import TokenBatch
from align.models.tree.layout import Heads, Span, TreeLayout, path_index


class Part(NamedTuple):
    """Some rows of a tree as a batch of their own, and which outputs of the whole batch it has."""

    batch: TokenBatch
    targets: Tensor  # int64, indices among the N targets
    sequences: Tensor  # int64, indices among the S sequences: those whose last token is in the part


def cut_batch(batch: TokenBatch, max_rows: int) -> list[Part]:
    """Return the rows that sequences share, if there are any, and then parts of the others; [] if all fit in one pass.

    The others are the leaves of the trie. A part takes as many as fit in `max_rows` with the shared rows, but at least
    one, and at least half of `max_rows`, so that a long prompt does not lead to tiny parts.
    """
    layout = batch.layout
    if layout is None or layout.num_rows <= max_rows:
        return []
    is_leaf = [span.subtree_stop == span.stop for span in layout.spans]
    inner = [index for index, leaf in enumerate(is_leaf) if not leaf]
    num_shared = sum(_length(layout.spans[index]) for index in inner)
    parts = _deal(
        layout, [index for index, leaf in enumerate(is_leaf) if leaf], max(max_rows - num_shared, max_rows // 2)
    )
    if len(parts) == 1:
        return []
    found = [_select(batch, inner, _shared_layout(layout, inner))] if inner else []
    return [*found, *(_select(batch, part, _part_layout(layout, inner, part)) for part in parts)]


def rows_held(batch: TokenBatch, max_rows: int) -> int:
    """Return the rows whose activations are in memory at once: all, or the shared ones with the largest part."""
    parts = [part.batch for part in cut_batch(batch, max_rows)]
    num_shared = cast(TreeLayout, parts[-1].layout).num_shared if parts else 0
    largest = max((part.num_tokens for part in parts[num_shared > 0 :]), default=batch.num_tokens)
    return num_shared + largest


def run_parts(parts: Sequence[Part], run: Callable[[TokenBatch], Tensor]) -> list[Tensor]:
    """Return `run` of each part, which applies a decoder whose attention is `tree_attention`."""
    shared = _SharedHeads()
    outputs = list[Tensor]()
    heads: dict[nn.Module, Heads] = {}
    has_shared = cast(TreeLayout, parts[-1].batch.layout).num_shared > 0
    for number, part in enumerate(parts, start=1):
        batch = part.batch
        layout = cast(TreeLayout, batch.layout)
        # A cast weight would be kept for all parts, and its gradient added up in half precision
        torch.clear_autocast_cache()
        if has_shared and number == 1:
            outputs.append(run(replace(batch, layout=replace(layout, record=shared.record))))
            heads = shared.take()
            continue
        batch = replace(batch, layout=replace(layout, shared=heads if layout.num_shared else None))
        if torch.is_grad_enabled() and number < len(parts):
            again = checkpoint(run, batch, use_reentrant=False, preserve_rng_state=False)
            outputs.append(cast(Tensor, again))
        else:
            outputs.append(run(batch))
    return outputs


class _SharedHeads:
    """Collects the keys and values of the shared rows by attention module."""

    def __init__(self) -> None:
        self._heads: dict[nn.Module, Heads] | None = {}

    def record(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep a module's keys and values; those that gradient checkpointing computes again later are not needed."""
        if self._heads is None:
            return
        if module in self._heads:
            raise InputError(f"{type(module).__name__} runs several times in a forward pass", ("policy", "forward"))
        self._heads[module] = (key, value)

    def take(self) -> dict[nn.Module, Heads]:
        """Return what was collected and forget it: the graph of the shared rows must not hold its own outputs."""
        heads = self._heads or {}
        self._heads = None
        return heads


def _deal(layout: TreeLayout, leaves: Sequence[int], room: int) -> list[list[int]]:
    """Return the leaves of each part, in depth-first order."""
    parts = list[list[int]]()
    filled = room
    for leaf in leaves:
        size = _length(layout.spans[leaf])
        if filled + size > room:
            parts.append([])
            filled = 0
        parts[-1].append(leaf)
        filled += size
    return parts


def _shared_layout(layout: TreeLayout, inner: Sequence[int]) -> TreeLayout:
    """Return the layout of the inner spans, a tree without the leaves."""
    before = _rows_before(layout, inner)
    new = {index: number for number, index in enumerate(inner)}
    spans: list[Span] = []
    for span in map(layout.spans.__getitem__, inner):
        stop = before[span.stop]
        spans.append(Span(before[span.start], stop, stop, before[span.subtree_stop], _renumbered(span, new)))
    return _layout(spans, layout)


def _part_layout(layout: TreeLayout, inner: Sequence[int], leaves: Sequence[int]) -> TreeLayout:
    """Return the layout of some leaves after all inner spans."""
    shared = _rows_before(layout, inner)
    new = {index: number for number, index in enumerate(inner)}
    num_shared = shared[layout.num_rows]
    own = [num_shared + number for number in _rows_before(layout, leaves)]
    spans: list[Span] = []
    for span in map(layout.spans.__getitem__, inner):
        below = own[span.stop], own[span.subtree_stop]
        spans.append(Span(shared[span.start], shared[span.stop], *below, _renumbered(span, new)))
    for span in map(layout.spans.__getitem__, leaves):
        stop = own[span.stop]
        spans.append(Span(own[span.start], stop, stop, stop, _renumbered(span, new)))
    return _layout(spans, layout, num_shared)


def _layout(spans: Sequence[Span], whole: TreeLayout, num_shared: int = 0) -> TreeLayout:
    num_rows = sum(map(_length, spans))
    layout = TreeLayout(tuple(spans), num_rows, whole.max_depth, path_index(spans, num_shared), num_shared)
    return layout.to(whole.paths.kv_rows.device)


def _select(batch: TokenBatch, spans: Sequence[int], layout: TreeLayout) -> Part:
    """Return the rows of these spans of the batch's tree as a part with the layout."""
    whole = cast(TreeLayout, batch.layout)
    device = batch.input_ids.device
    rows = torch.cat([torch.arange(whole.spans[index].start, whole.spans[index].stop) for index in spans]).to(device)
    place_T = torch.full((whole.num_rows,), -1, device=device)
    place_T[rows] = torch.arange(len(rows), device=device)
    place_N, place_S = place_T[batch.rows_N], place_T[batch.last_S]
    targets, sequences = (torch.nonzero(each >= 0)[:, 0] for each in (place_N, place_S))
    own = replace(
        batch,
        input_ids=batch.input_ids[:, rows],
        position_ids=batch.position_ids[:, rows],
        layout=layout,
        rows_N=place_N[targets],
        targets_N=batch.targets_N[targets],
        tokens_NK=None if batch.tokens_NK is None else batch.tokens_NK[targets],
        sequence_N=batch.sequence_N[targets],
        last_S=place_S[sequences],
        paths=(),
        key_T=batch.key_T[rows],
        num_tokens=len(rows),
    )
    return Part(own, targets, sequences)


def _rows_before(layout: TreeLayout, spans: Sequence[int]) -> list[int]:
    """Return for each row of the tree, and for its end, the number of rows of these spans before it."""
    is_in = np.zeros(layout.num_rows + 1, np.int64)
    for index in spans:
        is_in[layout.spans[index].start + 1 : layout.spans[index].stop + 1] = 1
    return is_in.cumsum().tolist()


def _renumbered(span: Span, new: dict[int, int]) -> tuple[int, ...]:
    return tuple(new[node] for node in span.ancestors)


def _length(span: Span) -> int:
    return span.stop - span.start
