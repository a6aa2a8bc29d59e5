"""MBPP: basic Python programs from a description and its tests (Austin et al. 2021); MBPP+ with more tests.

Rows of MBPP+ (Liu et al. 2023, EvalPlus) have a column `test` with more inputs and their results. `mbpp_plus` asks for
both kinds of tests, as EvalPlus's "base + plus" does. HumanEval+ needs no task of its own: the column `test` of its
rows contains all tests, and the task `humaneval` reads them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from align.errors import InputError
from align.evaluation.sampled_task import SampledTask, grade_programs, single_turn
from align.evaluation.task import Row
from align.rewards.unit_tests import grade_mbpp


def prompt(row: Row) -> str:
    """Return the description and its tests, as in Austin et al. 2021, sec. 4."""
    tests = "\n".join(row["test_list"])
    return f"{row.get('text') or row['prompt']}\n\nYour code should pass these tests:\n\n{tests}"


def check_row(row: Row, *, plus: bool = False) -> None:
    """Raise `InputError` for a row without a description, or without tests."""
    if not (row.get("text") or row.get("prompt")):
        raise InputError("has no text and no prompt; MBPP rows have one")
    tests = row["test_list"]
    if not tests or not isinstance(tests, list) or not all(isinstance(test, str) and test.strip() for test in tests):
        raise InputError(f"has test_list {tests!r:.60}; MBPP rows have a list of texts")
    if plus and not str(row["test"]).strip():
        raise InputError("has an empty test; mbpp_plus rows have EvalPlus's tests")


TASK = SampledTask(
    name="mbpp",
    metrics=("pass@1",),
    columns=("test_list",),
    check_row=check_row,
    id_column="task_id",
    next_turn=single_turn(prompt),
    grade=grade_programs(grade_mbpp),
    pass_at_k=True,
)
PLUS = replace(
    TASK,
    name="mbpp_plus",
    columns=("test_list", "test"),
    check_row=partial(check_row, plus=True),
    grade=grade_programs(partial(grade_mbpp, plus=True)),
)
