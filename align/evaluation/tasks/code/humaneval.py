"""HumanEval: completion of Python functions, graded by unit tests (Chen et al. 2021)."""

from __future__ import annotations

from align.evaluation.sampled_task import SampledTask, grade_programs, single_turn
from align.evaluation.task import Row
from align.rewards.unit_tests import grade_humaneval


def prompt(row: Row) -> str:
    """Return the function to complete."""
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n{row['prompt']}"


TASK = SampledTask(
    name="humaneval",
    metrics=("pass@1",),
    columns=("prompt", "test", "entry_point"),
    id_column="task_id",
    next_turn=single_turn(prompt),
    grade=grade_programs(grade_humaneval),
    pass_at_k=True,
)
