"""Token log-probabilities from hidden states and the LM head's weight, one tile of the vocabulary at a time.

Shape legend: N positions with a target, D width, V vocabulary, J tiles of the vocabulary.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

# Elements of one tile of logits on a CPU: 4 MiB in fp32, which fits in the L2 cache
TILE_CPU = 1 << 20
# On a GPU larger tiles keep the matrix product busy: 256 MiB in fp32, half of a tile of TRL 1.16 (4096 x 32768)
TILE_GPU = 1 << 26
TILE_MULTIPLE = 64  # tile widths are multiples of this; matrix products over odd widths are slower
MAX_ROWS = 8192  # maximum number of positions in a tile, so that tiles do not become narrow


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitTransform:
    """What a model does to its logits after the LM head: multiply by `scale`, then cap * tanh(logit / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    def forward(self, logits: Tensor) -> Tensor:
        """Transform the logits in place and return them."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Return the derivative of the transformed logits with respect to the raw ones."""
        if self.softcap:
            return (1 - (transformed / self.softcap).square()) * self.scale
        return self.scale


def token_logps(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, transform: LogitTransform
) -> Tensor:
    """Compute log softmax(hidden @ weight.T + bias)[target], shape [N], in fp32 (fp64 for fp64 inputs).

    At most one tile of logits is in memory; the backward pass recomputes each tile. Under autocast the products of both
    passes run in its dtype, as those of a linear layer do.
    """
    if torch.is_autocast_enabled(hidden_ND.device.type):
        hidden_ND = hidden_ND.to(torch.get_autocast_dtype(hidden_ND.device.type))
    return cast(Tensor, _TokenLogps.apply(hidden_ND, weight_VD, bias_V, targets_N, transform))


def patch_lm_head(head: nn.Linear, transform: LogitTransform) -> None:
    """Make `head(hidden, targets=...)` return log-probabilities from within the LM head's own forward.

    ZeRO-3 and FSDP gather a module's weight for its forward and backward, so the weight must be used inside it.
    """

    def forward(self: nn.Linear, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return token_logps(hidden, self.weight, self.bias, targets, transform)

    head.forward = types.MethodType(forward, head)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
    ) -> Tensor:
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        tiles = _tiles(hidden_ND, weight_VD)
        lse_JN = hidden_ND.new_empty(len(tiles), len(hidden_ND), dtype=dtype)
        target_N = hidden_ND.new_zeros(len(hidden_ND), dtype=dtype)
        for rows in _row_blocks(hidden_ND):
            for tile, columns in enumerate(tiles):
                logits = _logits(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                # The largest probability is 1 / sum(exp(logit - max)); softmax is the fastest way to exponentiate
                lse_JN[tile, rows] = logits.amax(dim=-1) - logits.softmax(dim=-1).amax(dim=-1).log()
                # From the same rounded logits, so that in bf16 too a token of probability 1 has log-probability 0
                column_N1, inside_N1 = _column(targets_N[rows], columns)
                target_N[rows] += logits.gather(1, column_N1).masked_fill_(~inside_N1, 0).squeeze(1)
        lse_N = lse_JN.logsumexp(dim=0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, lse_JN, lse_N)
        ctx.transform = transform
        return target_N - lse_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        hidden_ND, weight_VD, bias_V, targets_N, lse_JN, lse_N = ctx.saved_tensors
        transform, dtype, grad_N = ctx.transform, lse_N.dtype, grads[0]
        need_weight, need_bias = ctx.needs_input_grad[1:3]
        d_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=dtype) if need_bias else None
        # Softmax within a tile times the tile's share of the whole sum; the target's 1 is subtracted before rounding
        share_JN = -grad_N * (lse_JN - lse_N).exp()
        for rows in _row_blocks(hidden_ND):
            for tile, columns in enumerate(_tiles(hidden_ND, weight_VD)):
                logits = _logits(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                d_logits = logits.softmax(dim=-1).mul_(share_JN[tile, rows, None])
                column_N1, inside_N1 = _column(targets_N[rows], columns)
                d_logits.scatter_add_(1, column_N1, grad_N[rows, None] * inside_N1)
                if transform.scale != 1.0 or transform.softcap:
                    d_logits = d_logits.mul_(transform.slope(logits))
                if d_bias_V is not None:
                    d_bias_V[columns] += d_logits.sum(dim=0)
                d_logits = d_logits.to(hidden_ND.dtype)
                _add_product(d_hidden_ND[rows], d_logits, weight_VD[columns].to(hidden_ND.dtype))
                if d_weight_VD is not None:
                    _add_product(d_weight_VD[columns], d_logits.T, hidden_ND[rows])
        d_weight = d_weight_VD.to(weight_VD.dtype) if d_weight_VD is not None else None
        d_bias = d_bias_V.to(bias_V.dtype) if d_bias_V is not None else None
        return d_hidden_ND.to(hidden_ND.dtype), d_weight, d_bias, None, None


def _logits(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    columns: slice,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> Tensor:
    """Return one tile of transformed logits in `dtype`, in which sums are accumulated."""
    logits = (hidden @ weight_VD[columns].to(hidden.dtype).T).to(dtype)
    if bias_V is not None:
        logits += bias_V[columns].to(dtype)
    return transform.forward(logits)


def _column(targets_N: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the column of each target in a tile (0 if it is outside) and whether it is inside, both [N, 1]."""
    column_N1 = targets_N[:, None] - columns.start
    inside_N1 = (column_N1 >= 0) & (column_N1 < columns.stop - columns.start)
    return column_N1 * inside_N1, inside_N1


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _row_blocks(hidden_ND: Tensor) -> list[slice]:
    num_blocks = -(-len(hidden_ND) // MAX_ROWS)
    return [slice(block * MAX_ROWS, (block + 1) * MAX_ROWS) for block in range(num_blocks)]


def _tiles(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """Return slices of the vocabulary, so that a tile of logits has at most the device's number of elements."""
    elements = TILE_GPU if hidden_ND.is_cuda else TILE_CPU
    width = elements // max(1, min(len(hidden_ND), MAX_ROWS))
    width = max(1, width - width % TILE_MULTIPLE) if width > TILE_MULTIPLE else max(1, width)
    return [slice(start, min(start + width, len(weight_VD))) for start in range(0, len(weight_VD), width)]
