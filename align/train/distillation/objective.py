"""The objective of distillation.

Shape legend: N trained tokens, K tokens of the teacher, C = K + 1 classes.
"""

from __future__ import annotations

from torch import nn

from align.losses.distillation import generalized_jsd
from align.train.distillation.settings import DistillationSettings
from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch


class DistillationObjective:
    """Divergence from a teacher plus `sft_weight` times the negative log-likelihood, averaged over the trained tokens.

    The divergence is taken between distributions over the teacher's K most likely tokens and all others together. It
    is at most that over the whole vocabulary (data-processing inequality), and equal to it for K = V.
    """

    needs_reference = False

    def __init__(self, settings: DistillationSettings) -> None:
        self.settings = settings

    def cache_key(self) -> object:
        """Return the settings."""
        return ["distillation", self.settings.model_dump()]

    def denominator(self, groups: GroupView) -> float:
        """Return the number of trained tokens."""
        return float(groups.num_trained_tokens)

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return divergence and SFT term, summed over tokens."""
        assert batch.teacher_NC is not None
        teacher_NC = batch.teacher_NC.double()
        logps_N = policy(batch.tokens).double().T  # of the target, then of the classes: [N, 1 + C]
        divergence = generalized_jsd(logps_N[:, 1:], teacher_NC, beta=self.settings.beta).sum()
        nll = -logps_N[:, 0].sum()
        loss = divergence + self.settings.sft_weight * nll if self.settings.sft_weight else divergence
        values = {"loss/distillation": divergence, "nll": nll, "teacher/rest": teacher_NC[:, -1].exp().sum()}
        number = loss.new_tensor(float(len(teacher_NC)))
        return ObjectiveOutput(loss, {name: Tally(value.detach(), number) for name, value in values.items()})
