"""The estimate of KL(policy || reference) of an optimizer step or an evaluation, the reference point of KTO.

The estimate is the mean log-ratio over mismatched pairs (Ethayarajh et al. 2024, arXiv:2402.01306, sec. 4.1), at least
0. It is one number for the whole step, computed without gradient before its first micro-batch, so it depends neither
on the micro-batches nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align.accounting.flops import Work, sum_work
from align.data.batching import Indices
from align.errors import InputError
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import response_logps
from align.train.objectives.settings import MIN_KL_PROMPTS, TOO_FEW_PROMPTS
from align.train.passes.micro_batches import MicroBatcher
from align.train.passes.mismatched import MismatchedGroups
from align.train.references.compute import KL_REFERENCE_WORK
from align.train.references.run_passes import RunPasses
from align.train.training_run import KL, WORK_METRICS, TrainingRun


class KLEstimate(NamedTuple):
    """The estimate, and what its computation adds to the metrics."""

    kl: Tensor  # nats, fp64 scalar; the same on all ranks
    metrics: dict[str, float]


class MismatchedPairs(NamedTuple):
    """The mismatched pairs of the training steps of a run, followed by those of its held-out rows."""

    train: MismatchedGroups
    held_out: MismatchedGroups
    view: GroupView


def mismatched_pairs(
    run: TrainingRun, groups: GroupView, epoch_of: Callable[[int], Indices], num_steps: int
) -> MismatchedPairs:
    """Return the pairs of all steps, and those of the held-out rows as of one step.

    Raises `InputError` if steps have a single prompt.
    """
    if run.settings.prompts_per_step < MIN_KL_PROMPTS:
        raise InputError(TOO_FEW_PROMPTS, ("train", "prompts_per_step"))
    max_length = int(groups.column("longest").max())
    num_held_out = len(run.held_out)
    train = MismatchedGroups(
        run.train,
        epoch_of,
        num_rows=run.num_rows,
        prompts_per_step=run.settings.prompts_per_step,
        num_steps=num_steps,
        max_length=max_length,
    )
    held_out = MismatchedGroups(
        run.held_out,
        lambda epoch: range(num_held_out),
        num_rows=num_held_out,
        prompts_per_step=max(1, num_held_out),
        num_steps=int(num_held_out > 0),
        max_length=max_length,
    )
    return MismatchedPairs(train, held_out, GroupView(train, held_out))


class KLPass:
    """Estimates the KL divergence of a step from its mismatched pairs; all ranks call it together."""

    def __init__(self, model: nn.Module, pairs: MismatchedPairs, batcher: MicroBatcher) -> None:
        self._model, self._pairs, self._batcher = model, pairs, batcher

    def of_step(self, number: int, groups: GroupView) -> KLEstimate:
        """Return the estimate of optimizer step `number`, from 0, on these groups under the current weights."""
        return self._estimate(self._pairs.train.step(number), groups)

    def of_held_out(self, groups: GroupView) -> KLEstimate:
        """Return the estimate of the held-out groups under the current weights."""
        return self._estimate(range(self._pairs.view.num_train, len(self._pairs.view)), groups)

    @torch.no_grad()
    def _estimate(self, indices: range, groups: GroupView) -> KLEstimate:
        ranks = self._batcher.ranks
        work = Work(0, 0, 0)
        num_passes = 0
        ratio_and_count = torch.zeros(2, dtype=torch.float64, device=ranks.accelerator.device)
        if len(indices) < MIN_KL_PROMPTS:  # the last step of an epoch: no other response, so no evidence of divergence
            return KLEstimate(ratio_and_count[0], {})
        for micro in self._batcher.micro_batches(self._batcher.plan(indices)):
            batch = micro.batch
            ratio_BK = torch.where(batch.mask_BK, response_logps(self._model, batch) - batch.reference_BK, 0)
            ratio_and_count += micro.weight * torch.stack([ratio_BK.sum(), batch.mask_BK.sum().double()])
            work = sum_work([work, batch.tokens.work()])
            num_passes += 1
        own = torch.cat([ratio_and_count, ratio_and_count.new_tensor([float(part) for part in work])])
        ratio, count, *computed = ranks.sum(own).unbind()
        names = [KL + name for name in (*WORK_METRICS, "micro_batches", "tokens_cut")]
        # The pairs have the responses of the groups, cut where they are too long for their new prompt
        num_cut = groups.num_trained_tokens - self._pairs.view.select(indices).num_trained_tokens
        values: list[float] = [*(int(part) for part in computed), num_passes, num_cut]
        return KLEstimate((ratio / count).clamp(min=0), dict(zip(names, values, strict=True)))


def make_kl_pass(passes: RunPasses, groups: GroupView, epoch_of: Callable[[int], Indices]) -> KLPass:
    """Compute the references of the mismatched pairs of a run and return the pass over them."""
    pairs = mismatched_pairs(passes.run, groups, epoch_of, passes.run.num_steps)
    references = passes.references(pairs.view, KL_REFERENCE_WORK, of=" of mismatched pairs")
    return KLPass(passes.model, pairs, passes.batcher(pairs.view, references))
