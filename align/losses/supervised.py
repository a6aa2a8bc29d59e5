"""Losses of known answers: sums with their counts, which the caller adds up over a step and divides once.

B rows, T tokens, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class SumAndCount(NamedTuple):
    """What was added up for each row, and how many terms that had."""

    total_B: Tensor
    count_B: Tensor


def token_nll(logps_BT: Tensor, supervised_BT: Tensor) -> SumAndCount:
    """Negative log-likelihood of each row's supervised tokens in nats, and their number."""
    return SumAndCount(-torch.where(supervised_BT, logps_BT, 0).sum(dim=-1), supervised_BT.sum(dim=-1))


def attribute_squares(predicted_BA: Tensor, label_BA: Tensor, mask_BA: Tensor | None = None) -> SumAndCount:
    """Squared error over each row's known attributes, and their number; NaN or a mask of False is a missing label."""
    known_BA = ~label_BA.isnan() if mask_BA is None else mask_BA & ~label_BA.isnan()
    error_BA = torch.where(known_BA, predicted_BA - label_BA, 0)
    return SumAndCount(error_BA.square().sum(dim=-1), known_BA.sum(dim=-1))


def plain_bradley_terry(lead_B: Tensor, strength_B: Tensor) -> Tensor:
    """-log sigmoid(lead) of chosen over rejected; the preference's strength plays no part."""
    return -logsigmoid(lead_B)


def margin_bradley_terry(lead_B: Tensor, strength_B: Tensor) -> Tensor:
    """-log sigmoid(lead - strength): the stronger the preference, the larger the lead must be (Touvron et al. 2023)."""
    return -logsigmoid(lead_B - strength_B)


def scaled_bradley_terry(lead_B: Tensor, strength_B: Tensor) -> Tensor:
    """-strength * log sigmoid(lead): a preference of 3 counts as three of 1 (Wang et al. 2024)."""
    return -strength_B * logsigmoid(lead_B)


# (reward of chosen - reward of rejected, strength of the preference from 0) -> loss_B
BRADLEY_TERRY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bt": plain_bradley_terry,
    "bt_margin": margin_bradley_terry,
    "bt_scaled": scaled_bradley_terry,
}
