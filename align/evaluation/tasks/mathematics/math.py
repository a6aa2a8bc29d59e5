r"""MATH: competition problems with a final answer in \boxed (Hendrycks et al. 2021, arXiv:2103.03874).

Rows are {problem, solution}, with the answer in the last \boxed of the solution, or {problem, answer} as in MATH-500.
Answers are compared by math-verify, so figures that rest on comparison of strings are lower.
"""

from __future__ import annotations

from align.errors import InputError
from align.evaluation.sampled_task import CORRECT, SampledTask, single_turn
from align.evaluation.task import Row
from align.evaluation.tasks.mathematics.final_answers import answer_in, grade_final_answers


def prompt(row: Row) -> str:
    """Return the problem and the expected form of the answer."""
    return f"{row['problem']}\n\nReason step by step, and put the final answer in \\boxed{{}}."


def expected(row: Row) -> str:
    """Return the known answer: the column `answer`, else the last box of the solution; raise `InputError` for none."""
    if (answer := row.get("answer")) is not None and str(answer).strip():
        return str(answer)
    if row.get("solution") is None:
        raise InputError("has neither an answer nor a solution; math rows have one")
    solution = str(row["solution"])
    if "\\boxed" not in solution and "\\fbox" not in solution:
        raise InputError(f"solution {solution[-40:]!r}: has no \\boxed answer")
    return answer_in(solution, example="\\boxed{42}")


TASK = SampledTask(
    name="math",
    metrics=(CORRECT,),
    columns=("problem",),
    check_row=expected,
    id_column="unique_id",
    next_turn=single_turn(prompt),
    grade=grade_final_answers(expected),
)
