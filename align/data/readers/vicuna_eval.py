"""Vicuna's evaluation files: questions, answers and reviews, joined into one row a question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import mean

from align.data.comparisons import number
from align.data.dialogues import listed, rest, shortened
from align.data.rows import Row
from align.errors import InputError
from align.records import Located


def reviewed_answers(rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
    """Join questions, answers and reviews into one native row a question; a reward is an answer's mean score."""
    questions: dict[str, Located[Row]] = {}
    answers: list[Located[Row]] = []
    scores: dict[str, list[float]] = {}
    place = ""
    for located in rows:
        row, place = located.record, located.place
        if "answer1_id" in row:
            for name, score in zip(("answer1_id", "answer2_id"), listed(row["score"], f"{place}: score"), strict=False):
                given = number(score, f"{place}: score")
                if given is not None and given >= 0:  # -1 means that the review has no score
                    scores.setdefault(str(row[name]), []).append(given)
        elif "answer_id" in row:
            answers.append(located)
        else:
            questions[str(row["question_id"])] = located
    if not questions:
        raise InputError(f"{place}: there are no questions; name the folder that holds them with answers and reviews")
    responses: dict[str, list[Row]] = {}
    for located in answers:
        row = located.record
        if str(row["question_id"]) not in questions:
            raise InputError(f"{located.place}: there is no question {shortened(row['question_id'])}")
        reviews = scores.get(str(row["answer_id"]))
        reward = mean(reviews) if reviews else None
        response = {"content": row["text"], "model": row.get("model"), "reward": reward}
        responses.setdefault(str(row["question_id"]), []).append(response)
    for question, located in questions.items():
        answered = {"responses": responses[question]} if question in responses else {}
        native = {"prompt": located.record["text"], "metadata": rest(located.record, {"text"}), **answered}
        yield replace(located, record=native)
