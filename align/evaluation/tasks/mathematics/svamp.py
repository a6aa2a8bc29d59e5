"""SVAMP: arithmetic word problems that vary known ones (Patel et al. 2021, arXiv:2103.07191).

Rows are {Body, Question, Answer}; the metric is exact match of the final number.
"""

from __future__ import annotations

from align.evaluation.sampled_task import CORRECT, SampledTask, single_turn
from align.evaluation.task import Row
from align.evaluation.tasks.mathematics.final_answers import grade_final_answers


def prompt(row: Row) -> str:
    """Return the problem and the expected form of the answer, as for GSM8K."""
    body = str(row["Body"]).strip()
    end = "" if body.endswith((".", "!", "?", ",")) else "."  # many bodies of the published file end without
    return f"{body}{end} {row['Question']}\n\nReason step by step, and end with the answer after ####."


TASK = SampledTask(
    name="svamp",
    metrics=(CORRECT,),
    columns=("Body", "Question", "Answer"),
    id_column="ID",
    next_turn=single_turn(prompt),
    grade=grade_final_answers(lambda row: str(row["Answer"])),
)
