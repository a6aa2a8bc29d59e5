"""Tests that decide whether a program is right: run in two sandboxes, over many programs at once, and graded.

Threat model: the program is written by a model that is rewarded for passing, in whatever way. It can harm no one
(`sandbox`), and it passes a test by the values that it returns or not at all (`crossing`, which says what is not held).
"""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from align.errors import InputError
from align.records import Prompt
from align.rewards.builtin_judges import ExecutedTestsSettings
from align.rewards.verdicts import Group, Judge, Verdict
from align.sandbox.pipes import NUM_CORES as NUM_CORES
from align.sandbox.pipes import pipe, read_lines
from align.sandbox.process import MODULES, Limits, Sandbox

PROGRAM, TESTS, _ = MODULES
FENCES = ("```", "~~~")
PYTHON = ("", "python", "py", "python3", "py3")  # what a block of Python is called, if anything
CODE_STARTS = ("def ", "async def ", "class ", "import ", "from ", "@")
LIMITS = Limits()


class BrokenTests(InputError):
    """A test is not Python: whoever gave it is wrong, not the program."""


class Outcome(NamedTuple):
    """How one test went."""

    passed: bool
    why: str  # one line, "" where it passed


class Candidates(NamedTuple):
    """What may be the program in a response; the sandbox chooses, as parsing strange text is not safe either."""

    codes: list[tuple[str, str]]  # (what stands before, the code)
    cut: bool  # whether lines at the end may be prose


def run_tests(
    code: str | Candidates,
    tests: Sequence[str],
    *,
    setup: str = "",
    entry_point: str | None = None,
    limits: Limits = LIMITS,
) -> tuple[Outcome, ...]:
    """The outcome of each test, in order; the limits are for the program and all of its tests together.

    A test is Python that raises nothing if it holds; `setup` runs before the first. A name of Python's own (`sum`) is
    the program's only as the `entry_point`, or in a test that uses no other name of the program.
    """
    program = code if isinstance(code, Candidates) else Candidates([("", code)], cut=False)
    order = {"tests": list(tests), "setup": setup, "entry_point": entry_point}
    return tuple(_run(program._asdict(), order, limits)) if tests else ()


def _run(program_order: Mapping[str, Any], tests_order: Mapping[str, Any], limits: Limits) -> list[Outcome]:
    deadline = time.monotonic() + limits.wall_s
    with ExitStack() as stack:
        asked, ask = pipe(stack)
        answered, answer = pipe(stack)
        results, result = pipe(stack)
        ends = [asked.fileno(), answer.fileno()], [answered.fileno(), ask.fileno(), result.fileno()]
        program = stack.enter_context(Sandbox(PROGRAM, program_order, descriptors=ends[0], limits=limits))
        tests = stack.enter_context(Sandbox(TESTS, tests_order, descriptors=ends[1], limits=limits))
        for end in (asked, ask, answered, answer, result):
            end.close()  # so that each process sees when the other ends
        reports = [json.loads(line) for line in read_lines(results, deadline)]
        whys = [why for _, why in reports]
        if reports and reports[0][0] == -1:
            raise BrokenTests(whys[0])
        if any(why.startswith("the program ended") for why in whys):
            how = program.ended(deadline).why
            whys = [why.replace("the program ended", f"the program {how}", 1) for why in whys]
        if missing := len(tests_order["tests"]) - len(whys):
            late = time.monotonic() > deadline
            why = f"the program {program.ended(deadline).why}" if late else f"the tests {tests.ended(deadline).why}"
            whys += [why] * missing
        return [Outcome(not why, why) for why in whys]


def candidates(response: str, before: str = "") -> Candidates:
    """What may be the program: the fenced blocks of Python; without a fence the response, or what follows its prose.

    `before` is what stands before the program: the prompt of a completion.
    """
    lines = response.replace("\r\n", "\n").split("\n")
    if fenced := list(_fenced(lines)):
        return Candidates([(before and before + "\n", code) for code in fenced], cut=False)
    start = next((i for i, line in enumerate(lines) if line.startswith(CODE_STARTS)), 0)
    after_prose = [(before and before + "\n", "\n".join(lines[start:]))] if start else []
    return Candidates([*after_prose, (before, "\n".join(lines))], cut=True)


def _fenced(lines: Iterable[str]) -> Iterator[str]:
    """The blocks that are Python or say no language; one that is not closed goes to the end."""
    fence, language, indented, block = "", "", False, list[str]()
    for line in [*lines, None]:
        bare = (line or "").strip()
        if not fence and bare.startswith(FENCES):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
            language = [*bare[len(fence) :].lower().split(), ""][0]
            indented, block = bool(line) and line != line.lstrip(), []
        elif fence and (line is None or (bare.startswith(fence) and not bare.strip(fence[0]))):
            if language in PYTHON:
                yield textwrap.dedent("\n".join(block)) if indented else "\n".join(block)
            fence = ""
        elif fence and line is not None:
            block.append(line)


