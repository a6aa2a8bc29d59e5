"""GSM8K: grade-school mathematics with a numeric final answer (Cobbe et al. 2021)."""

from __future__ import annotations

from align.errors import InputError
from align.evaluation.sampled_task import CORRECT, SampledTask, single_turn
from align.evaluation.task import Row
from align.evaluation.tasks.mathematics.final_answers import answer_in, grade_final_answers
from align.rewards.answers.quantities import parse_quantity

EXAMPLE = "#### 42"


def prompt(row: Row) -> str:
    """Return the question and the expected form of the answer."""
    return f"{row['question']}\n\nReason step by step, and end with the answer after ####."


def expected(row: Row) -> str:
    """Return the answer of the row's solution; raise `InputError` if it has none."""
    known = str(row["answer"])
    answer = answer_in(known, example=EXAMPLE)
    is_marked = "####" in known or any(map(str.isdigit, known))  # other words may be anything
    if not (is_marked or parse_quantity(answer)):
        raise InputError(f"answer {known[-40:]!r}: holds no final answer, such as {EXAMPLE!r}")
    return answer


TASK = SampledTask(
    name="gsm8k",
    metrics=(CORRECT,),
    columns=("question", "answer"),
    check_row=expected,
    next_turn=single_turn(prompt),
    grade=grade_final_answers(expected),
)
