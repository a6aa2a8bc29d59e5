"""Tasks that measure given rows under the evaluated model, without sampling: their likelihood, or their rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from align.accounting.flops import Work
from align.errors import InputError
from align.evaluation.statistics import Score, score
from align.evaluation.task import ROW_OPTIONS, EstimateInputs, Parts, Task, TaskInputs, TaskResult, TaskSize

if TYPE_CHECKING:  # these modules import torch
    from align.data.token_groups import TokenGroup
    from align.distributed.processes import Processes
    from align.models.policy import Policy
    from align.models.reward_model import RewardModel


class Measure(Protocol):
    """A measurement of encoded rows under a policy or a reward model."""

    def __call__(
        self,
        model: Any,  # noqa: ANN401 - what the task's own `model` returns
        /,
        groups: Sequence[TokenGroup],
        *,
        precision: str,
        processes: Processes,
    ) -> Iterator[Parts]:
        """Yield the parts of each group, in order; empty parts for a group that cannot be measured."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodTask(Task):
    """A task that computes its metrics from the policy's log-probabilities of given responses."""

    measure: Measure
    preferred_only: bool = False  # measure the best response of each row alone
    compares: bool = False  # generated rows are comparisons of several responses
    options: frozenset[str] = ROW_OPTIONS | {"data", "policy", "max_length", "held_out"}
    required: tuple[str, ...] = ("data", "policy")

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return `name` if it contains the only metric, so that a column of nats is not taken for a rate."""
        return name if is_only and metric in name else f"{name} {metric}"

    def model(self, inputs: TaskInputs) -> Policy | RewardModel:
        """Return the evaluated model."""
        return inputs.policy()

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return the number of rows and of their tokens."""
        from align.models.tree.batch import count_tokens  # noqa: PLC0415 - imports torch

        groups = inputs.token_groups(preferred_only=False, compares=self.compares)
        return TaskSize(len(groups), sum(count_tokens(group.sequences) for group in groups), 0)

    def scores(self, parts: Sequence[Parts]) -> dict[str, Score]:
        """Return each metric over all rows that have one, with its interval over rows."""
        known = [each for each in parts if each]
        if not known:
            raise InputError(f"task {self.name}: no row has a better and a worse response to compare")
        return {name: score([each[name][0] for each in known], [each[name][1] for each in known]) for name in known[0]}

    def work(self, groups: Sequence[TokenGroup]) -> Work:
        """Return the work of the forward passes over the groups."""
        from align.evaluation.likelihood import forward_work  # noqa: PLC0415 - imports torch

        return forward_work(groups)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Measure every row."""
        model = self.model(inputs)
        groups = inputs.token_groups(preferred_only=self.preferred_only, compares=self.compares)
        inputs.progress.phase(self.name, len(groups))
        parts: list[Parts] = []
        for each in self.measure(model, groups, precision=inputs.precision, processes=inputs.processes):
            parts.append(each)
            inputs.progress.advance(1)
        lines = [
            {
                "row": group.row,
                "parts": {name: part for name, part in each.items() if name in self.metrics},
                "measures": {name: part for name, part in each.items() if name not in self.metrics},
            }
            for group, each in zip(groups, parts, strict=True)
        ]
        found = self.scores(parts)
        return TaskResult(
            scores={name: score for name, score in found.items() if name in self.metrics},
            measures={name: score for name, score in found.items() if name not in self.metrics},
            lines=lines,
            work=self.work(groups),
        )
