"""The project's own procedural tasks: a response passes if every check of its row holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.evaluation.sampled_task import CORRECT, Check, Grade, Graded, SampledTask, correct, single_turn
from align.evaluation.task import Row
from align.procedural import tasks
from align.records import Message


def prompt(row: Row) -> str:
    """Return the row's prompt."""
    return str(row["prompt"])


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each response passes every check."""
    for verdicts in tasks.grade_all([(row, response) for row, response, _ in items]):
        yield correct(all(verdicts), checks=[Check(f"check {at}", passed) for at, passed in enumerate(verdicts, 1)])


def follow_up(row: Row, responses: Sequence[str]) -> Sequence[Message] | None:
    """Return the first request, then the dialogue with the follow-up of the user, then None."""
    if len(responses) > 1:
        return None
    said = [Message("assistant", responses[0]), Message("user", row["follow_up"])] if responses else []
    return [Message("user", prompt(row)), *said]


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
DIALOGUES = SampledTask(
    name="dialogues",
    metrics=(CORRECT,),
    columns=("prompt", "kind", "follow_up", "revised"),
    id_column="origin",
    next_turn=follow_up,
    grade=grade,
)
