"""Log-probabilities of K given tokens at each position and of all others together, tile by tile of the vocabulary.

Shape legend: N positions, D width, V vocabulary, J tiles, K tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from align.models.lm_head.logprobs import (
    HeadGradients,
    LogitTransform,
    columns_of,
    logits_of,
    product_input,
    row_blocks,
    sum_dtype,
    tiles_of,
)


def set_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    tokens_NK: Tensor,
    transform: LogitTransform,
) -> Tensor:
    """Return the log-probability of the target, of each of K distinct tokens, and of all but these K together.

    Shape [N, K + 2], in fp32 (fp64 for fp64 inputs). The last is -inf where K = V. At most one tile of logits is in
    memory, and the backward pass recomputes it, as in `token_logps`.
    """
    hidden_ND = product_input(hidden_ND)
    ids_NK = torch.cat([targets_N[:, None], tokens_NK], dim=1)
    return cast(Tensor, _SetLogps.apply(hidden_ND, weight_VD, bias_V, ids_NK, transform))


@torch.no_grad()
def top_tokens(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, number: int, transform: LogitTransform
) -> Tensor:
    """Return the `number` most likely tokens of each position, int64 [N, K], the most likely first."""
    hidden_ND = product_input(hidden_ND)
    found: list[Tensor] = []
    for rows in row_blocks(hidden_ND):
        best = hidden_ND.new_empty(len(hidden_ND[rows]), 0, dtype=sum_dtype(hidden_ND))
        ids = torch.empty_like(best, dtype=torch.int64)
        for columns in tiles_of(hidden_ND, weight_VD):
            logits = logits_of(hidden_ND[rows], weight_VD, bias_V, columns, transform, best.dtype)
            values, places = logits.topk(min(number, logits.shape[1]), dim=1)
            best, ids = torch.cat([best, values], dim=1), torch.cat([ids, places + columns.start], dim=1)
            best, kept = best.topk(min(number, best.shape[1]), dim=1)
            ids = ids.gather(1, kept)
        found.append(ids)
    return torch.cat(found) if found else torch.empty(0, number, dtype=torch.int64, device=hidden_ND.device)


class _SetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_NK: Tensor,  # the target, then the tokens
        transform: LogitTransform,
    ) -> Tensor:
        dtype = sum_dtype(hidden_ND)
        tiles = tiles_of(hidden_ND, weight_VD)
        lse_JN = hidden_ND.new_empty(len(tiles), len(hidden_ND), dtype=dtype)
        rest_JN = torch.empty_like(lse_JN)
        logits_NK = hidden_ND.new_zeros(ids_NK.shape, dtype=dtype)
        for rows in row_blocks(hidden_ND):
            for tile, columns in enumerate(tiles):
                logits = logits_of(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                column_NK, inside_NK = columns_of(ids_NK[rows], columns)
                logits_NK[rows] += logits.gather(1, column_NK).masked_fill_(~inside_NK, 0)
                lse_JN[tile, rows] = logits.logsumexp(dim=-1)
                rest_JN[tile, rows] = _without(logits, column_NK, inside_NK).logsumexp(dim=-1)
        lse_N, rest_N = lse_JN.logsumexp(dim=0), rest_JN.logsumexp(dim=0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK, lse_N, rest_N)
        ctx.transform = transform
        return torch.cat([logits_NK, rest_N[:, None]], dim=1) - lse_N[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        hidden_ND, weight_VD, bias_V, ids_NK, lse_N, rest_N = ctx.saved_tensors
        transform = ctx.transform
        dtype = lse_N.dtype
        grad_NK = grads[0]
        gradients = HeadGradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[1:3], dtype)
        total_N = grad_NK.sum(dim=1)
        # No token is left where the rest has no probability
        rest_grad_N = grad_NK[:, -1].masked_fill(rest_N.isneginf(), 0)
        rest_N = rest_N.masked_fill(rest_N.isneginf(), 0)
        for rows in row_blocks(hidden_ND):
            for columns in tiles_of(hidden_ND, weight_VD):
                logits = logits_of(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                column_NK, inside_NK = columns_of(ids_NK[rows], columns)
                rest = _without(logits, column_NK, inside_NK).sub_(rest_N[rows, None]).exp_()
                d_logits = rest.mul_(rest_grad_N[rows, None])
                d_logits -= (logits - lse_N[rows, None]).exp_().mul_(total_N[rows, None])
                d_logits.scatter_add_(1, column_NK, grad_NK[rows, :-1] * inside_NK)
                if transform.scale != 1.0 or transform.softcap:
                    d_logits = d_logits.mul_(transform.slope(logits))
                gradients.add(rows, columns, d_logits)
        return *gradients.results(), None, None


def _without(logits: Tensor, column_NK: Tensor, inside_NK: Tensor) -> Tensor:
    """Return a copy of a tile of logits with -inf at the tokens, which follow the target."""
    removed_NK = torch.zeros_like(column_NK, dtype=logits.dtype).masked_fill_(inside_NK, -torch.inf)
    return logits.scatter_add(1, column_NK[:, 1:], removed_NK[:, 1:])
