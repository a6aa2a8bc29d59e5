"""Attention over root paths, registered with transformers as `align_tree`.

Three ways, one meaning. On CPU each span attends to itself causally and each subtree to the span above it without a
mask, and the blocks are joined by their log-sum-exp (Dao et al. 2022, FlashAttention, sec. 3.1); on CUDA in half
precision, variable-length attention over gathered root paths; elsewhere, and for soft-capped scores, plain matrices:
one of all rows against all on a GPU where that is small, else one a span.

Shape legend: B = 1, H query heads, G key heads, T rows, D head width, M rows of a root path.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from align.errors import InputError
from align.models.tree import Span, TreeLayout

NAME = "align_tree"

# Keywords that models pass along and that change nothing about what attention computes over a layout. Any other
# keyword that is set (sinks as `s_aux`, `position_bias`, ...) is refused by name, so that none is swallowed.
_WITHOUT_EFFECT = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
}
_HONOURED = {"softcap", "sliding_window"}
# PyTorch 2.11 takes grouped heads without being asked; later versions ask.
_GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_VARLEN_WIDTHS = range(8, 257, 8)  # head widths that PyTorch's CUDA flash kernel takes without padding
# Scores that one matrix may have: 256 MiB in fp32, as a tile of the LM head on a GPU.
DENSE_SCORES = 1 << 26
_calls = {"tree": 0}  # attention calls that saw a layout; read by the start-up probe


def calls() -> int:
    """How often attention ran over a tree in this process."""
    return _calls["tree"]


def tree_attention(  # noqa: PLR0913 - the signature is transformers' AttentionInterface
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeLayout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of every row to its root path, [1, T, H, D]; what it cannot honour it refuses."""
    if tree is None:
        raise InputError(
            f"{type(module).__name__} does not hand forward keywords to its attention, so the tree never reached it: "
            "set policy.forward to 'plain'"
        )
    refuse(module, tree, attention_mask, dropout, kwargs)
    _calls["tree"] += 1
    query, key, value = (_ready(each) for each in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    softcap = cast("float | None", kwargs.get("softcap"))
    if not softcap and query.shape[-1] == value.shape[-1]:
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in _VARLEN_WIDTHS:
            return varlen_attention(query, key, value, tree, scale), None
        if query.device.type == "cpu":
            blocks = cast("Callable[..., Tensor]", BlockAttention.apply)
            return blocks(query, key, value, tree, scale).transpose(1, 2), None
    is_small = query.device.type != "cpu" and query.shape[1] * tree.num_rows**2 <= DENSE_SCORES
    matrices = dense_attention if is_small else matrix_attention
    return matrices(query, key, value, tree, scale, softcap).transpose(1, 2), None


def refuse(
    module: nn.Module, tree: TreeLayout, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raise for anything that would change the result and that attention over root paths does not do."""
    reason = None
    window = kwargs.get("sliding_window")
    if attention_mask is not None:
        reason = "an attention mask"
    elif dropout:
        reason = f"active attention dropout ({dropout})"
    elif window is not None and window < tree.max_depth:
        reason = f"a sliding window of {window} tokens, shorter than the longest sequence ({tree.max_depth})"
    elif unknown := [name for name in kwargs.keys() - _WITHOUT_EFFECT - _HONOURED if kwargs[name] is not None]:
        reason = f"attention with {sorted(unknown)[0]}"
    elif kwargs.get("is_causal") is False:
        reason = "attention that is not causal"
    if reason:
        raise InputError(
            f"{type(module).__name__}: the tree forward does not do {reason}: set policy.forward to 'plain'"
        )


def _ready(heads: Tensor) -> Tensor:
    """In autocast's dtype, as PyTorch's own attention would take it, with each head's row in one piece.

    Rotary embeddings leave fp32 queries and keys beside half-precision values, and the kernels read past a last
    dimension that is not in one piece.
    """
    if torch.is_autocast_enabled(heads.device.type):
        heads = heads.to(torch.get_autocast_dtype(heads.device.type))
    return heads if heads.stride(-1) == 1 else heads.contiguous()


class BlockAttention(torch.autograd.Function):
    """Attention over root paths as unmasked and causal blocks, each by PyTorch's CPU flash kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float) -> Tensor:  # noqa: ANN401
        """[1, H, T, D]: each block's output weighted by its share of the row's exponential sum."""
        groups = query.shape[1] // key.shape[1]
        keys, values = _repeat(key, groups), _repeat(value, groups)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:3], dtype=_lse_dtype(query))
        for span in tree.spans:
            own = slice(span.start, span.stop)
            output[:, :, own], lse[:, :, own] = _flash(query, keys, values, own, own, scale)
        for span, below in _inner(tree):
            part, part_lse = _flash(query, keys, values, below, slice(span.start, span.stop), scale)
            joined = torch.logaddexp(lse[:, :, below], part_lse)
            weight = (part_lse - joined).exp_().unsqueeze(-1)
            output[:, :, below] = torch.lerp(output[:, :, below].to(weight.dtype), part.to(weight.dtype), weight)
            lse[:, :, below] = joined
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.tree, ctx.scale = tree, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of query, key and value; with the joined output and log-sum-exp each block's backward is exact."""
        query, key, value, output, lse = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        keys, values, grad = _repeat(key, groups), _repeat(value, groups), grads[0].contiguous()
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = torch.empty_like(keys), torch.empty_like(values)

        def block(rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, rows],
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                output[:, :, rows],
                lse[:, :, rows],
                0.0,
                rows == columns,
                scale=ctx.scale,
            )

        for span in ctx.tree.spans:
            own = slice(span.start, span.stop)
            d_query[:, :, own], d_key[:, :, own], d_value[:, :, own] = block(own, own)
        for span, below in _inner(ctx.tree):
            own = slice(span.start, span.stop)
            for total, rows, part in zip((d_query, d_key, d_value), (below, own, own), block(below, own), strict=True):
                total[:, :, rows] += part
        return d_query, _fold(d_key, groups), _fold(d_value, groups), None, None


