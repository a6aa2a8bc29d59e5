"""SFT on the tokens of each row whose loss exceeds that of a reference the most (Lin et al. 2024, Rho-1).

Shape legend: B groups, S sequences, N trained tokens.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from align.train.indexed_groups import GroupView
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.objectives.batch import GroupBatch
from align.train.objectives.supervised import SupervisedObjective
from align.train.selection.settings import SELECTION

ROUNDING = 1e-9  # so that 100 * 0.55 = 55.00000000000001 is 55 tokens and not 56


class ChosenTokensObjective:
    """Negative log-likelihood of the chosen tokens, averaged over all chosen tokens of a step.

    The `share` of the trained tokens of each row with the largest loss of the policy minus that of the reference is
    chosen (Lin et al. 2024, arXiv:2404.07965, eq. 3 to 5), rounded up to whole tokens; of equal ones the first. The
    paper ranks the tokens of a batch; within rows, the choice and the number of chosen tokens do not depend on how a
    batch is cut into micro-batches or split over ranks, and the pass that trains is also the one that scores.
    """

    needs_reference = False
    on_held_out: ClassVar[SupervisedObjective] = SupervisedObjective()  # all tokens, as in a run without selection

    def __init__(self, share: float) -> None:
        self.share = share

    def cache_key(self) -> object:
        """Return the share."""
        return ["chosen tokens", self.share]

    def denominator(self, groups: GroupView) -> float:
        """Return the number of chosen tokens."""
        return float(num_chosen(torch.from_numpy(groups.column("trained").astype(np.int64)), self.share).sum())

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return the negative log-likelihood of the chosen tokens, summed; `nll` is the mean of all."""
        assert batch.reference_N is not None
        nll_N = -policy(batch.tokens).double()
        excess_N = nll_N.detach() + batch.reference_N.double()
        sizes_B = torch.tensor(batch.sizes, device=nll_N.device)
        group_N = torch.arange(len(sizes_B), device=nll_N.device).repeat_interleave(sizes_B)[batch.tokens.sequence_N]
        is_chosen_N = top_share(excess_N, group_N, self.share)
        loss = torch.where(is_chosen_N, nll_N, 0.0).sum()
        every = loss.new_tensor(float(len(nll_N)))
        chosen = is_chosen_N.sum().double()
        tallies = {
            "nll": Tally(nll_N.detach().sum(), every),
            f"{SELECTION}token_share": Tally(chosen, every),
            f"{SELECTION}mean_score": Tally(excess_N.sum(), every),
            f"{SELECTION}mean_score_chosen": Tally(excess_N[is_chosen_N].sum(), chosen),
        }
        return ObjectiveOutput(loss, tallies)


def top_share(scores_N: Tensor, group_N: Tensor, share: float) -> Tensor:
    """Return whether each score is among the largest `share` of its group, bool [N]; of equal scores the first are."""
    by_score = torch.argsort(scores_N, descending=True, stable=True)
    order = by_score[torch.argsort(group_N[by_score], stable=True)]
    counts_B = group_N.bincount()
    starts_B = counts_B.cumsum(0) - counts_B
    rank_N = torch.empty_like(order)
    rank_N[order] = torch.arange(len(order), device=order.device)
    return rank_N - starts_B[group_N] < num_chosen(counts_B, share)[group_N]


def num_chosen(counts_B: Tensor, share: float) -> Tensor:
    """Return the number of tokens that are chosen from each of these numbers, int64 [B]; at least 1 of 1 or more.

    >>> num_chosen(torch.tensor([0, 1, 2, 10]), 0.3).tolist()
    [0, 1, 1, 3]
    """
    return (counts_B.double() * share - ROUNDING).ceil().clamp(min=0).long()
