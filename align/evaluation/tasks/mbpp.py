"""MBPP: basic Python programs from a description and its tests (Austin et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.evaluation.sampled_task import Grade, Graded, SampledTask, correct, single_turn
from align.evaluation.task import Row
from align.rewards.unit_tests import grade_mbpp, in_parallel
from align.sandbox.process import NUM_CORES


def prompt(row: Row) -> str:
    """Return the description and its tests, as in Austin et al. 2021, sec. 4."""
    tests = "\n".join(row["test_list"])
    return f"{row.get('text') or row['prompt']}\n\nYour code should pass these tests:\n\n{tests}"


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each program passes all of its row's tests, which run in sandboxes."""
    for verdict in in_parallel(lambda item: grade_mbpp(item.row, item.response), items, num_workers=NUM_CORES):
        yield correct(verdict.reward == 1, {"why": verdict.why} if verdict.why else {})


TASK = SampledTask(
    name="mbpp",
    metrics=("pass@1",),
    columns=("test_list",),
    id_column="task_id",
    next_turn=single_turn(prompt),
    grade=grade,
    pass_at_k=True,
)