def _inner(tree: TreeLayout) -> list[tuple[Span, slice]]:
    """Every span that branches, with the rows below it."""
    return [(span, slice(span.stop, span.subtree_stop)) for span in tree.spans if span.subtree_stop > span.stop]


def _flash(
    query: Tensor, key: Tensor, value: Tensor, rows: slice, columns: slice, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block; the diagonal block is causal."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, rows == columns, scale=scale
    )


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _repeat(key: Tensor, groups: int) -> Tensor:
    """Each key head as often as query heads share it, [1, H, T, D]."""
    return key.repeat_interleave(groups, dim=1) if groups > 1 else key


def _fold(grad: Tensor, groups: int) -> Tensor:
    """The sum of a repeated head's gradients, [1, G, T, D]."""
    return grad.unflatten(1, (-1, groups)).sum(dim=2) if groups > 1 else grad


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeLayout,
    scale: float,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """[1, T, H, D] by variable-length attention: a span's queries against its gathered root path.

    Queries stand at the end of their keys, and causal alignment is bottom right, so a row sees its path up to itself.
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


def matrix_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float, softcap: float | None
) -> Tensor:
    """[1, H, T, D] by plain matrices, a span at a time."""
    groups = query.shape[1] // key.shape[1]
    keys, values = _repeat(key, groups), _repeat(value, groups)
    outputs: list[Tensor] = []
    lengths = [span.stop - span.start for span in tree.spans]
    reach = [sum(lengths[node] for node in span.ancestors) + span.stop - span.start for span in tree.spans]
    rows_of_span = tree.paths.kv_rows.split(reach)
    for span, length, rows_M in zip(tree.spans, lengths, rows_of_span, strict=True):
        future = torch.ones(length, len(rows_M), dtype=torch.bool, device=query.device)
        future = future.triu(len(rows_M) - length + 1)
        own = query[:, :, span.start : span.stop]
        outputs.append(_attended(own, keys[:, :, rows_M], values[:, :, rows_M], future, scale, softcap))
    return torch.cat(outputs, dim=2)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float, softcap: float | None
) -> Tensor:
    """[1, H, T, D] by one matrix of all rows against all, which is made again in the backward pass and not kept."""
    groups = query.shape[1] // key.shape[1]
    rows_T = torch.arange(tree.num_rows, device=query.device)
    # A row's root path: those before it whose subtree has not ended.
    off_path_TT = (rows_T > rows_T[:, None]) | (tree.paths.subtree_stops <= rows_T[:, None])
    heads = (query, _repeat(key, groups), _repeat(value, groups))
    return cast(
        Tensor,
        checkpoint(_attended, *heads, off_path_TT, scale, softcap, use_reentrant=False, preserve_rng_state=False),
    )


def _attended(  # noqa: PLR0913 - a formula's terms
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Softmax over what is not hidden; soft-capping as cap * tanh(score / cap) (Gemma 2, sec. 2)."""
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1, dtype=_lse_dtype(query))
    return weights.to(query.dtype) @ values


def _no_mask(*_: object, **__: object) -> None:
    """The layout says who sees whom; no mask is made."""


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
