"""MMLU: multiple choice in 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300), zero-shot, measured in three ways.

`likelihood` is the form of lm-evaluation-harness's task `mmlu`: the question with lettered choices and "Answer:", and
the most likely of " A", " B", " C" and " D". `likelihood_chat` asks by the chat template and takes the most likely
letter at the beginning of the assistant's turn. `generated` is exact match of the letter in the policy's answer, where
an answer without a letter is wrong; `unparsable` is the share of these. The first two never fail to parse, and the last
also tests whether the policy follows the form, so the three differ for one policy.

Rows are those of the Hub, {question, subject, choices, answer: 0 to 3}, or of the original CSV files, {question, A, B,
C, D, answer: a letter}, also without a header. Intervals are by bootstrap within subjects, whose sizes are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from align.data.readers.cells import as_list
from align.errors import InputError
from align.evaluation.sampled_task import OPTIONS, Grade, Graded, SampledTask, single_turn
from align.evaluation.statistics import stratified_score
from align.evaluation.task import Answer, Row, TaskInputs, TaskResult
from align.records import Message

LETTERS = "ABCD"
LIKELIHOOD, LIKELIHOOD_CHAT, GENERATED, UNPARSABLE = "likelihood", "likelihood_chat", "generated", "unparsable"
OF_ANSWERS = (GENERATED, UNPARSABLE)
FIRST = re.compile(r"\W*(?P<letter>[A-D])(?:[.):,\]*}]|\s*$|\s*\n)")  # not the article: "A plant"
NO_ARTICLE = r"A(?!\w|\s+(?!(?:because|since|as|and|but|which)\b)[a-z])"  # not as in "the answer is A planet"
LINK = r"[\s*]*(?i:is|:)[\s*:]*(?:(?i:option|choice|letter)\b)?"
STATED = re.compile(
    rf"(?:(?i:answer|choice|option){LINK}|(?i:answer))[\s*(\[]*(?P<letter>{NO_ARTICLE}|[B-D]\b)"
    r"|\\boxed\{\s*(?:\\text\{)?\(?(?P<boxed>[A-D])\b"
    r"|\b(?P<named>[A-D])[)*]*\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
)
MENTIONED = re.compile(r"(?i:choice|option)[\s*(\[]+(?P<letter>[A-D])\b")  # the answer only where none is stated


class Question(NamedTuple):
    """A row in one form."""

    text: str  # the question and its lettered choices
    subject: str
    answer: int  # index of the right choice


def read_question(row: Row) -> Question:
    """Return the question of a row; raise `InputError` for a row of another form."""
    given = row.get("choices")
    choices = [row.get(letter) for letter in LETTERS] if given is None else as_list(given, "choices")
    if len(choices) != len(LETTERS) or any(choice is None for choice in choices):
        raise InputError(f"has {len(choices)} choices; mmlu rows have four, as `choices` or as columns A, B, C and D")
    answer = str(row["answer"]).strip()
    known = {**{letter: at for at, letter in enumerate(LETTERS)}, **{str(at): at for at in range(len(LETTERS))}}
    if answer not in known:
        raise InputError(f"has answer {row['answer']!r}; it is a letter from A to D or a number from 0 to 3")
    lettered = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    text = "\n".join([str(row["question"]).strip(), *lettered])
    return Question(text, str(row.get("subject") or "").replace("_", " "), known[answer])


def plain_prompt(row: Row) -> str:
    """Return the prompt without a chat template, as in lm-evaluation-harness."""
    found = read_question(row)
    about = f" about {found.subject}" if found.subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n{found.text}\nAnswer:"


def prompt(row: Row) -> str:
    """Return the question to a chat model."""
    return f"{read_question(row).text}\n\nAnswer with the letter of the correct choice."


def letter_in(response: str) -> str | None:
    """Return the letter that a response gives: at its beginning, or the last one that it calls the answer.

    An option that is only mentioned, as those that an explanation rules out, counts where no answer is stated.

    >>> letter_in("(B) Mars"), letter_in("It must be Mars, so the answer is **B**."), letter_in("A planet.")
    ('B', 'B', None)
    """
    if match := FIRST.match(response):
        return match["letter"]
    found = list(STATED.finditer(response)) or list(MENTIONED.finditer(response))
    return found[-1][found[-1].lastgroup or 0] if found else None


def grade(items: Sequence[Graded]) -> Iterator[Grade]:
    """Yield whether each response gives the right letter, and whether it gives one."""
    for row, response, _ in items:
        given = letter_in(response)
        right = given == LETTERS[read_question(row).answer]
        yield Grade({"answer": given}, {GENERATED: (float(right), 1), UNPARSABLE: (float(given is None), 1)})


@dataclass(frozen=True, slots=True, kw_only=True)
class MmluTask(SampledTask):
    """A task whose rows are also measured by the likelihood of their letters."""

    def samples(self, metrics: Sequence[str] | None) -> bool:
        """Return whether a metric or measure of answers is asked for."""
        return bool({*OF_ANSWERS, *self.measures} & set(self.metrics if metrics is None else metrics))

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Sample and grade answers, and measure the letters, as far as their metrics are asked for."""
        rows = inputs.rows(self)
        asked = [name for name in self.metrics if inputs.metrics is None or name in inputs.metrics]
        result = TaskResult(scores={})
        parts = [dict[str, tuple[float, float]]() for _ in rows]
        if self.samples(inputs.metrics):
            result = SampledTask.run(self, inputs)
        measured = [name for name in (LIKELIHOOD, LIKELIHOOD_CHAT) if name in asked]
        if measured and inputs.measures_likelihood:
            for name in measured:
                for part, right in zip(parts, self._right(inputs, rows, chat=name == LIKELIHOOD_CHAT), strict=True):
                    part[name] = (float(right), 1)
        elif measured:
            inputs.progress.note(f"{self.name}: {' and '.join(measured)} need the policy in this process")
        return _combined(result, rows, parts, asked)

    def _right(self, inputs: TaskInputs, rows: Sequence[Row], *, chat: bool) -> list[bool]:
        """Return whether the right letter of each row is the most likely one; of equal ones, the first."""
        if chat:
            prompts = [(Message("user", prompt(row)),) for row in rows]
            found = inputs.choice_logps(prompts, tuple(LETTERS))
        else:
            found = inputs.choice_logps([plain_prompt(row) for row in rows], tuple(f" {letter}" for letter in LETTERS))
        expected = [read_question(row).answer for row in rows]
        return [logps.index(max(logps)) == answer for logps, answer in zip(found, expected, strict=True)]

    def _line(self, row: Row, answer: Answer, grade: Grade) -> dict[str, Any]:
        return {"row": answer.row, **SampledTask._line(self, row, answer, grade)}


