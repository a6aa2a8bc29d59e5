"""Comparisons between the responses of a group: which responses a loss ranks against each other.

Shape legend: B prompts, K responses, P comparisons, C responses in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from align.registry import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")  # a recipe's loss is validated without it


class Comparisons(NamedTuple):
    """Responses to compare, sorted by descending reward along the last axis."""

    implicit_BPC: Tensor  # implicit rewards
    target_BPC: Tensor  # target rewards
    mask_BPC: Tensor  # False for padding, where the other two are 0


def all_responses(mask_BK: Tensor) -> Tensor:
    """Return the ranks of one comparison of all responses, shape [B, 1, K]."""
    return torch.arange(mask_BK.shape[1], device=mask_BK.device).expand(len(mask_BK), 1, -1)


def all_pairs(mask_BK: Tensor) -> Tensor:
    """Return the ranks of every unordered pair, the better response first, shape [B, K * (K - 1) / 2, 2]."""
    num_responses = mask_BK.shape[1]
    pairs_2P = torch.triu_indices(num_responses, num_responses, offset=1, device=mask_BK.device)
    return pairs_2P.T.expand(len(mask_BK), -1, -1)


def best_and_worst(mask_BK: Tensor) -> Tensor:
    """Return the first and last rank of each group, shape [B, 1, 2].

    Among equal rewards the first response counts as the best and the last as the worst.
    """
    worst_B = (mask_BK.sum(dim=-1) - 1).clamp(min=0)
    return torch.stack([torch.zeros_like(worst_B), worst_B], dim=-1)[:, None]


# Setting `pairs` -> function of mask_BK that returns ranks, shape [B, P, C]
PAIRS: dict[str, Callable[[Tensor], Tensor]] = {"none": all_responses, "all": all_pairs, "best_worst": best_and_worst}


def compare(implicit_BK: Tensor, target_BK: Tensor, rewards_BK: Tensor, mask_BK: Tensor, *, pairs: str) -> Comparisons:
    """Return the comparisons that `pairs` selects from responses ranked by reward; ties keep their order."""
    order_BK = rewards_BK.masked_fill(~mask_BK, -math.inf).argsort(dim=-1, descending=True, stable=True)
    row_B11 = torch.arange(len(order_BK), device=order_BK.device)[:, None, None]
    index_BPC = order_BK[row_B11, PAIRS[pairs](mask_BK)]
    return Comparisons(implicit_BK[row_B11, index_BPC], target_BK[row_B11, index_BPC], mask_BK[row_B11, index_BPC])


def is_informative(comparisons: Comparisons, *, uses_rewards: bool) -> Tensor:
    """Return which comparisons count, shape [B, P]: those with at least two responses.

    A loss that does not use the values of the rewards also needs two rewards that differ.
    """
    _, target_BPC, mask_BPC = comparisons
    counts_BPC = mask_BPC if uses_rewards else mask_BPC & (target_BPC != target_BPC[..., :1])
    return counts_BPC[..., 1:].any(dim=-1)
