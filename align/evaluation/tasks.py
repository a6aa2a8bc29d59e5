"""Tasks whose responses a program can grade: what a row asks, how an answer is graded, what the grades add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from align.errors import InputError
from align.evaluation.statistics import Score, score
from align.procedural import tasks
from align.records import Message, Prompt
from align.rewards.final_answers import final_answer, same_answer
from align.rewards.unit_tests import NUM_CORES, grade_humaneval, grade_mbpp, in_parallel, pass_at_k
from align.rewards.verdicts import Verdict
from align.rewards.verifiers.instructions import follows

Row = Mapping[str, Any]

CORRECT = "correct"
PASS_AT = (1, 10, 100)  # Chen et al. 2021, sec. 2.1; those for which every prompt has enough responses are given


@dataclass(frozen=True, slots=True)
class Grade:
    """What a program says of one response."""

    line: Mapping[str, Any]  # the verdict for people, as JSON
    parts: Mapping[str, tuple[float, float]]  # rate -> (passed, of how many)

    @property
    def reward(self) -> float:
        """The share that passed, by the rate that counts the most parts of a response."""
        passed, of = max(self.parts.values(), key=itemgetter(1))
        return passed / of


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of row and how responses to it are graded."""

    needs: tuple[str, ...]  # columns of a row
    name: str  # the column that tells rows apart, where there is one
    ask: Callable[[Row], str]  # what a policy is asked
    grade: Callable[[Sequence[tuple[Row, str]]], Iterator[Grade]]  # of (row, response), in order
    samples: bool = False  # whether pass@k is told

    def prompt(self, row: Row) -> Prompt:
        """What a policy is asked, with the row as metadata."""
        return Prompt((Message("user", self.ask(row)),), dict(row))


def check_rows(task: str, rows: Sequence[Row], path: str, *, skipped: int = 0) -> None:
    """Raise for the first row that is not of the task's form; `skipped` others stand before them."""
    for number, row in enumerate(rows, start=skipped + 1):
        if missing := [name for name in TASKS[task].needs if row.get(name) is None]:
            raise InputError(
                f"{path}: row {number} has no {missing[0]}; {task} rows have {', '.join(TASKS[task].needs)}"
            )


Answer = tuple[int, str]  # the number of a row, and a response to it


def grade_all(task: str, rows: Sequence[Row], answers: Sequence[Answer]) -> Iterator[tuple[int, Grade]]:
    """(row number, grade) of each answer, in order."""
    grades = TASKS[task].grade([(rows[number], text) for number, text in answers])
    return zip((number for number, _ in answers), grades, strict=True)


def scores(task: str, answers: Sequence[Answer], grades: Sequence[Grade]) -> dict[str, Score]:
    """Each rate with its interval over rows; of several answers to a row the mean counts."""
    by_row: dict[int, list[Grade]] = {}
    for (number, _), grade in zip(answers, grades, strict=True):
        by_row.setdefault(number, []).append(grade)
    if TASKS[task].samples:
        correct = [(len(of), sum(grade.parts[CORRECT][0] == 1 for grade in of)) for of in by_row.values()]
        fewest = min(number for number, _ in correct)
        return {
            f"pass@{k}": score([pass_at_k(number, right, k=k) for number, right in correct])
            for k in PASS_AT
            if k <= fewest
        }
    found: dict[str, Score] = {}
    for name in grades[0].parts:
        passed = [sum(grade.parts[name][0] for grade in of) / len(of) for of in by_row.values()]
        found[name] = score(passed, [sum(grade.parts[name][1] for grade in of) / len(of) for of in by_row.values()])
    return found


def _verified(items: Sequence[tuple[Row, str]]) -> Iterator[Grade]:
    """IFEval (Zhou et al. 2023): by prompt and by instruction, strict and loose."""
    for row, response in items:
        strict, loose = follows(row, response), follows(row, response, loose=True)
        parts: dict[str, tuple[float, float]] = {}
        for name, followed in (("strict", strict), ("loose", loose)):
            parts[f"prompt_{name}"] = (float(all(followed)), 1)
            parts[f"instruction_{name}"] = (sum(followed), len(followed))
        yield Grade({"strict": strict, "loose": loose}, parts)


def _answered(items: Sequence[tuple[Row, str]]) -> Iterator[Grade]:
    """Whether the final answer is the row's."""
    for row, response in items:
        expected, given = final_answer(str(row["answer"])), final_answer(response)
        if expected is None:
            raise InputError(f"answer {str(row['answer'])[-40:]!r}: holds no final answer, such as '#### 42'")
        yield _correct(given is not None and same_answer(given, expected), {"answer": given})


def _executed(
    grade: Callable[[Row, str], Verdict],
) -> Callable[[Sequence[tuple[Row, str]]], Iterator[Grade]]:
    """Whether a program passes all of the row's tests."""

    def one(item: tuple[Row, str]) -> Verdict:
        return grade(*item)

    def graded(items: Sequence[tuple[Row, str]]) -> Iterator[Grade]:
        for verdict in in_parallel(one, items, num_workers=NUM_CORES):
            yield _correct(verdict.reward == 1, {"why": verdict.why} if verdict.why else {})

    return graded


def _procedural(items: Sequence[tuple[Row, str]]) -> Iterator[Grade]:
    """Whether every check of the project's own tasks holds."""
    for verdicts in tasks.grades(items):
        yield _correct(all(verdicts), {})


def _correct(passed: bool, more: Mapping[str, Any]) -> Grade:
    return Grade({"correct": passed, **more}, {CORRECT: (float(passed), 1)})


def _ask_procedural(row: Row) -> str:
    return str(row["prompt"])


def _ask_mbpp(row: Row) -> str:
    """The task and its tests, as in Austin et al. 2021, sec. 4."""
    tests = "\n".join(row["test_list"])
    return f"{row.get('text') or row['prompt']}\n\nYour code should pass these tests:\n\n{tests}"


def _ask_humaneval(row: Row) -> str:
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n{row['prompt']}"


def _ask_gsm8k(row: Row) -> str:
    return f"{row['question']}\n\nReason step by step, and end with the answer after ####."


TASKS: dict[str, Task] = {
    "ifeval": Task(("prompt", "instruction_id_list", "kwargs"), "key", lambda row: str(row["prompt"]), _verified),
    "gsm8k": Task(("question", "answer"), "key", _ask_gsm8k, _answered),
    "humaneval": Task(
        ("prompt", "test", "entry_point"), "task_id", _ask_humaneval, _executed(grade_humaneval), samples=True
    ),
    "mbpp": Task(("test_list",), "task_id", _ask_mbpp, _executed(grade_mbpp), samples=True),
    "general": Task(("prompt", "kind"), "origin", _ask_procedural, _procedural),
    "code": Task(("prompt", "kind", "examples"), "origin", _ask_procedural, _procedural),
}
