"""The SFT objective."""

from __future__ import annotations

from torch import Tensor, nn

from align.models.tree.batch import TokenBatch
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch, pad_groups, response_logps, sequence_logps


class SupervisedObjective:
    """Negative log-likelihood of the trained tokens, averaged over all trained tokens of a step."""

    needs_reference = False
    output_shape = ()

    def cache_key(self) -> object:
        """Return a constant: the objective has no settings."""
        return "supervised"

    def denominator(self, groups: GroupView) -> float:
        """Return the number of trained tokens."""
        return float(groups.num_trained_tokens)

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return the negative log-likelihood, summed over tokens."""
        loss = -response_logps(policy, batch).sum()
        return ObjectiveOutput(loss, {"nll": Tally(loss.detach(), batch.lengths_BK.sum())})

    def outputs(self, policy: nn.Module, tokens: TokenBatch) -> Tensor:
        """Return the log-probability of each sequence, shape [S]."""
        return sequence_logps(policy, tokens)

    def group_losses(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the mean negative log-likelihood of the trained tokens of each group, shape [B]."""
        return -pad_groups(outputs_S, batch).sum(dim=1) / batch.lengths_BK.sum(dim=1)
