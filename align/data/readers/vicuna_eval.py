"""Vicuna's evaluation files: questions, answers and reviews, joined into one row per question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import mean

from align.data.columns import Row
from align.data.readers.cells import as_list, as_number, metadata_of, shortened
from align.errors import InputError
from align.records import Located, at_place

ANSWER_IDS = ("answer1_id", "answer2_id")


def reviewed_answers(rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
    """Yield a native row per question, with its answers as responses; a reward is the mean of an answer's scores."""
    questions: dict[str, Located[Row]] = {}
    answers: dict[str, Located[Row]] = {}
    reviews: dict[str, Located[Row]] = {}
    place = ""
    for located in rows:
        place = located.place
        if "answer1_id" in located.record:
            _add(located, "review_id", reviews)
        elif "answer_id" in located.record:
            _add(located, "answer_id", answers)
        else:
            _add(located, "question_id", questions)
    if not questions:
        raise InputError(f"{place}: no row is a question; name the folder with questions, answers and reviews")
    scores: dict[str, list[float]] = {}
    for located in reviews.values():
        with at_place(located.place):
            _add_scores(located.record, scores)
    responses: dict[str, list[Row]] = {}
    for located in answers.values():
        row = located.record
        if str(row["question_id"]) not in questions:
            raise InputError(f"{located.place}: no question has the id {shortened(row['question_id'])}")
        marks = scores.get(str(row["answer_id"]))
        reward = mean(marks) if marks else None
        response = {"content": row["text"], "model": row.get("model"), "reward": reward}
        responses.setdefault(str(row["question_id"]), []).append(response)
    for question, located in questions.items():
        answered = {"responses": responses[question]} if question in responses else {}
        native = {"prompt": located.record["text"], "metadata": metadata_of(located.record, {"text"}), **answered}
        yield replace(located, record=native)


def _add(located: Located[Row], column: str, known: dict[str, Located[Row]]) -> None:
    """Add a row under its id. Raise `InputError` for an id that another row has; a review can be without one."""
    key = str(located.record.get(column, located.place))
    if key in known:
        raise InputError(
            f"{located.place}: {column} {shortened(located.record[column])} is also that of {known[key].place}; "
            "ids must differ; to read each row as a prompt, set `columns: {prompt: text}`"
        )
    known[key] = located


def _add_scores(review: Row, scores: dict[str, list[float]]) -> None:
    """Add the scores of a review to those of the two answers it compares."""
    for name, score in zip(ANSWER_IDS, as_list(review["score"], "score"), strict=False):
        number = as_number(score, "score")
        if number is not None and number >= 0:  # -1 marks a review without a score
            scores.setdefault(str(review[name]), []).append(number)
