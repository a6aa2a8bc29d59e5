"""The project's own procedural tasks: a response passes if every check of its row holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.evaluation.sampled_task import CORRECT, Grade, Graded, SampledTask, correct, single_turn
from align.evaluation.task import Row
from align.procedural import tasks


def prompt(row: Row) -> str:
    """Return the row's prompt."""
    return str(row["prompt"])


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each response passes every check."""
    for verdicts in tasks.grade_all([(row, response) for row, response, _ in items]):
        yield correct(all(verdicts))


GENERAL = SampledTask(
    name="general",
    metrics=(CORRECT,),
    columns=("prompt", "kind"),
    id_column="origin",
    next_turn=single_turn(prompt),
    grade=grade,
)
CODE = SampledTask(
    name="code",
    metrics=(CORRECT,),
    columns=("prompt", "kind", "examples"),
    id_column="origin",
    next_turn=single_turn(prompt),
    grade=grade,
)
