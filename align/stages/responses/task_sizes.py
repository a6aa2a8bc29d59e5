"""How much the tasks of the stage `evaluate` compute, for an estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from align.data.token_groups import TokenGroup
from align.evaluation.task import Row, Task, TaskSize
from align.stages.costs.estimates import Planning, prompt_tokens
from align.stages.responses.tasks import TaskSettings, likelihood_rows, task_rows


class _EstimateInputs(NamedTuple):
    """What a task needs to estimate its size (`align.evaluation.task.EstimateInputs`)."""

    settings: TaskSettings
    planning: Planning

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    def rows(self, task: Task) -> Sequence[Row]:
        return task_rows(task, self.settings.data, self.planning.inputs)

    def token_groups(self, *, preferred_only: bool, compares: bool = False) -> Sequence[TokenGroup]:
        name, inputs, tokenizer = self.settings.data, self.planning.inputs, self.planning.tokenizer
        found = likelihood_rows(name, inputs, tokenizer, model_limit=None, best=preferred_only, compares=compares)
        return found[0]

    def num_prompt_tokens(self, prompts: Sequence[Any]) -> int:
        return prompt_tokens(prompts, self.planning.tokenizer)


def planned_size(settings: TaskSettings, task: Task, planning: Planning) -> TaskSize:
    """Return how much a task computes; its rows are read once for all steps that evaluate it with one tokenizer."""
    inputs = planning.inputs
    key = repr((settings, inputs.sources.get(settings.data), inputs.seed, id(planning.tokenizer)))
    if key not in planning.task_sizes:
        planning.task_sizes[key] = task.size(_EstimateInputs(settings, planning))
    return planning.task_sizes[key]
