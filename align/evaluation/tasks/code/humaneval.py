"""HumanEval: completion of Python functions, graded by unit tests (Chen et al. 2021)."""

from __future__ import annotations

from align.errors import InputError
from align.evaluation.sampled_task import SampledTask, grade_programs, single_turn
from align.evaluation.task import Row
from align.rewards.unit_tests import grade_humaneval


def prompt(row: Row) -> str:
    """Return the function to complete."""
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n{row['prompt']}"


def check_row(row: Row) -> None:
    """Raise `InputError` for a row without tests, which any program would pass."""
    if not str(row["test"]).strip():
        raise InputError("has an empty test; humaneval rows have the tests of the function")


TASK = SampledTask(
    name="humaneval",
    metrics=("pass@1",),
    columns=("prompt", "test", "entry_point"),
    check_row=check_row,
    id_column="task_id",
    next_turn=single_turn(prompt),
    grade=grade_programs(grade_humaneval),
    pass_at_k=True,
)
