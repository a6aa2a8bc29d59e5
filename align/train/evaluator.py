"""Evaluation of an objective on the held-out groups."""

from __future__ import annotations

import torch
from torch import nn

from align.train.indexed_groups import GroupView
from align.train.micro_batches import MicroBatcher
from align.train.objectives.base import Objective
from align.train.step_statistics import StepStatistics


class Evaluator:
    """Computes the loss and the metrics of an objective on the held-out groups of a view."""

    def __init__(self, model: nn.Module, objective: Objective, groups: GroupView, batcher: MicroBatcher) -> None:
        self._model, self._objective, self._batcher = model, objective, batcher
        held_out = range(groups.num_train, len(groups))
        self._plan = batcher.plan(held_out)
        self._denominator = objective.denominator(groups.select(held_out))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss, the metrics and the computed work over all held-out groups; all ranks call it together."""
        statistics = StepStatistics(self._batcher.accelerator)
        for micro in self._batcher.micro_batches(self._plan):
            statistics.add(micro, self._objective(self._model, micro.batch))
        return statistics.reduce(self._denominator)
