"""Tasks that sample responses from a policy, or read them from a file, and grade each with a program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from align.accounting.flops import sum_work
from align.data.readers.tool_calls import tools_of
from align.evaluation.measures.response_measures import KL_FROM_START, MEASURES, measure_parts
from align.evaluation.statistics import Score, score
from align.evaluation.task import (
    ROW_OPTIONS,
    Answer,
    EstimateInputs,
    NextTurn,
    Parts,
    Row,
    Sampled,
    StartKL,
    Task,
    TaskInputs,
    TaskResult,
    TaskSize,
)
from align.records import Message, Prompt, at_place, is_cut_off
from align.rewards.thoughts import THINK, ThoughtSettings, response_text, visible_text
from align.rewards.unit_tests import in_parallel, pass_at_k
from align.rewards.verdicts import Verdict
from align.sandbox.process import NUM_CORES

T = TypeVar("T")

CORRECT = "correct"
PASS_AT = (1, 10, 100)  # Chen et al. 2021, sec. 2.1; a k is reported if every prompt has at least k responses
OF_SAMPLING = frozenset({"policy", "sampling", "engine"})
OPTIONS = OF_SAMPLING | ROW_OPTIONS | {"data", "responses", "out", "rows.constraints", "thoughts"}


class Graded(NamedTuple):
    """A row with the response to grade, without its thoughts."""

    row: Row
    response: str  # a `VisibleText`, which knows whether it was cut off
    earlier: tuple[str, ...] = ()


class Check(NamedTuple):
    """One of the checks that a response passes or fails, for people who read it."""

    name: str
    passed: bool
    found: tuple[str, ...] = ()  # texts of the response that it is about


@dataclass(frozen=True, slots=True)
class Grade:
    """A program's verdict on one response."""

    line: Mapping[str, Any]  # JSON, in the task's published form
    parts: Parts
    checks: Sequence[Check] = ()

    @property
    def reward(self) -> float:
        """The fraction passed, by the metric that counts the most parts of the response."""
        passed, count = max(self.parts.values(), key=itemgetter(1))
        return passed / count


Grader = Callable[[Sequence[Graded]], Iterator[Grade]]


