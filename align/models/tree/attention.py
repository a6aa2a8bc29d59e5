"""Attention over root paths, registered with transformers as `align_tree`.

On CPU: blocks through PyTorch's flash kernel. On CUDA in half precision: variable-length attention. Elsewhere, and for
soft-capped scores: plain matrices, one of all rows on a GPU if it is small, else one for each span.

Shape legend: H query heads, T rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from align.errors import InputError
from align.models.tree.kernels import BlockAttention, dense_attention, span_attention, varlen_attention
from align.models.tree.layout import TreeLayout

NAME = "align_tree"
FORWARD = ("policy", "forward")

# Keywords that models pass and that do not change attention over a layout. Any other keyword that is set (sinks as
# `s_aux`, `position_bias`, ...) raises an error, so that none is ignored.
_IGNORED = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
    "tree_cu_seqlens_q",  # the same trie in the form that recurrent layers read
    "tree_segment_parents",
}
_SUPPORTED = {"softcap", "sliding_window"}
_VARLEN_WIDTHS = range(8, 257, 8)  # head widths that PyTorch's CUDA flash kernel accepts without padding
# Largest number of scores in one dense matrix: 256 MiB in fp32, as for a tile of the LM head on a GPU
DENSE_SCORES = 1 << 26
_calls = {"tree": 0}  # attention calls that received a layout


def call_count() -> int:
    """Return how many times tree attention has run in this process; the start-up probe compares it with the layers."""
    return _calls["tree"]


def tree_attention(  # noqa: PLR0913 - the signature of transformers' AttentionInterface
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
    """Return the attention of every row to its root path, [1, T, H, D]; raise `InputError` for unsupported features."""
    if tree is None:
        raise InputError(
            f"{type(module).__name__} does not pass forward keywords on to its attention; use 'plain'", FORWARD
        )
    check_supported(module, tree, attention_mask, dropout, kwargs)
    _calls["tree"] += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    softcap = cast("float | None", kwargs.get("softcap"))
    if tree.group is None:
        key, value = _with_shared(module, key, value, tree)
        return _attend(query, key, value, tree, scale, softcap), None
    own = [_kernel_input(each) for each in (query, key, value)]
    query, key, value = tree.group.to_heads(own, tree.num_rows - tree.num_shared)
    key, value = _with_shared(module, key, value, tree)
    return tree.group.to_rows(_attend(query, key, value, tree, scale, softcap)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, tree: TreeLayout, scale: float, softcap: float | None) -> Tensor:
    """Return the attention of every row to its root path, [1, T, H, D], by the kernel for the inputs.

    It is contiguous, as that of transformers' own implementations, since some models take views of it.
    """
    query, key, value = (_kernel_input(each) for each in (query, key, value))
    if not softcap and query.shape[-1] == value.shape[-1]:
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in _VARLEN_WIDTHS:
            return varlen_attention(query, key, value, tree, scale)
        if query.device.type == "cpu":
            blocks = cast("Callable[..., Tensor]", BlockAttention.apply)
            return blocks(query, key, value, tree, scale).transpose(1, 2).contiguous()
    is_small = query.device.type != "cpu" and query.shape[1] * query.shape[2] * tree.num_rows <= DENSE_SCORES
    matrices = dense_attention if is_small else span_attention
    return matrices(query, key, value, tree, scale, softcap).transpose(1, 2).contiguous()


def check_supported(
    module: nn.Module, tree: TreeLayout, attention_mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raise `InputError` for anything that would change the result and that tree attention does not compute."""
    reason = None
    window = kwargs.get("sliding_window")
    if attention_mask is not None:
        reason = "an attention mask"
    elif dropout:
        reason = f"active attention dropout ({dropout})"
    elif window is not None and window < tree.max_depth:
        reason = f"a sliding window of {window} tokens, shorter than the longest sequence ({tree.max_depth})"
    elif unknown := [name for name in kwargs.keys() - _IGNORED - _SUPPORTED if kwargs[name] is not None]:
        reason = f"attention with {sorted(unknown)[0]}"
    elif kwargs.get("is_causal") is False:
        reason = "attention that is not causal"
    if reason:
        raise InputError(f"{type(module).__name__}: the tree forward does not support {reason}; use 'plain'", FORWARD)


def _with_shared(module: nn.Module, key: Tensor, value: Tensor, tree: TreeLayout) -> tuple[Tensor, Tensor]:
    """Return the keys and values, after those of the shared rows if the layout is that of a part of a tree."""
    if tree.record is not None:
        tree.record(module, key, value)
    if tree.shared is None:
        return key, value
    shared_key, shared_value = tree.shared[module]
    return torch.cat([shared_key, key], dim=2), torch.cat([shared_value, value], dim=2)


def _kernel_input(heads: Tensor) -> Tensor:
    """Return the tensor in autocast's dtype, as PyTorch's own attention would use it, with a contiguous last dimension.

    Rotary embeddings return fp32 queries and keys next to half-precision values, and the kernels read out of bounds if
    the last dimension is strided.
    """
    if torch.is_autocast_enabled(heads.device.type):
        heads = heads.to(torch.get_autocast_dtype(heads.device.type))
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _no_mask(*_: object, **__: object) -> None:
    """Return no mask; the layout defines which rows attend to which."""


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
