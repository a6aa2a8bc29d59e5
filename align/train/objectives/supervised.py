"""The SFT objective."""

from __future__ import annotations

from torch import nn

from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch, response_logps


class SupervisedObjective:
    """Negative log-likelihood of the trained tokens, averaged over all trained tokens of a step."""

    needs_reference = False

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