def single_turn(question: Callable[[Row], str]) -> NextTurn:
    """Return a `next_turn` that asks one question per row."""

    def next_turn(row: Row, responses: Sequence[str]) -> Sequence[Message] | None:
        return None if responses else (Message("user", question(row)),)

    return next_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTask(Task):
    """A task whose responses a program can grade.

    `next_turn(row, responses)` returns the dialogue that the policy continues next, given its responses to the turns
    so far, or None after the last turn. `grade` yields a `Grade` per item, in order.
    """

    next_turn: NextTurn
    grade: Grader
    check_row: Callable[[Row], object] | None = None  # raises `InputError` for a row that cannot be asked or graded
    id_column: str = "key"  # identifies a row in the verdicts; the row's index is used where it is missing
    measures: tuple[str, ...] = MEASURES
    pass_at_k: bool = False  # report pass@k of the responses to each row in place of their mean
    options: frozenset[str] = OPTIONS
    required: tuple[str, ...] = ("data",)

    def check_rows(self, rows: Sequence[Row], path: str, *, skipped: int = 0) -> None:
        """Raise `InputError` for the first row that lacks a column, or that cannot be asked or graded."""
        Task.check_rows(self, rows, path, skipped=skipped)
        for number, row in enumerate(rows if self.check_row else (), start=skipped + 1):
            with at_place(f"{path}: row {number}"):
                assert self.check_row is not None
                self.check_row(row)

    def prompt(self, row: Row) -> Prompt:
        """Return the first turn, with the row as metadata."""
        return Prompt(tuple(self.next_turn(row, ()) or ()), dict(row), tools_of(row))

    def question(self, row: Row) -> str:
        """Return the text of the first turn's last message."""
        return first_question(self.next_turn, row)

    def used_with(self, given: Collection[str]) -> frozenset[str]:
        """Return the options used to sample from a policy if one is given, else those used to read responses."""
        return self.options - ({"responses"} if "policy" in given else OF_SAMPLING)

    def metrics_of(self, num_responses: int) -> tuple[str, ...]:
        """Return the metrics, or pass@k for each k of `PASS_AT` up to the number of responses."""
        return tuple(f"pass@{k}" for k in PASS_AT if k <= num_responses) if self.pass_at_k else self.metrics

    def part(self, metric: str) -> str:
        """Return `correct` for pass@1, else the metric or measure; no line has pass@k for larger k."""
        return CORRECT if self.pass_at_k and metric == f"pass@{PASS_AT[0]}" else metric

    def column(self, name: str, metric: str, *, is_only: bool) -> str:
        """Return `name`, and the metric if it is one of several or in nats, which are not taken for a rate."""
        return name if is_only and metric != KL_FROM_START else f"{name} {metric}"

    def size(self, inputs: EstimateInputs) -> TaskSize:
        """Return the size of the first turn."""
        prompts = [self.prompt(row) for row in inputs.rows(self)]
        return TaskSize(len(prompts), inputs.num_prompt_tokens(prompts), len(prompts) * inputs.max_new_tokens)

    def grader(self, inputs: TaskInputs) -> Grader:
        """Return what grades responses: `grade`, unless it depends on what the step provides, such as a judge."""
        return self.grade

    def counts_of(self, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """Return what else is to be counted of the rows and of the lines of their grades."""
        return {}

    def grade_answers(
        self,
        rows: Sequence[Row],
        answers: Sequence[Answer],
        thoughts: ThoughtSettings = THINK,
        *,
        grade: Grader | None = None,
    ) -> Iterator[Grade]:
        """Yield the grade of each answer, in order; thoughts are not graded."""

        def item(answer: Answer) -> Graded:
            response = visible_text(response_text(answer.response, answer.finish), thoughts)
            return Graded(rows[answer.row], response, tuple(visible_text(each, thoughts) for each in answer.earlier))

        return (grade or self.grade)(list(map(item, answers)))

    def scores(self, answers: Sequence[Answer], grades: Sequence[Grade]) -> dict[str, Score]:
        """Return each metric with its interval over rows; several responses to a row count by their mean."""
        if self.pass_at_k:
            return _pass_at_k(_by_row(answers, grades))
        return mean_parts(answers, [grade.parts for grade in grades])

    def run(self, inputs: TaskInputs) -> TaskResult:
        """Ask the policy, or read its responses, and grade them."""
        rows = inputs.rows(self)
        answers = inputs.answers(rows, self.next_turn)
        inputs.progress.phase("grade", len(answers))
        grader = self.grader(inputs)

        def work(share: Sequence[Answer]) -> Iterator[Grade]:
            for grade in self.grade_answers(rows, share, inputs.thoughts, grade=grader):
                inputs.progress.advance(1)
                yield grade

        grades = inputs.split(answers, work, activity="grading")
        unanswered = len(rows) - len({answer.row for answer in answers})
        if unanswered:
            inputs.progress.note(f"{unanswered} of {len(rows)} rows have no response and are not scored")
        cut = sum(is_cut_off(answer.finish) for answer in answers)
        if cut:
            inputs.progress.note(f"{cut} of {len(answers)} responses were cut off at max_new_tokens")
        both = list(zip(answers, grades, strict=True))
        measured = [measure_parts([*answer.earlier, answer.response], inputs.thoughts) for answer in answers]
        lines = [
            {**self._line(rows[answer.row], answer, grade), "measures": parts}
            for (answer, grade), parts in zip(both, measured, strict=True)
        ]
        return TaskResult(
            scores=self.scores(answers, grades),
            measures=mean_parts(answers, measured),
            lines=lines,
            verdicts=[
                {self.id_column: rows[answer.row].get(self.id_column, answer.row), **grade.line}
                for answer, grade in both
            ],
            counts={
                "rows": len(rows),
                "responses": len(answers),
                "unanswered": unanswered,
                "cut_off": cut,
                **self.counts_of(rows, [grade.line for grade in grades]),
            },
            sampled=Sampled(rows, answers, self.next_turn),
        )

    def _line(self, row: Row, answer: Answer, grade: Grade) -> dict[str, Any]:
        line: dict[str, Any] = {"prompt": self.question(row), "response": answer.response}
        if answer.earlier:
            line["earlier_responses"] = answer.earlier
        if answer.finish is not None:
            line["finish"] = answer.finish
        if grade.checks:
            line["checks"] = [check._asdict() for check in grade.checks]
        return {**line, "parts": grade.parts, "reward": grade.reward}


def correct(passed: bool, more: Mapping[str, Any] = {}, checks: Sequence[Check] = ()) -> Grade:  # noqa: B006
    """Return the grade of a response that is either right or wrong."""
    return Grade({CORRECT: passed, **more}, {CORRECT: (float(passed), 1)}, checks)


def grade_programs(run_tests: Callable[[Row, str], Verdict]) -> Grader:
    """Return a `grade` that runs each response's unit tests in a sandbox; a program is correct if it passes all."""

    def grade(items: Sequence[Graded]) -> Iterator[Grade]:
        for verdict in in_parallel(lambda item: run_tests(item.row, item.response), items, num_workers=NUM_CORES):
            passed = verdict.reward == 1
            why = {"why": verdict.why} if verdict.why else {}
            yield correct(passed, why, [Check(verdict.why, passed)] if verdict.why else ())

    return grade


def _pass_at_k(rows: Sequence[Sequence[Grade]]) -> dict[str, Score]:
    counts = [(len(grades), sum(grade.parts[CORRECT][0] == 1 for grade in grades)) for grades in rows]
    fewest = min(number for number, _ in counts)
    return {
        f"pass@{k}": score([pass_at_k(number, right, k=k) for number, right in counts]) for k in PASS_AT if k <= fewest
    }


def with_kl(result: TaskResult, start: StartKL) -> TaskResult:
    """Return the result with the divergence from the training's start as a measure, or why it is unknown."""
    assert result.sampled is not None
    answers = result.sampled.answers
    if start.lacking:
        return replace(result, unknown={KL_FROM_START: start.lacking})
    known = [(answer, {KL_FROM_START: kl}) for answer, kl in zip(answers, start.kl, strict=True) if kl is not None]
    of_lines: Sequence[tuple[float, float] | None] = start.kl
    if len(result.lines) < len(answers):  # a line is of a row with several answers
        rows: dict[int, tuple[float, float]] = {}
        for answer, part in known:
            nats, tokens = rows.get(answer.row, (0.0, 0.0))
            rows[answer.row] = nats + part[KL_FROM_START][0], tokens + part[KL_FROM_START][1]
        of_lines = [rows.get(row) for row in range(len(result.lines))]
    # Not among a line's `measures`: a paired change would compare divergences from different policies
    lines = [{**line, KL_FROM_START: kl} for line, kl in zip(result.lines, of_lines, strict=True)]
    measures = {**result.measures, **mean_parts(*zip(*known, strict=True))}
    counts = {**result.counts, "start": start.start, "without_kl": len(answers) - len(known)}
    return replace(result, measures=measures, lines=lines, counts=counts, work=sum_work([result.work, start.work]))


def _by_row(answers: Sequence[Answer], of_answers: Sequence[T]) -> list[list[T]]:
    """Return what belongs to the answers, together for each row that has answers."""
    found: dict[int, list[T]] = {}
    for answer, each in zip(answers, of_answers, strict=True):
        found.setdefault(answer.row, []).append(each)
    return list(found.values())


def mean_parts(answers: Sequence[Answer], of_answers: Sequence[Parts]) -> dict[str, Score]:
    """Return each metric with its interval over rows; the parts of several responses to a row count by their mean."""
    rows = _by_row(answers, of_answers)
    found: dict[str, Score] = {}
    for name in rows[0][0]:
        sums = [sum(parts[name][0] for parts in row) / len(row) for row in rows]
        counts = [sum(parts[name][1] for parts in row) / len(row) for row in rows]
        found[name] = score(sums, counts)
    return found


def first_question(next_turn: NextTurn, row: Row) -> str:
    """Return the text of the last message of the row's first turn."""
    turn = next_turn(row, ())
    assert turn, "a task asks at least one turn"
    return turn[-1].content
