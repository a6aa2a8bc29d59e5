"""Token log-probabilities from hidden states and the LM head's weight, one tile of the vocabulary at a time.

Shape legend: N positions with a target, D width, V vocabulary, J tiles of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Elements of one tile of logits on a CPU: 4 MiB in fp32, which fits in the L2 cache
TILE_CPU = 1 << 20
# On a GPU larger tiles keep the matrix product busy: 256 MiB in fp32, half of a tile of TRL 1.16 (4096 x 32768)
TILE_GPU = 1 << 26
# Elements of softmax tiles that a forward pass on a CPU keeps for its backward pass: 128 MiB in fp32. The others are
# computed again, a quarter of the products of the head. On a GPU that is two of the larger tiles, and none are kept.
KEPT_CPU = 1 << 25
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

    At most one tile of logits is in memory besides those that are kept for the backward pass (`KEPT_CPU`), which
    recomputes the others. Under autocast the products of both passes run in its dtype, as those of a linear layer do.
    """
    room = _room(hidden_ND, transform)
    hidden_ND = product_input(hidden_ND)
    return _TokenLogps.apply(hidden_ND, weight_VD, bias_V, targets_N, transform, False, room)[0]


def token_logps_and_collisions(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """Compute `token_logps`, and from the same tiles log sum_v p(v)^2 without gradient, each of shape [N].

    The second is the log-probability that two samples of the token are equal.
    """
    room = _room(hidden_ND, transform)
    hidden_ND = product_input(hidden_ND)
    return _TokenLogps.apply(hidden_ND, weight_VD, bias_V, targets_N, transform, True, room)


def residual_sketches(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    transform: LogitTransform,
    signs_VP: Tensor,
) -> Tensor:
    """Return the gradient of each log-probability with respect to the logits times `signs_VP`, fp32, shape [N, P].

    The gradient is 1 at the target minus the softmax. Logits are computed for a few positions at a time.
    """
    found_NP = hidden_ND.new_empty(len(hidden_ND), signs_VP.shape[1], dtype=torch.float32)
    number = max(1, (TILE_GPU if hidden_ND.is_cuda else TILE_CPU) // len(weight_VD))
    for start in range(0, len(hidden_ND), number):
        rows = slice(start, start + number)
        logits = logits_of(hidden_ND[rows], weight_VD, bias_V, slice(None), transform, torch.float32)
        gradient = -logits.softmax(dim=-1)
        gradient.scatter_add_(1, targets_N[rows, None], torch.ones_like(gradient[:, :1]))
        found_NP[rows] = (gradient * transform.slope(logits)) @ signs_VP
    return found_NP


def _room(hidden_ND: Tensor, transform: LogitTransform) -> int:
    """Return how many elements of softmax tiles the forward pass keeps for the backward pass."""
    # The derivative of soft-capping needs the logits themselves
    keeps = torch.is_grad_enabled() and hidden_ND.device.type == "cpu" and not transform.softcap
    return KEPT_CPU if keeps else 0


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd takes no keywords
        ctx: Any,  # noqa: ANN401 - autograd's context
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
        collisions: bool,
        room: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = sum_dtype(hidden_ND)
        tiles = tiles_of(hidden_ND, weight_VD)
        lse_JN = hidden_ND.new_empty(len(tiles), len(hidden_ND), dtype=dtype)
        collision_JN = torch.empty_like(lse_JN) if collisions else None
        target_N = hidden_ND.new_zeros(len(hidden_ND), dtype=dtype)
        kept: list[Tensor] = []  # the softmax of the first tiles
        for rows in row_blocks(hidden_ND):
            for tile, columns in enumerate(tiles):
                logits = logits_of(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                # The largest probability is 1 / sum(exp(logit - max)); softmax is the fastest way to exponentiate
                shares = logits.softmax(dim=-1)
                lse_JN[tile, rows] = logits.amax(dim=-1) - shares.amax(dim=-1).log()
                if shares.numel() <= room:
                    kept.append(shares)
                    room -= shares.numel()
                else:
                    room = 0  # only the first ones
                if collision_JN is not None:
                    collision_JN[tile, rows] = shares.square().sum(dim=-1).log()
                # From the same rounded logits, so that in bf16 too a token of probability 1 has log-probability 0
                column_N1, inside_N1 = columns_of(targets_N[rows, None], columns)
                target_N[rows] += logits.gather(1, column_N1).masked_fill_(~inside_N1, 0).squeeze(1)
        lse_N = lse_JN.logsumexp(dim=0)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, lse_JN, lse_N, *kept)
        ctx.transform = transform
        if collision_JN is None:
            return target_N - lse_N, None
        # The probability of a token is its share of the tile times the tile's share of the whole
        collision_N = (collision_JN + 2 * (lse_JN - lse_N)).logsumexp(dim=0)
        ctx.mark_non_differentiable(collision_N)
        return target_N - lse_N, collision_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        hidden_ND, weight_VD, bias_V, targets_N, lse_JN, lse_N, *kept = ctx.saved_tensors
        transform = ctx.transform
        dtype = lse_N.dtype
        grad_N = grads[0]
        gradients = HeadGradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[1:3], dtype)
        # Softmax within a tile times the tile's share of the whole sum; the target's 1 is subtracted before rounding
        share_JN = -grad_N * (lse_JN - lse_N).exp()
        tiles = tiles_of(hidden_ND, weight_VD)
        for block, rows in enumerate(row_blocks(hidden_ND)):
            for tile, columns in enumerate(tiles):
                number = block * len(tiles) + tile
                if number < len(kept):
                    slope = transform.scale
                    d_logits = kept[number] * share_JN[tile, rows, None]
                else:
                    logits = logits_of(hidden_ND[rows], weight_VD, bias_V, columns, transform, dtype)
                    slope = transform.slope(logits)
                    d_logits = logits.softmax(dim=-1).mul_(share_JN[tile, rows, None])
                column_N1, inside_N1 = columns_of(targets_N[rows, None], columns)
                d_logits.scatter_add_(1, column_N1, grad_N[rows, None] * inside_N1)
                if transform.scale != 1.0 or transform.softcap:
                    d_logits = d_logits.mul_(slope)
                gradients.add(rows, columns, d_logits)
        return *gradients.results(), None, None, None, None


def product_input(hidden_ND: Tensor) -> Tensor:
    """Return the hidden states in autocast's dtype if it is enabled, as a linear layer would use them."""
    kind = hidden_ND.device.type
    return hidden_ND.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden_ND


def sum_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype in which sums are accumulated: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def logits_of(
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


def columns_of(ids_NK: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the column of each token in a tile (0 if it is outside) and whether it is inside, both [N, K]."""
    column_NK = ids_NK - columns.start
    inside_NK = (column_NK >= 0) & (column_NK < columns.stop - columns.start)
    return column_NK * inside_NK, inside_NK


class HeadGradients:
    """Gradients of hidden states, weight and bias (None if not needed), added up tile by tile in `dtype`."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: Sequence[bool], dtype: torch.dtype
    ) -> None:
        self._hidden_ND, self._weight_VD, self._bias_V = hidden_ND, weight_VD, bias_V
        need_weight, need_bias = needs
        self._d_hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype)
        self._d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        self._d_bias_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and need_bias else None

    def add(self, rows: slice, columns: slice, d_logits: Tensor) -> None:
        """Add those of a tile, given the gradient of its logits before their transform."""
        if self._d_bias_V is not None:
            self._d_bias_V[columns] += d_logits.sum(dim=0)
        d_logits = d_logits.to(self._hidden_ND.dtype)
        _add_product(self._d_hidden_ND[rows], d_logits, self._weight_VD[columns].to(self._hidden_ND.dtype))
        if self._d_weight_VD is not None:
            _add_product(self._d_weight_VD[columns], d_logits.T, self._hidden_ND[rows])

    def results(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of hidden states, weight and bias."""
        weight_VD = self._weight_VD
        # Gradients of bf16 weights may be accumulated in fp32, as the sum over the tiles is
        dtype_of_sum = (weight_VD.grad_dtype if weight_VD.is_leaf else None) or weight_VD.dtype
        d_weight = self._d_weight_VD.to(dtype_of_sum) if self._d_weight_VD is not None else None
        d_bias = (
            self._d_bias_V.to(self._bias_V.dtype) if self._d_bias_V is not None and self._bias_V is not None else None
        )
        return self._d_hidden_ND.to(self._hidden_ND.dtype), d_weight, d_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total` in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def row_blocks(hidden_ND: Tensor) -> list[slice]:
    """Return slices of the positions, at most MAX_ROWS in each."""
    num_blocks = -(-len(hidden_ND) // MAX_ROWS)
    return [slice(block * MAX_ROWS, (block + 1) * MAX_ROWS) for block in range(num_blocks)]


def tiles_of(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """Return slices of the vocabulary, so that a tile of logits has at most the device's number of elements."""
    elements = TILE_GPU if hidden_ND.is_cuda else TILE_CPU
    width = elements // max(1, min(len(hidden_ND), MAX_ROWS))
    width = max(1, width - width % TILE_MULTIPLE) if width > TILE_MULTIPLE else max(1, width)
    return [slice(start, min(start + width, len(weight_VD))) for start in range(0, len(weight_VD), width)]
