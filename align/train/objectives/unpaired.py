"""The loss and the metrics of labelled responses under an `UnpairedLoss`.

Shape legend: B groups of the micro-batch, K responses of the largest group.
"""

from __future__ import annotations

from torch import Tensor

from align.losses.unpaired import DESIRABLE, UnpairedLoss
from align.train.objectives.base import Objective, ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch


def unpaired_output(loss: UnpairedLoss, logps_BK: Tensor, batch: GroupBatch) -> ObjectiveOutput:
    """Return the loss summed over groups, and means over desirable (chosen) and undesirable (rejected) responses.

    A response counts as accurate if its implicit reward is on its label's side of the reference point.
    """
    references = (batch.reference_BK, batch.rewards_BK, batch.lengths_BK, batch.mask_BK)
    loss_B = loss(logps_BK, *references, kl=batch.kl)
    logps_BK = logps_BK.detach()
    implicit_BK = loss.implicit_rewards(logps_BK, batch.reference_BK, batch.lengths_BK, batch.mask_BK)
    is_desirable_BK = batch.rewards_BK > DESIRABLE
    gain_BK = implicit_BK - loss.beta * batch.kl
    is_accurate_BK = (gain_BK > 0) == is_desirable_BK
    groups = loss_B.new_tensor(len(loss_B))
    responses = batch.mask_BK.sum()
    tallies = {
        "loss/preference": Tally(loss_B.detach().sum(), groups),
        "rewards/accuracies": Tally((is_accurate_BK & batch.mask_BK).sum(), responses),
    }
    if loss.uses_kl:
        tallies["kl"] = Tally(batch.kl * groups, groups)
    for side, is_side_BK in (("chosen", is_desirable_BK), ("rejected", ~is_desirable_BK)):
        of_side_BK = is_side_BK & batch.mask_BK
        tallies[f"rewards/{side}"] = Tally((implicit_BK * of_side_BK).sum(), of_side_BK.sum())
        tallies[f"logps/{side}"] = Tally((logps_BK * of_side_BK).sum(), of_side_BK.sum())
    return ObjectiveOutput(loss_B.sum(), tallies, logps_BK)


def uses_kl(objective: Objective) -> bool:
    """Return whether an objective needs `GroupBatch.kl`; one without a preference loss does not."""
    return getattr(getattr(objective, "loss", None), "uses_kl", False) is True