def executed_tests_judge(settings: ExecutedTestsSettings = ExecutedTestsSettings()) -> Judge:  # noqa: B008 - frozen
    """Rewards a response by the tests in its prompt's metadata: `tests`, with `setup` and `entry_point` if need be."""

    def grade(pair: tuple[Prompt, str]) -> Verdict:
        return grade_by_tests(pair[0].metadata, pair[1], settings)

    def judge(groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        pairs = [(prompt, response) for prompt, responses in groups for response in responses]
        verdicts = in_parallel(grade, pairs, num_workers=settings.num_workers)
        for _, responses in groups:
            yield tuple(next(verdicts) for _ in responses)

    return judge


def in_parallel(grade: Callable[[Any], Verdict], items: Sequence[Any], *, num_workers: int) -> Iterator[Verdict]:
    """The verdict of each item, in order, as soon as it is known; so many are graded at a time."""
    pool = ThreadPoolExecutor(num_workers)
    try:
        yield from pool.map(grade, items)
    finally:
        pool.shutdown(cancel_futures=True)


def grade_by_tests(metadata: Mapping[str, Any], response: str, settings: ExecutedTestsSettings) -> Verdict:
    """The verdict on a response; nothing is known of it where the prompt has no tests, or tests that are not Python."""
    given = metadata.get("tests") or []
    tests: Any = [given] if isinstance(given, str) else given
    setup, entry_point = metadata.get("setup") or "", metadata.get("entry_point")
    if not isinstance(tests, list) or not all(isinstance(text, str) for text in (*tests, setup, entry_point or "")):
        raise InputError("a prompt's tests are a text or a list of texts, its setup and entry_point are texts")
    if entry_point:
        tests = [_with_call(test, entry_point) for test in tests]
    if not tests:
        return Verdict(None, why="the prompt has no tests")
    program, limits = candidates(response), settings.limits
    try:
        outcomes = run_tests(program, tests, setup=setup, entry_point=entry_point, limits=limits)
    except BrokenTests as error:
        return Verdict(None, why=str(error))
    return verdict(outcomes, reward=settings.reward)


def grade_humaneval(row: Mapping[str, Any], completion: str, *, limits: Limits = LIMITS) -> Verdict:
    """1 if the completion of a row's prompt passes `check`, else 0; it may also be the whole function, fenced or not.

    What the prompt defines beside the function is run with the tests too, so that a completion cannot redefine it.
    """
    prompt, test, entry_point = _texts(row, ("prompt", "test", "entry_point"))
    program, tests = candidates(completion, before=prompt), [_with_call(test, entry_point)]
    try:
        outcomes = run_tests(program, tests, setup=prompt, entry_point=entry_point, limits=limits)
    except BrokenTests:  # a prompt without a docstring is no function yet
        setup = f"{prompt}\n    pass\n"
        outcomes = run_tests(program, tests, setup=setup, entry_point=entry_point, limits=limits)
    return verdict(outcomes, reward="all")


def grade_mbpp(row: Mapping[str, Any], response: str, *, limits: Limits = LIMITS) -> Verdict:
    """1 if the response passes the row's `test_list`, else 0; the published figures leave `challenge_test_list` out."""
    tests, imports = row.get("test_list"), row.get("test_imports", [])  # the second: in the sanitized rows
    if not tests or not isinstance(tests, list) or not isinstance(imports, list):
        raise InputError(f"an MBPP row has a test_list of texts; row {row.get('task_id')} has {tests!r:.60}")
    setup = "\n".join([*imports, row.get("test_setup_code") or ""])
    return verdict(run_tests(candidates(response), tests, setup=setup, limits=limits), reward="all")


def verdict(outcomes: Sequence[Outcome], *, reward: Literal["share", "all"]) -> Verdict:
    """The outcomes of a response's tests as one verdict, with the first failure as its reason."""
    passed = sum(outcome.passed for outcome in outcomes)
    share = passed / len(outcomes)
    first = next((outcome.why for outcome in outcomes if not outcome.passed), "")
    why = f"{passed} of {len(outcomes)} tests pass" + (f"; {first}" if first else "")
    raw = [{"passed": outcome.passed, "why": outcome.why} for outcome in outcomes]
    return Verdict(share if reward == "share" else float(share == 1), {"tests_passed": share}, why, raw)


def pass_at_k(num_samples: int, num_correct: int, *, k: int) -> float:
    """Unbiased chance that one of k samples is right, from more of them (Chen et al. 2021, eq. 1)."""
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise InputError(f"pass@{k} needs at least {k} samples a problem; there are {num_samples}, {num_correct} right")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _with_call(test: str, entry_point: str) -> str:
    """A test of HumanEval's form defines `check(candidate)`, which is then called."""
    return f"{test}\n\ncheck({entry_point})" if "def check(" in test else test


def _texts(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    for key in keys:
        if not isinstance(row.get(key), str):
            raise InputError(f"row {row.get('task_id')} has no text {key!r}; there are: {', '.join(row)}")
    return [row[key] for key in keys]
