"""The interface of objectives: the loss of a micro-batch as a sum, with metrics as sums and counts.

Shape legend: B groups of the micro-batch, K responses of the largest group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from align.models.tree.batch import TokenBatch
from align.train.indexed_groups import GroupView
from align.train.objectives.batch import GroupBatch


@dataclass(frozen=True, slots=True)
class Tally:
    """A mean as sum and count, so that it can be added up over micro-batches and ranks."""

    total: Tensor
    count: Tensor

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """The loss and the metrics of a micro-batch; the loop divides by the denominator of the whole step."""

    loss: Tensor  # a sum, scalar
    tallies: Mapping[str, Tally]
    logps_BK: Tensor | None = None  # of the policy, if there are references: before the first update they must agree


class Objective(Protocol):
    """What a training step minimizes: the sum of `__call__` over micro-batches divided by `denominator`."""

    needs_reference: bool  # whether batches need reference log-probabilities

    def cache_key(self) -> object:
        """Return everything that determines the loss, as plain values; a checkpoint resumes only the same objective."""
        ...

    def denominator(self, groups: GroupView) -> float:
        """Return what the summed loss over these groups of an optimizer step is divided by."""
        ...

    def __call__(self, policy: nn.Module, batch: GroupBatch) -> ObjectiveOutput:
        """Return the summed loss and the metrics of one micro-batch."""
        ...


@runtime_checkable
class ScoredObjective(Objective, Protocol):
    """An objective whose loss of each group can be computed from stored outputs of a model, for online selection."""

    output_shape: tuple[int, ...]  # of the outputs for one sequence: () or [A]

    def outputs(self, policy: nn.Module, tokens: TokenBatch) -> Tensor:
        """Return what the losses need of the model, for each sequence, shape [S] or [S, A]."""
        ...

    def group_losses(self, outputs_S: Tensor, batch: GroupBatch) -> Tensor:
        """Return the loss of each group, shape [B], in fp64; of a group with more tokens or labels it is a mean."""
        ...
