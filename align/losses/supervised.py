"""Losses of reward models: regression on attributes, and Bradley-Terry.

Shape legend: B rows, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class SumAndCount(NamedTuple):
    """The sum of the terms of each row, and their number; callers add up both over a step and divide once."""

    total_B: Tensor
    count_B: Tensor


def attribute_squared_error(predicted_BA: Tensor, label_BA: Tensor, mask_BA: Tensor | None = None) -> SumAndCount:
    """Compute the squared error of each row, summed over its known attributes.

    A label is missing where it is NaN or the mask is False; it adds neither to the sum nor to the count.
    Regression reward model of HelpSteer2 (Wang et al. 2024, sec. 3).
    """
    known_BA = ~label_BA.isnan() if mask_BA is None else mask_BA & ~label_BA.isnan()
    error_BA = torch.where(known_BA, predicted_BA - label_BA, 0)
    return SumAndCount(error_BA.square().sum(dim=-1), known_BA.sum(dim=-1))


def bradley_terry(margin_B: Tensor, strength_B: Tensor) -> Tensor:
    """Compute -log sigmoid(margin), shape [B]; the strength of the preference is ignored.

    Bradley & Terry 1952; as a loss of reward models Ouyang et al. 2022, eq. 1.
    """
    return -logsigmoid(margin_B)


def margin_bradley_terry(margin_B: Tensor, strength_B: Tensor) -> Tensor:
    """Compute -log sigmoid(margin - strength), shape [B]: a stronger preference requires a larger margin.

    Llama 2 (Touvron et al. 2023, eq. 2).
    """
    return -logsigmoid(margin_B - strength_B)


def scaled_bradley_terry(margin_B: Tensor, strength_B: Tensor) -> Tensor:
    """Compute -strength * log sigmoid(margin), shape [B]: a preference of strength 3 counts like 3 of strength 1.

    HelpSteer2-Preference (Wang et al. 2024b, arXiv:2410.01257).
    """
    return -strength_B * logsigmoid(margin_B)


# (reward of chosen - reward of rejected, strength of the preference from 0) -> loss_B
BRADLEY_TERRY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bt": bradley_terry,
    "bt_margin": margin_bradley_terry,
    "bt_scaled": scaled_bradley_terry,
}
