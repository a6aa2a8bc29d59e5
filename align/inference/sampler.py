"""From logits to tokens: the inverse of the cumulative distribution at a number that was drawn before.

A row's token depends on its own logits and number only. Shape legend: B rows, V vocabulary, N likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.errors import RunError

LIKELIEST = 256  # tokens that are sorted at first; PyTorch sorts all of a vocabulary 20 times slower


def uniforms(seed: int, count: int) -> list[float]:
    """Numbers in [0, 1), the same for a seed everywhere; a larger count only adds to them.

    From Philox's raw integers, which NumPy promises to keep (NEP 19), unlike its floats.
    """
    raw = np.random.Philox(key=seed).random_raw(count)
    return ((raw >> np.uint64(11)) * 2.0**-53).tolist()


def draw(logits_BV: Tensor, uniforms_B: Sequence[float], *, temperature: float, top_p: float) -> list[int]:
    """A token of each row by softmax(logits / temperature), over the fewest likeliest tokens with `top_p` of it."""
    if temperature == 0:
        best = logits_BV.max(dim=-1)
        _check(best.values)
        return best.indices.tolist()
    scaled_BV = logits_BV.float() / temperature
    numbers_B = torch.tensor(uniforms_B, device=logits_BV.device, dtype=torch.float32)
    if top_p == 1:
        return _invert(scaled_BV.softmax(dim=-1), numbers_B).tolist()
    # Of a single row several threads add up the parts of a vocabulary each, and of two rows a row each.
    lse_B1 = scaled_BV.expand(max(2, len(scaled_BV)), -1).logsumexp(dim=-1, keepdim=True)[: len(scaled_BV)]
    found: list[int] = []
    top = scaled_BV.topk(min(LIKELIEST, scaled_BV.shape[1]), dim=-1)
    probs_BN = (top.values - lse_B1).exp()
    enough = (probs_BN.sum(dim=-1) >= top_p).tolist()
    drawn = top.indices.gather(1, _invert(_nucleus(probs_BN, top_p), numbers_B)[:, None])[:, 0].tolist()
    for row, token in enumerate(drawn):
        if not enough[row]:  # a flat distribution: sort all of it
            own = slice(row, row + 1)
            probs_V, order_V = (scaled_BV[own] - lse_B1[own]).exp().sort(dim=-1, descending=True, stable=True)
            token = int(order_V[0, _invert(_nucleus(probs_V, top_p), numbers_B[own])[0]])
        found.append(token)
    return found


def _nucleus(probs_BN: Tensor, top_p: float) -> Tensor:
    """Sorted probabilities with 0 for the tokens before which there is `top_p` already; the first always stays."""
    before_BN = probs_BN.cumsum(dim=-1) - probs_BN
    before_BN[:, 0] = 0
    return probs_BN * (before_BN < top_p)


def _invert(probs_BN: Tensor, numbers_B: Tensor) -> Tensor:
    """The place in which each number, as a share of the row's sum, falls; never one of probability 0."""
    cumulative_BN = probs_BN.cumsum(dim=-1)
    total_B1 = cumulative_BN[:, -1:].contiguous()
    _check(total_B1)
    place_B1 = torch.searchsorted(cumulative_BN, numbers_B[:, None] * total_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BN, total_B1)  # a number may be rounded up to 1
    return torch.minimum(place_B1, last_B1)[:, 0]


def _check(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise RunError("the model's logits are not finite: its weights are broken, or too large for this precision")
