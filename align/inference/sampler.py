"""Sampling of tokens from logits, by inverting the cumulative distribution at given uniform numbers.

A row's token depends on its own logits and number only. Shape legend: B rows, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.errors import RunError

NUM_LIKELY = 256  # tokens sorted at first for top-p; sorting the whole vocabulary is 20 times slower in PyTorch


def uniform_numbers(seed: int, count: int) -> list[float]:
    """Return `count` numbers in [0, 1) that depend on the seed only; a larger count extends the list.

    They are made from Philox's raw integers, whose stream NumPy guarantees, unlike that of its floats (NEP 19).

    >>> uniform_numbers(7, 3) == uniform_numbers(7, 5)[:3]
    True
    """
    raw = np.random.Philox(key=seed).random_raw(count)
    return ((raw >> np.uint64(11)) * 2.0**-53).tolist()


def sample_tokens(logits_BV: Tensor, uniforms_B: Sequence[float], *, temperature: float, top_p: float) -> list[int]:
    """Return a token id for each row, sampled from softmax(logits / temperature) with nucleus size `top_p`.

    `uniforms_B` holds a number in [0, 1) for each row. Temperature 0 takes the most likely token. Raises `RunError` if
    the logits are not finite.

    >>> sample_tokens(torch.tensor([[0.0, 2.0, 1.0]]), [0.5], temperature=0, top_p=1)
    [1]
    """
    if temperature == 0:
        best = logits_BV.max(dim=-1)
        _check_finite(best.values)
        return best.indices.tolist()
    scaled_BV = logits_BV.float() if temperature == 1 else logits_BV.float() / temperature  # a pass over the vocabulary
    numbers_B = torch.tensor(uniforms_B, device=logits_BV.device, dtype=torch.float32)
    if top_p == 1:
        return _invert_cdf(scaled_BV.softmax(dim=-1), numbers_B).tolist()
    # PyTorch splits the sum of a single row over threads, which changes its last bits; of two rows each has one thread.
    lse_B1 = scaled_BV.expand(max(2, len(scaled_BV)), -1).logsumexp(dim=-1, keepdim=True)[: len(scaled_BV)]
    tokens: list[int] = []
    top = scaled_BV.topk(min(NUM_LIKELY, scaled_BV.shape[1]), dim=-1)
    probs_BN = (top.values - lse_B1).exp()
    is_enough = (probs_BN.sum(dim=-1) >= top_p).tolist()
    sampled = top.indices.gather(1, _invert_cdf(_nucleus(probs_BN, top_p), numbers_B)[:, None])[:, 0].tolist()
    for row, token in enumerate(sampled):
        if not is_enough[row]:  # a flat distribution: sort the whole vocabulary
            one = slice(row, row + 1)
            probs_1V, order_1V = (scaled_BV[one] - lse_B1[one]).exp().sort(dim=-1, descending=True, stable=True)
            token = int(order_1V[0, _invert_cdf(_nucleus(probs_1V, top_p), numbers_B[one])[0]])
        tokens.append(token)
    return tokens


def _nucleus(probs_BN: Tensor, top_p: float) -> Tensor:
    """Set sorted probabilities to 0 where those before them already sum to `top_p`; the first is always kept."""
    before_BN = probs_BN.cumsum(dim=-1) - probs_BN
    before_BN[:, 0] = 0
    return probs_BN * (before_BN < top_p)


def _invert_cdf(probs_BN: Tensor, numbers_B: Tensor) -> Tensor:
    """Return the index at which the cumulative probability passes each number, as a share of the row's sum.

    Never returns an index of probability 0.
    """
    cumulative_BN = probs_BN.cumsum(dim=-1)
    total_B1 = cumulative_BN[:, -1:].contiguous()
    _check_finite(total_B1)
    index_B1 = torch.searchsorted(cumulative_BN, numbers_B[:, None] * total_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BN, total_B1)  # a number may be rounded up to 1
    return torch.minimum(index_B1, last_B1)[:, 0]


def _check_finite(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise RunError("the model's logits are not finite: its weights are broken, or too large for this precision")
