"""What a micro-batch is worth to a reward model: squared errors of known attributes, or Bradley-Terry over pairs.

Shape legend: B groups of the micro-batch, K responses of the largest, S sequences, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from align.data.token_groups import TokenGroup
from align.losses.supervised import BRADLEY_TERRY, attribute_squared_error
from align.train.objectives import GroupBatch, Step, Tally, by_group, label_order
from align.train.settings import RewardLoss


class RegressionObjective:
    """Squared error summed over the labels that there are, for the step to divide by their number."""

    needs_reference = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def cache_key(self) -> object:
        """The attributes in their order."""
        return ["regression", self.names]

    def denominator(self, groups: Sequence[TokenGroup]) -> float:
        """Labels of the step."""
        return float(max(1, sum(name in known for one in groups for known in one.attributes for name in self.names)))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> Step:
        """Sum of squared errors, and its mean for each attribute."""
        predicted_SA: Tensor = policy(batch.tokens).double()
        label_SA = label_table(batch.attributes, self.names).to(predicted_SA.device)
        total_A, count_A = attribute_squared_error(predicted_SA.T, label_SA.T)
        columns = zip(self.names, total_A.detach(), count_A, strict=True)
        return Step(total_A.sum(), {f"mse/{name}": Tally(total, count) for name, total, count in columns})


class BradleyTerryObjective:
    """Bradley-Terry loss of the reward: a group's is the mean over its pairs, as in Ouyang et al. 2022, eq. 1.

    Pairs are all those that the data sets apart. The plain loss follows the label where the data names one; margin and
    scale are differences of rewards, and those losses follow the rewards.
    """

    needs_reference = False

    def __init__(self, name: str, weights: Sequence[float]) -> None:
        self.name, self.weights = name, tuple(weights)
        self.follows_label = name == "bt"

    def cache_key(self) -> object:
        """The loss, and what each attribute is worth in the reward."""
        return [self.name, self.weights]

    def extremes(self, group: TokenGroup) -> tuple[int, int] | None:
        """The best and the worst response, by what the loss follows; None where the data sets none apart."""
        order = label_order(group) if self.follows_label else list(group.rewards or ())
        return (order.index(max(order)), order.index(min(order))) if len(set(order)) > 1 else None

    def has_pair(self, group: TokenGroup) -> bool:
        """Whether the group holds two responses that the data sets apart."""
        return self.extremes(group) is not None

    def denominator(self, groups: Sequence[TokenGroup]) -> float:
        """Groups with a pair."""
        return float(max(1, sum(map(self.has_pair, groups))))

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> Step:
        """Loss summed over the groups; lead and accuracy as means over groups."""
        scores_SA: Tensor = policy(batch.tokens).double()
        weights_A = scores_SA.new_tensor(self.weights)
        reward_BK = by_group(scores_SA @ weights_A, batch)
        order_BK = batch.labels_BK if self.follows_label else batch.rewards_BK
        gap_BKK = order_BK[:, :, None] - order_BK[:, None, :]
        pair_BKK = (gap_BKK > 0) & batch.mask_BK[:, :, None] & batch.mask_BK[:, None, :]
        lead_BKK = reward_BK[:, :, None] - reward_BK[:, None, :]
        pairs_B = pair_BKK.sum(dim=(1, 2))

        def mean_B(values_BKK: Tensor) -> Tensor:
            """Mean over the pairs of each group; 0 where a group has none."""
            return torch.where(pair_BKK, values_BKK, 0).sum(dim=(1, 2)) / pairs_B.clamp(min=1)

        loss_BKK = BRADLEY_TERRY[self.name](lead_BKK, gap_BKK)
        values_B = {
            "rewards/margins": mean_B(lead_BKK.detach()),
            "rewards/accuracies": mean_B((lead_BKK > 0).double()),
        }
        num_groups = (pairs_B > 0).sum()
        tallies = {name: Tally(value_B.sum(), num_groups) for name, value_B in values_B.items()}
        every = batch.mask_BK.sum()
        tallies["rewards/mean"] = Tally(reward_BK.detach().sum(), every)
        return Step(mean_B(loss_BKK).sum(), tallies)


RewardObjective = RegressionObjective | BradleyTerryObjective


def label_table(attributes: Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    """The labels of each response in fp64, NaN where one is missing, shape [S, A]."""
    rows = [[known.get(name, math.nan) for name in names] for known in attributes]
    return torch.tensor(rows, dtype=torch.float64)


def reward_objective(loss: RewardLoss, names: Sequence[str], weights: Sequence[float]) -> RewardObjective:
    """What a reward model of these attributes and weights is trained by."""
    return RegressionObjective(names) if loss == "regression" else BradleyTerryObjective(loss, weights)
