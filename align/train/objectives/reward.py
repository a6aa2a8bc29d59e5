"""Objectives of reward models: regression on attributes, or Bradley-Terry over pairs of responses.

Shape legend: B groups of the micro-batch, K responses of the largest group, S sequences, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.data.token_groups import TokenGroup
from align.losses.supervised import BRADLEY_TERRY, attribute_squared_error
from align.models.tree.batch import TokenBatch
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

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Return the shape of the scores of one sequence."""
        return (len(self.names),)

    def outputs(self, policy: nn.Module, tokens: TokenBatch) -> Tensor:
        """Return the scores of each sequence, shape [S, A]."""
        return policy(tokens).double()

    def group_losses(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the mean squared error over the labels of each group, shape [B]; 0 for a group without labels."""
        label_SA = label_table(batch.attributes, self.names).to(outputs_S.device)
        error_S = (outputs_S - label_SA).where(label_SA.isfinite(), 0).square().sum(dim=1)
        count_S = label_SA.isfinite().sum(dim=1)
        return pad_groups(error_S, batch).sum(dim=1) / pad_groups(count_S, batch).sum(dim=1).clamp(min=1)


class BradleyTerryObjective:
    """Bradley-Terry loss of the aggregate reward: the mean over the pairs of a group, averaged over groups with a pair.

    Ouyang et al. 2022, eq. 1. A pair is any two responses of a group that the row ranks. `bt` ranks the chosen
    response first; `bt_margin` and `bt_scaled` use differences of rewards and rank by reward.
    """

    needs_reference = False
    output_shape = ()

    def __init__(self, name: str, weights: Sequence[float]) -> None:
        self.name = name
        self.weights = tuple(weights)
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
        reward_BK = pad_groups(self.outputs(policy, batch.tokens), batch)
        pairs = self._pairs(reward_BK, batch)
        num_groups = (pairs.number_B > 0).sum()
        tallies = {
            "rewards/margins": Tally(pairs.mean(pairs.margin_BKK.detach()).sum(), num_groups),
            "rewards/accuracies": Tally(pairs.mean((pairs.margin_BKK > 0).double()).sum(), num_groups),
            "rewards/mean": Tally(reward_BK.detach().sum(), batch.mask_BK.sum()),
        }
        return ObjectiveOutput(self._losses(pairs).sum(), tallies)

    def outputs(self, policy: nn.Module, tokens: TokenBatch) -> Tensor:
        """Return the aggregate reward of each response, shape [S]."""
        scores_SA: Tensor = policy(tokens).double()
        return scores_SA @ scores_SA.new_tensor(self.weights)

    def group_losses(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the mean loss over the pairs of each group, shape [B]; 0 for a group without pairs."""
        return self._losses(self._pairs(pad_groups(outputs_S, batch), batch))

    def _losses(self, pairs: _Pairs) -> Tensor:
        return pairs.mean(BRADLEY_TERRY[self.name](pairs.margin_BKK, pairs.strength_BKK))

    def _pairs(self, reward_BK: Tensor, batch: GroupBatch) -> _Pairs:
        order_BK = batch.labels_BK if self.ranks_chosen_first else batch.rewards_BK
        strength_BKK = order_BK[:, :, None] - order_BK[:, None, :]
        is_pair_BKK = (strength_BKK > 0) & batch.mask_BK[:, :, None] & batch.mask_BK[:, None, :]
        return _Pairs(is_pair_BKK, reward_BK[:, :, None] - reward_BK[:, None, :], strength_BKK)


class _Pairs(NamedTuple):
    """The pairs of responses of each group that its row ranks."""

    is_pair_BKK: Tensor
    margin_BKK: Tensor  # difference of the model's rewards
    strength_BKK: Tensor  # difference of the row's rewards

    @property
    def number_B(self) -> Tensor:  # noqa: N802 - the shape
        """Return the number of pairs of each group."""
        return self.is_pair_BKK.sum(dim=(1, 2))

    def mean(self, values_BKK: Tensor) -> Tensor:
        """Return the mean over the pairs of each group; 0 for a group without pairs."""
        return torch.where(self.is_pair_BKK, values_BKK, 0).sum(dim=(1, 2)) / self.number_B.clamp(min=1)


RewardObjective = RegressionObjective | BradleyTerryObjective


def label_table(attributes: Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    """Return the labels of each response in fp64, NaN for a missing label, shape [S, A]."""
    rows = [[labels.get(name, math.nan) for name in names] for labels in attributes]
    return torch.tensor(rows, dtype=torch.float64)


def reward_objective(loss: RewardLoss, names: Sequence[str], weights: Sequence[float]) -> RewardObjective:
    """Return the objective of a reward model with these attributes and weights."""
    return RegressionObjective(names) if loss == "regression" else BradleyTerryObjective(loss, weights)