def _combined(
    result: TaskResult, rows: Sequence[Row], parts: Sequence[Mapping[str, tuple[float, float]]], asked: Sequence[str]
) -> TaskResult:
    """Return the result with the likelihoods beside the answers, and all scores with intervals within subjects."""
    lines: list[dict[str, Any]] = [{"row": at, "prompt": prompt(row), "parts": {}} for at, row in enumerate(rows)]
    for line in result.lines:  # of several answers to a row, the last is shown
        before = lines[line["row"]]
        own = {name: _sum(before["parts"].get(name, (0, 0)), part) for name, part in line["parts"].items()}
        lines[line["row"]] = {**before, **line, "parts": own}
    values: dict[str, dict[str, list[float]]] = {}
    for line, row, own in zip(lines, rows, parts, strict=True):
        line["parts"] = {**line["parts"], **own}
        for name, (right, of) in line["parts"].items():
            values.setdefault(name, {}).setdefault(read_question(row).subject, []).append(right / of)
    scores = {name: stratified_score(values[name]) for name in asked if name in values}
    counts = {**result.counts, "subjects": _by_subject(values)}
    return replace(result, scores=scores, lines=lines, counts={"rows": len(rows), **counts})


def _sum(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _by_subject(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Return {subject: {metric: mean}}."""
    found: dict[str, dict[str, float]] = {}
    for name, subjects in values.items():
        for subject, each in subjects.items():
            found.setdefault(subject, {})[name] = sum(each) / len(each)
    return found


TASK = MmluTask(
    name="mmlu",
    metrics=(LIKELIHOOD, LIKELIHOOD_CHAT, *OF_ANSWERS),
    columns=("question", "answer"),
    options=OPTIONS,
    check_row=read_question,
    next_turn=single_turn(prompt),
    grade=grade,
)
