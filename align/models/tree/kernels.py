"""Kernels of attention over root paths.

- `BlockAttention`: unmasked and causal blocks through PyTorch's CPU flash kernel, joined by their log-sum-exp (Dao et
  al. 2022, FlashAttention, sec. 3.1).
- `varlen_attention`: variable-length flash attention on CUDA over gathered root paths.
- `span_attention`, `dense_attention`: plain matrices, one for each span or one for all rows.

Shape legend: H query heads, G key heads, T rows, Q rows with queries, D head width, M rows of a root path. Inputs are
[1, H, Q, D] and [1, G, T, D]; Q is T except in a part of a tree (`align.models.tree.parts`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from align.models.tree.layout import TreeLayout

# PyTorch 2.11 always supports grouped heads; later versions require a keyword
_GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class BlockAttention(torch.autograd.Function):
    """Attention over root paths as unmasked and causal blocks, each through PyTorch's CPU flash kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float) -> Tensor:  # noqa: ANN401
        """Return [1, H, Q, D]: the blocks' outputs weighted by their share of each row's sum of exponentials."""
        groups = query.shape[1] // key.shape[1]
        keys, values = _repeat(key, groups), _repeat(value, groups)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:3], dtype=_accumulation_dtype(query))
        for own, columns in _own_blocks(tree):
            output[:, :, own], lse[:, :, own] = _flash(query, keys, values, own, columns, scale, is_causal=True)
        for below, columns in _blocks_below(tree):
            part, part_lse = _flash(query, keys, values, below, columns, scale)
            joined = torch.logaddexp(lse[:, :, below], part_lse)
            weight = (part_lse - joined).exp_().unsqueeze(-1)
            output[:, :, below] = torch.lerp(output[:, :, below].to(weight.dtype), part.to(weight.dtype), weight)
            lse[:, :, below] = joined
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.tree, ctx.scale = tree, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients of query, key and value.

        Given the joined output and log-sum-exp, the backward pass of each block is exact.
        """
        query, key, value, output, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        keys, values, grad = _repeat(key, groups), _repeat(value, groups), grads[0].contiguous()
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = torch.empty_like(keys), torch.empty_like(values)
        for total in (d_key, d_value):  # shared rows have no block of their own
            total[:, :, : ctx.tree.num_shared] = 0

        def block(rows: slice, columns: slice, *, is_causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, rows],
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                is_causal,
                scale=ctx.scale,
            )

        for own, columns in _own_blocks(ctx.tree):
            d_query[:, :, own], d_key[:, :, columns], d_value[:, :, columns] = block(own, columns, is_causal=True)
        for below, columns in _blocks_below(ctx.tree):
            parts = zip((d_query, d_key, d_value), (below, columns, columns), block(below, columns), strict=True)
            for total, rows, part in parts:
                total[:, :, rows] += part
        return d_query, _fold(d_key, groups), _fold(d_value, groups), None, None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeLayout,
    scale: float,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Return [1, Q, H, D]: each span's queries attend to its gathered root path.

    The queries of a span are the last rows of its path, and causal masks are aligned at the bottom right, so each row
    attends to its path up to itself.
    """
    paths = tree.paths
    query_THD, key_TGD, value_TGD = (each[0].transpose(0, 1) for each in (query, key, value))
    output_THD = kernel(
        query_THD.contiguous(),
        key_TGD.index_select(0, paths.kv_rows),
        value_TGD.index_select(0, paths.kv_rows),
        paths.cu_queries,
        paths.cu_keys,
        paths.max_queries,
        paths.max_keys,
        scale=scale,
        window_size=(-1, 0),
        **_GROUPED_HEADS,
    )
    return output_THD[None]


def span_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float, softcap: float | None
) -> Tensor:
    """Return [1, H, Q, D], computed with one score matrix for each span, which the backward pass recomputes."""
    groups = query.shape[1] // key.shape[1]
    keys, values = _repeat(key, groups), _repeat(value, groups)
    outputs: list[Tensor] = []
    lengths = [span.stop - span.start for span in tree.spans]
    path_lengths = [sum(lengths[node] for node in span.ancestors) + span.stop - span.start for span in tree.own_spans]
    rows_of_span = tree.paths.kv_rows.split(path_lengths)
    for (rows, _), rows_M in zip(_own_blocks(tree), rows_of_span, strict=True):
        length = rows.stop - rows.start
        future = torch.ones(length, len(rows_M), dtype=torch.bool, device=query.device)
        future = future.triu(len(rows_M) - length + 1)
        own = query[:, :, rows]
        outputs.append(_recomputed(own, keys[:, :, rows_M], values[:, :, rows_M], future, scale, softcap))
    return torch.cat(outputs, dim=2)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float, softcap: float | None
) -> Tensor:
    """Return [1, H, Q, D], computed with one score matrix of all rows, which the backward pass recomputes."""
    groups = query.shape[1] // key.shape[1]
    queries_Q1 = torch.arange(tree.num_shared, tree.num_rows, device=query.device)[:, None]
    # The root path of a row: the rows whose subtree it is in
    off_path_QT = (tree.paths.subtree_starts > queries_Q1) | (tree.paths.subtree_stops <= queries_Q1)
    heads = (query, _repeat(key, groups), _repeat(value, groups))
    return _recomputed(*heads, off_path_QT, scale, softcap)


def _recomputed(*terms: Tensor | float | None) -> Tensor:
    """Return the attention of these terms, of which no scores are kept for the backward pass."""
    found = checkpoint(_masked_attention, *terms, use_reentrant=False, preserve_rng_state=False)
    return cast(Tensor, found)


def _masked_attention(  # noqa: PLR0913 - the terms of a formula
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Return softmax attention except where `hidden`; soft-capping is cap * tanh(score / cap) (Gemma 2, sec. 2)."""
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1, dtype=_accumulation_dtype(query))
    return weights.to(query.dtype) @ values


def _own_blocks(tree: TreeLayout) -> list[tuple[slice, slice]]:
    """Return the causal blocks: the queries of every span that has queries, and its keys."""
    return [
        (slice(span.start - tree.num_shared, span.stop - tree.num_shared), slice(span.start, span.stop))
        for span in tree.own_spans
    ]


def _blocks_below(tree: TreeLayout) -> list[tuple[slice, slice]]:
    """Return the unmasked blocks: the queries below every span that has descendants, and the keys of the span."""
    return [
        (slice(span.subtree_start - tree.num_shared, span.subtree_stop - tree.num_shared), slice(span.start, span.stop))
        for span in tree.spans
        if span.subtree_stop > span.subtree_start
    ]


def _flash(  # noqa: PLR0913 - the terms of a block
    query: Tensor, key: Tensor, value: Tensor, rows: slice, columns: slice, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the output and log-sum-exp of one block."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, is_causal, scale=scale
    )


def _accumulation_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _repeat(key: Tensor, groups: int) -> Tensor:
    """Return each key head repeated for the query heads that share it, [1, H, T, D]."""
    return key.repeat_interleave(groups, dim=1) if groups > 1 else key


def _fold(grad: Tensor, groups: int) -> Tensor:
    """Return the sum of the gradients of a repeated head, [1, G, T, D]."""
    return grad.unflatten(1, (-1, groups)).sum(dim=2) if groups > 1 else grad
