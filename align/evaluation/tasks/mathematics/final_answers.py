"""Grade a response by its final answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from align.errors import InputError
from align.evaluation.sampled_task import Check, Grade, Graded, Grader, correct
from align.evaluation.task import Row
from align.rewards.answers.comparison import same_answer
from align.rewards.answers.extraction import final_answer


def grade_final_answers(expected_of: Callable[[Row], str]) -> Grader:
    """Return a `grade` by which a response is right if its final answer equals the row's, however each is written.

    A response without a final answer is wrong; its verdict has the answer null.
    """

    def grade(items: Sequence[Graded]) -> Iterator[Grade]:
        for row, response, _ in items:
            expected = expected_of(row)
            given = final_answer(response)
            passed = given is not None and same_answer(given, expected)
            check = Check(f"final answer {given}, expected {expected}", passed, () if given is None else (given,))
            yield correct(passed, {"answer": given}, [check])

    return grade


def answer_in(text: str, *, example: str) -> str:
    """Return the final answer of a reference solution; raise `InputError` if it has none."""
    found = final_answer(text)
    if found is None:
        raise InputError(f"answer {text[-40:]!r}: holds no final answer, such as {example!r}")
    return found
