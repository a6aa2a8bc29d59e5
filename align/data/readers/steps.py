"""Solutions with a label for each step, to responses that are liked or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from align.data.columns import Row
from align.data.readers.cells import as_list, as_number, as_object, as_text, metadata_of, shortened
from align.data.readers.pairs import LIKED
from align.data.readers.prompts import row_prompt
from align.errors import InputError
from align.records import Comparison, Message, Record, Response

FINAL_ANSWER = re.compile(r"^#+\s*answer\b|\banswer is\b|\\boxed\b", re.IGNORECASE | re.MULTILINE)
OUTCOMES = {"solution": True, "found_error": False}  # finish_reason -> whether the solution is right
PROBLEM_FIELDS = ("problem", "ground_truth_answer", "pre_generated_steps")  # of `question` that are read


def prm800k(row: Row) -> Iterator[Record]:
    """Yield a solution whose steps people have rated, liked where all of it is right; Lightman et al. 2023 (PRM800K).

    A right solution is the path that the labeler chose to the end, a wrong one the model's own solution. The metadata's
    `answer` is the known one. A row without a judged solution raises `InputError`.
    """
    question, label = as_object(row["question"], "question"), as_object(row["label"], "label")
    reason = str(label.get("finish_reason"))
    if reason not in OUTCOMES:
        raise InputError(f"finish_reason is {shortened(reason)}; a judged solution has {' or '.join(OUTCOMES)}")
    is_right = OUTCOMES[reason]
    texts = _chosen_path(label) if is_right else _texts(question.get("pre_generated_steps"), "pre_generated_steps")
    prompt = as_text(question.get("problem"), "problem")
    metadata = metadata_of(row, {"question", "label"})
    metadata |= {"answer": question["ground_truth_answer"]} if question.get("ground_truth_answer") else {}
    yield _solution((Message("user", prompt),), texts, is_right, metadata)


def has_judged_solution(row: Row) -> bool:
    """Return whether the columns are objects with the fields of PRM800K."""
    question, label = row["question"], row["label"]
    return isinstance(question, Mapping) and isinstance(label, Mapping) and "finish_reason" in label


def unread_in_prm800k(row: Row) -> set[str]:
    """Return the fields of `question` that are not read."""
    question = row.get("question")
    fields = question if isinstance(question, Mapping) else {}
    return {f"question.{name}" for name in fields if name not in PROBLEM_FIELDS and fields[name] not in (None, "", [])}


def _chosen_path(label: Row) -> list[str]:
    """Return the text of each step that the labeler chose; none of them may be rated as wrong."""
    texts: list[str] = []
    for value in as_list(label.get("steps"), "steps"):
        step = as_object(value, "a step")
        index = step.get("chosen_completion")
        completions = as_list(step.get("completions") or [], "completions")
        if isinstance(index, int) and 0 <= index < len(completions):
            chosen = as_object(completions[index], "a completion")
            if (as_number(chosen.get("rating"), "rating") or 0) < 0:
                raise InputError("the chosen solution has a step that is rated as wrong")
        elif step.get("human_completion"):
            chosen = as_object(step["human_completion"], "human_completion")
        else:
            raise InputError("a step of the solution has no chosen completion")
        texts.append(as_text(chosen.get("text"), "a step"))
    return texts


def labelled_steps(row: Row) -> Iterator[Record]:
    """Yield a solution with a label for each step, in TRL's form, liked where all steps are right.

    Rows that end before the final answer raise `InputError`: their last step may be right, but they solve nothing.
    """
    texts = _texts(row["completions"], "completions")
    labels = as_list(row["labels"], "labels")
    if len(texts) != len(labels):
        raise InputError(f"labels has {len(labels)} items, and completions has {len(texts)}")
    prompt = row_prompt(row, ("prompt",))
    yield _solution(prompt.messages, texts, all(labels), metadata_of(row, {*prompt.columns, "completions", "labels"}))


def has_labelled_steps(row: Row) -> bool:
    """Return whether the completions are the steps of one solution, not alternative responses."""
    labels = row["labels"]
    return isinstance(labels, list) and bool(labels) and all(isinstance(label, bool) for label in labels)


def _texts(value: Any, name: str) -> list[str]:  # noqa: ANN401 - a cell of any type
    return [as_text(text, f"a text of {name}") for text in as_list(value, name)]


def _solution(prompt: tuple[Message, ...], texts: list[str], is_right: bool, metadata: dict[str, Any]) -> Comparison:
    if not texts or not FINAL_ANSWER.search(texts[-1]):
        raise InputError("the solution ends before a final answer")
    response = Response("\n".join(texts), float(is_right))
    return Comparison(prompt, (response,), None, {**metadata, LIKED: is_right})
