"""Statistics of one pass over micro-batches: loss, metrics and computed tokens, summed over all ranks."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from align.accounting.flops import Work, sum_work
from align.errors import RunError
from align.train.objectives.base import ObjectiveOutput, Tally
from align.train.passes.data_ranks import DataRanks
from align.train.passes.micro_batches import MicroBatch
from align.train.training_run import EXIT, WORK_METRICS


class DivergedError(RunError):
    """The loss or the gradient norm of an optimizer step is not finite; the weights are unchanged."""


class StepStatistics:
    """Sums over the micro-batches of this rank; `reduce` adds them up over ranks and divides once."""

    def __init__(self, ranks: DataRanks) -> None:
        self._ranks = ranks
        self._loss = torch.zeros((), dtype=torch.float64, device=ranks.accelerator.device)
        self._tallies: dict[str, Tally] = {}
        self._work = Work(0, 0, 0)
        self._num_micro_batches = 0

    def add(self, micro: MicroBatch, output: ObjectiveOutput) -> None:
        """Add a micro-batch; one of weight 0 counts only as computed."""
        self._loss += output.loss.detach() * micro.weight
        prefix = "" if micro.batch.tokens.exit is None else EXIT
        for name, tally in ((prefix + name, tally) for name, tally in output.tallies.items()):
            weighted = Tally(tally.total * micro.weight, tally.count * micro.weight)
            self._tallies[name] = self._tallies[name] + weighted if name in self._tallies else weighted
        self._work = sum_work([self._work, micro.batch.tokens.work()])
        self._num_micro_batches += 1

    def check_finite(self, step: int) -> None:
        """Raise `DivergedError` on all ranks if the loss of any rank is not finite."""
        losses = cast(Tensor, self._ranks.accelerator.gather(self._loss.reshape(1))).tolist()
        not_finite = [(rank, loss) for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        if not_finite:
            rank, loss = not_finite[0]
            where = f" on process {rank} of {len(losses)}" if len(losses) > 1 else ""
            raise DivergedError(f"optimizer step {step}: the loss is {loss}{where}; the weights are unchanged")

    def reduce(self, denominator: float) -> dict[str, float]:
        """Return the loss over `denominator`, the mean of each metric and the computed work of all ranks.

        A metric that nothing counts for, such as the reward of undesirable responses in a step without any, is left
        out. Every rank has the same metrics, because every rank ran a micro-batch.
        """
        names = sorted(self._tallies)
        totals = [self._tallies[name].total for name in names]
        counts = [self._tallies[name].count for name in names]
        work = [self._loss.new_tensor(float(part)) for part in self._work]
        sums = torch.stack([self._loss / denominator, *totals, *counts, *work]).double()
        loss, *rest = self._ranks.sum(sums).tolist()
        sums_and_counts = zip(names, rest[: len(names)], rest[len(names) : 2 * len(names)], strict=True)
        return {
            "loss": loss,
            **{name: total / count for name, total, count in sums_and_counts if count},
            **dict(zip(WORK_METRICS, map(int, rest[2 * len(names) :]), strict=True)),
            "micro_batches": self._num_micro_batches,
        }
