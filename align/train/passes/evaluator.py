"""Evaluation of an objective on the held-out groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from align.train.indexed_groups import GroupView
from align.train.objectives.base import Objective
from align.train.passes.kl_pass import KLPass
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
        kl_pass: KLPass | None = None,
    ) -> None:
        self._model, self._objective, self._batcher = model, objective, batcher
        self._router_pass, self._kl_pass = router_pass, kl_pass
        held_out = range(groups.num_train, len(groups))
        self._plan = batcher.plan(held_out)
        self._groups = groups.select(held_out)
        self._denominator = objective.denominator(self._groups)

    @torch.no_grad()
    def evaluate(self, prefix: str = "") -> dict[str, float]:
        """Return the loss, the metrics and the computed work over all held-out groups; all ranks call it together.

        Their names begin with `prefix`.
        """
        statistics = StepStatistics(self._batcher.ranks)
        estimate = self._kl_pass.of_held_out(self._groups) if self._kl_pass is not None else None
        router = self._router_pass() if self._router_pass is not None else None
        for micro in self._batcher.micro_batches(self._plan, kl=estimate and estimate.kl):
            statistics.add(micro, self._objective(self._model, micro.batch))
            if router is not None:
                router.add(micro)
        metrics = statistics.reduce(self._denominator) | (estimate.metrics if estimate is not None else {})
        metrics = metrics if router is None else router.metrics(metrics)
        return {prefix + name: value for name, value in metrics.items()}
