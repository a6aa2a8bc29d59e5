"""HumanEval: completion of Python functions, graded by unit tests (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.evaluation.sampled_task import Grade, Graded, SampledTask, correct, single_turn
from align.evaluation.task import Row
from align.rewards.unit_tests import grade_humaneval, in_parallel
from align.sandbox.process import NUM_CORES


def prompt(row: Row) -> str:
    """Return the function to complete."""
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n{row['prompt']}"


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each program passes all of its row's tests, which run in sandboxes."""
    for verdict in in_parallel(lambda item: grade_humaneval(item.row, item.response), items, num_workers=NUM_CORES):
        yield correct(verdict.reward == 1, {"why": verdict.why} if verdict.why else {})


TASK = SampledTask(
    name="humaneval",
    metrics=("pass@1",),
    columns=("prompt", "test", "entry_point"),
    id_column="task_id",
    next_turn=single_turn(prompt),
    grade=grade,
    pass_at_k=True,
)
