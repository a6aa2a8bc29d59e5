"""Objectives of reward models: regression on attributes, or Bradley-Terry over pairs of responses.

Shape legend: B groups of the micro-batch, K responses of the largest group, S sequences, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from align.data.token_groups import TokenGroup
from align.losses.supervised import BRADLEY_TERRY, attribute_squared_error
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch, pad_groups, preference_order
from align.train.settings import RewardLoss


class RegressionObjective:
    """Squared error of the attributes, averaged over all labels of a step."""

    needs_reference = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def cache_key(self) -> object:
        """Return the attributes in their order."""
        return ["regression", self.names]

    def denominator(self, groups: GroupView) -> float:
        """Return the number of labels; at least 1."""
        num_labels = sum(name in labels for group in groups for labels in group.attributes for name in self.names)
        return float(max(1, num_labels))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return the squared error summed over labels, and its mean for each attribute."""
        predicted_SA: Tensor = policy(batch.tokens).double()
        label_SA = label_table(batch.attributes, self.names).to(predicted_SA.device)
        total_A, count_A = attribute_squared_error(predicted_SA.T, label_SA.T)
        columns = zip(self.names, total_A.detach(), count_A, strict=True)
        return ObjectiveOutput(total_A.sum(), {f"mse/{name}": Tally(total, count) for name, total, count in columns})


class BradleyTerryObjective:
    """Bradley-Terry loss of the aggregate reward: the mean over the pairs of a group, averaged over groups with a pair.

    Ouyang et al. 2022, eq. 1. A pair is any two responses of a group that the row ranks. `bt` ranks the chosen
    response first; `bt_margin` and `bt_scaled` use differences of rewards and rank by reward.
    """

    needs_reference = False

    def __init__(self, name: str, weights: Sequence[float]) -> None:
        self.name, self.weights = name, tuple(weights)
        self.ranks_chosen_first = name == "bt"

    def cache_key(self) -> object:
        """Return the name of the loss and the weight of each attribute in the reward."""
        return [self.name, self.weights]

    def extremes(self, group: TokenGroup) -> tuple[int, int] | None:
        """Return the best and the worst response; None if the row ranks no two responses."""
        order = preference_order(group) if self.ranks_chosen_first else list(group.rewards or ())
        return (order.index(max(order)), order.index(min(order))) if len(set(order)) > 1 else None

    def has_pair(self, group: TokenGroup) -> bool:
        """Return whether the row ranks two responses of the group."""
        return self.extremes(group) is not None

    def denominator(self, groups: GroupView) -> float:
        """Return the number of groups with a pair; at least 1."""
        return float(max(1, sum(map(self.has_pair, groups))))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return the loss summed over groups; margins and accuracies are means over groups with a pair."""
        scores_SA: Tensor = policy(batch.tokens).double()
        reward_BK = pad_groups(scores_SA @ scores_SA.new_tensor(self.weights), batch)
        order_BK = batch.labels_BK if self.ranks_chosen_first else batch.rewards_BK
        strength_BKK = order_BK[:, :, None] - order_BK[:, None, :]
        is_pair_BKK = (strength_BKK > 0) & batch.mask_BK[:, :, None] & batch.mask_BK[:, None, :]
        margin_BKK = reward_BK[:, :, None] - reward_BK[:, None, :]
        num_pairs_B = is_pair_BKK.sum(dim=(1, 2))

        def mean_B(values_BKK: Tensor) -> Tensor:
            """Return the mean over the pairs of each group; 0 for a group without pairs."""
            return torch.where(is_pair_BKK, values_BKK, 0).sum(dim=(1, 2)) / num_pairs_B.clamp(min=1)

        num_groups = (num_pairs_B > 0).sum()
        tallies = {
            "rewards/margins": Tally(mean_B(margin_BKK.detach()).sum(), num_groups),
            "rewards/accuracies": Tally(mean_B((margin_BKK > 0).double()).sum(), num_groups),
            "rewards/mean": Tally(reward_BK.detach().sum(), batch.mask_BK.sum()),
        }
        return ObjectiveOutput(mean_B(BRADLEY_TERRY[self.name](margin_BKK, strength_BKK)).sum(), tallies)


RewardObjective = RegressionObjective | BradleyTerryObjective


def label_table(attributes: Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    """Return the labels of each response in fp64, NaN for a missing label, shape [S, A]."""
    rows = [[labels.get(name, math.nan) for name in names] for labels in attributes]
    return torch.tensor(rows, dtype=torch.float64)


def reward_objective(loss: RewardLoss, names: Sequence[str], weights: Sequence[float]) -> RewardObjective:
    """Return the objective of a reward model with these attributes and weights."""
    return RegressionObjective(names) if loss == "regression" else BradleyTerryObjective(loss, weights)
