"""GSM8K: grade-school mathematics with a numeric final answer (Cobbe et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.errors import InputError
from align.evaluation.sampled_task import CORRECT, Grade, Graded, SampledTask, correct, single_turn
from align.evaluation.task import Row
from align.rewards.answers.comparison import same_answer
from align.rewards.answers.extraction import final_answer
from align.rewards.answers.quantities import parse_quantity


def prompt(row: Row) -> str:
    """Return the question and the expected form of the answer."""
    return f"{row['question']}\n\nReason step by step, and end with the answer after ####."


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each response's final answer equals the row's."""
    for row, response, _ in items:
        known, given = str(row["answer"]), final_answer(response)
        expected = final_answer(known)
        is_marked = "####" in known or any(map(str.isdigit, known))  # other words may be anything
        if expected is None or not (is_marked or parse_quantity(expected)):
            raise InputError(f"answer {str(row['answer'])[-40:]!r}: holds no final answer, such as '#### 42'")
        yield correct(given is not None and same_answer(given, expected), {"answer": given})


TASK = SampledTask(
    name="gsm8k",
    metrics=(CORRECT,),
    columns=("question", "answer"),
    next_turn=single_turn(prompt),
    grade=grade,
)
