"""Win rate of a policy's responses over a baseline's, by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.evaluation.pairwise import win_rates
from align.evaluation.task import ROW_OPTIONS, EstimateInputs, Task, TaskInputs, TaskResult, TaskSize
from align.rewards.verdicts import Group, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRateTask(Task):
    """A task whose pairs of responses are compared by a judge."""

    options: frozenset[str] = ROW_OPTIONS | {"data", "responses", "judges", "combine", "thoughts", "rows.constraints"}
    required: tuple[str, ...] = ("data",)

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return no size: the judge's work is not known."""
        return TaskSize(0, 0, 0)

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Judge each pair of responses."""
        judge, paired = inputs.judge(), inputs.paired_responses()

        def shared(groups: Sequence[Group]) -> list[tuple[Verdict, ...]]:
            return inputs.split(groups, judge, activity="judging")

        found = win_rates(paired.pairs, shared)
        scores = {"win_rate": found.win_rate, "win_rate_length_controlled": found.length_controlled}
        return TaskResult(scores=scores, counts={"undecided": found.undecided, "unanswered": paired.unanswered})


TASK = WinRateTask(name="win_rate", metrics=("win_rate", "win_rate_length_controlled"))
