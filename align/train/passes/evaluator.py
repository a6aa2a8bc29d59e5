"""Evaluation of an objective on the held-out groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from align.train.indexed_groups import GroupView
from align.train.objectives.base import Objective
from align.train.passes.micro_batches import MicroBatcher
from align.train.passes.router_pass import RouterPass
from align.train.passes.step_statistics import StepStatistics


class Evaluator:
    """Computes the loss and the metrics of an objective on the held-out groups of a view."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        groups: GroupView,
        batcher: MicroBatcher,
        router_pass: Callable[[], RouterPass] | None = None,
    ) -> None:
        self._model, self._objective, self._batcher, self._router_pass = model, objective, batcher, router_pass
        held_out = range(groups.num_train, len(groups))
        self._plan = batcher.plan(held_out)
        self._denominator = objective.denominator(groups.select(held_out))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the loss, the metrics and the computed work over all held-out groups; all ranks call it together."""
        statistics = StepStatistics(self._batcher.accelerator)
        router = self._router_pass() if self._router_pass is not None else None
        for micro in self._batcher.micro_batches(self._plan):
            statistics.add(micro, self._objective(self._model, micro.batch))
            if router is not None:
                router.add(micro)
        metrics = statistics.reduce(self._denominator)
        return metrics if router is None else router.metrics(metrics)
