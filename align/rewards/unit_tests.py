"""Run unit tests on programs: a judge, and the graders of HumanEval and MBPP.

Threat model: the program is written by a model that is rewarded for passing by any means. Program and tests run in two
sandboxes. The program can do no harm (`align.sandbox.process`), and it passes a test only by the values that it returns
(`align.sandbox.rpc`, which also lists the limits of this guarantee).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from align.errors import InputError
from align.records import Prompt
from align.rewards.builtin_judges import ExecutedTestsSettings
from align.rewards.code_extraction import Candidates, candidates
from align.rewards.evalplus_tests import without_numpy
from align.rewards.published_rows import known_tests
from align.rewards.verdicts import Group, Judge, Verdict
from align.sandbox import framing
from align.sandbox.activity import IdleTime
from align.sandbox.process import NUM_CORES, PROGRAM_WORKER, TESTS_WORKER, Limits, Sandbox

LIMITS = Limits()
TICK_S = 0.25  # between two looks at whether a program sleeps
MAX_REPORT_BYTES = 4 << 20  # of the outcomes of all tests of a program


class InvalidTests(InputError):
    """A test is not valid Python. The data is wrong, not the program."""


class Outcome(NamedTuple):
    """The outcome of one test."""

    passed: bool
    why: str  # one line, "" where it passed


def run_tests(
    code: str | Candidates,
    tests: Sequence[str],
    *,
    setup: str = "",
    entry_point: str | None = None,
    limits: Limits = LIMITS,
) -> tuple[Outcome, ...]:
    """Return the outcome of each test, in order; the limits are for the program and all of its tests together.

    A test is Python code that raises nothing if it holds; `setup` runs before the first test. A built-in name such as
    `sum` means the program's function only if it is the `entry_point`, or in a test that uses no other undefined name.

    >>> run_tests("def double(x): return 2 * x", ["assert double(2) == 4"])
    (Outcome(passed=True, why=''),)
    """
    program = code if isinstance(code, Candidates) else Candidates([("", code)], cut=False)
    request = {"tests": list(tests), "setup": setup, "entry_point": entry_point}
    return tuple(_run(program._asdict(), request, limits)) if tests else ()


def _run(program_request: Mapping[str, Any], tests_request: Mapping[str, Any], limits: Limits) -> list[Outcome]:
    deadline = time.monotonic() + limits.wall_s
    with ExitStack() as stack:
        calls_reader, calls = framing.pipe(stack)
        replies_reader, replies = framing.pipe(stack)
        results, results_writer = framing.pipe(stack)
        of_program = [calls_reader.fileno(), replies.fileno()]
        of_tests = [replies_reader.fileno(), calls.fileno(), results_writer.fileno()]
        program = stack.enter_context(Sandbox(PROGRAM_WORKER, program_request, descriptors=of_program, limits=limits))
        tests = stack.enter_context(Sandbox(TESTS_WORKER, tests_request, descriptors=of_tests, limits=limits))
        for end in (calls_reader, calls, replies_reader, replies, results_writer):
            end.close()  # so that each process sees when the other ends
        idle = IdleTime(limits.cpu_s)

        def asleep() -> bool:
            return idle.exceeds_limit(program.active_s(), tests.active_s())

        reports = list(_reports(results.fileno(), deadline, asleep))
        if reports and reports[0][0] < 0:
            raise InvalidTests(reports[0][1])
        whys = [f"the program {program.wait(deadline).why}{why}" if ended else why for _, why, ended in reports]
        if missing := len(tests_request["tests"]) - len(whys):
            whys += [_why_missing(program, tests, deadline, limits, asleep=asleep())] * missing
        return [Outcome(not why, why) for why in whys]


def _why_missing(program: Sandbox, tests: Sandbox, deadline: float, limits: Limits, *, asleep: bool) -> str:
    """Return why tests have no outcome."""
    if time.monotonic() > deadline:
        return f"the program {program.wait(deadline).why}"
    if asleep:
        return f"the program waited for {limits.cpu_s} s without computing"
    return f"the tests {tests.wait(deadline).why}"


def _reports(descriptor: int, deadline: float, asleep: Callable[[], bool]) -> Iterator[tuple[int, str, bool]]:
    """Yield what `tests_worker` sends, until it ends, sends an invalid message or too much, sleeps, or the deadline."""
    num_bytes = 0
    while num_bytes < MAX_REPORT_BYTES:
        while not framing.is_readable(descriptor, deadline=min(deadline, time.monotonic() + TICK_S)):
            if asleep() or time.monotonic() > deadline:
                return
        try:
            message = framing.read_frame(descriptor, deadline=deadline, max_bytes=MAX_REPORT_BYTES)
            index, why, program_ended = json.loads(message)
        except (EOFError, TimeoutError, ValueError):
            return
        num_bytes += len(message)
        yield index, why, program_ended


def executed_tests_judge(settings: ExecutedTestsSettings = ExecutedTestsSettings()) -> Judge:  # noqa: B008 - frozen
    """Return the judge that rewards the tests a response passes.

    Tests are in the prompt's metadata: `tests`, and optionally `setup` and `entry_point`, or under the names of
    published rows (`published_rows`).
    """

    def grade(pair: tuple[Prompt, str]) -> Verdict:
        return grade_by_tests(pair[0], pair[1], settings)

    def judge(groups: Sequence[Group]) -> Iterator[tuple[Verdict, ...]]:
        pairs = [(prompt, response) for prompt, responses in groups for response in responses]
        verdicts = in_parallel(grade, pairs, num_workers=settings.num_workers or NUM_CORES)
        for _, responses in groups:
            yield tuple(next(verdicts) for _ in responses)

    return judge


def in_parallel(grade: Callable[[Any], Verdict], items: Sequence[Any], *, num_workers: int) -> Iterator[Verdict]:
    """Yield the verdict on each item, in order, as soon as it is known; `num_workers` are graded at a time."""
    pool = ThreadPoolExecutor(num_workers)
    try:
        yield from pool.map(grade, items)
    finally:
        pool.shutdown(cancel_futures=True)


def grade_by_tests(prompt: Prompt, response: str, settings: ExecutedTestsSettings) -> Verdict:
    """Return the verdict on a response; without a reward where the prompt has no tests, or tests that are invalid."""
    known = known_tests(prompt)
    if known is None:
        return Verdict(None, why="the prompt has no tests")
    if known.before and known.entry_point:
        row = {"prompt": known.before, "test": known.tests[0], "entry_point": known.entry_point}
        return grade_humaneval(row, response, limits=settings.limits)
    entry_point, setup = known.entry_point, known.setup
    tests = [_with_call(test, entry_point) for test in known.tests] if entry_point else known.tests
    program = candidates(response)
    limits = settings.limits
    try:
        outcomes = run_tests(program, tests, setup=setup, entry_point=entry_point, limits=limits)
    except InvalidTests as error:
        return Verdict(None, why=str(error))
    return combine_outcomes(outcomes, reward=settings.reward)


def grade_humaneval(row: Mapping[str, Any], completion: str, *, limits: Limits = LIMITS) -> Verdict:
    """Return reward 1 if the completion of a row's prompt passes `check`, else 0.

    The completion may also be the whole function, fenced or not. Definitions in the prompt beside the function are run
    with the tests too, so that a completion cannot replace them.
    """
    prompt, test, entry_point = _strings(row, ("prompt", "test", "entry_point"))
    program = candidates(completion, before=prompt)
    tests = [_with_call(without_numpy(test), entry_point)]
    try:
        outcomes = run_tests(program, tests, setup=prompt, entry_point=entry_point, limits=limits)
    except InvalidTests:  # a prompt without a docstring is not a complete function
        setup = f"{prompt}\n    pass\n"
        outcomes = run_tests(program, tests, setup=setup, entry_point=entry_point, limits=limits)
    return combine_outcomes(outcomes, reward="all")


def grade_mbpp(row: Mapping[str, Any], response: str, *, plus: bool = False, limits: Limits = LIMITS) -> Verdict:
    """Return reward 1 if the response passes the row's `test_list`, else 0.

    As in published figures, `challenge_test_list` is not used. A row of MBPP+ has a `test` with more inputs, which the
    response must pass, too, with `plus`.
    """
    tests = row.get("test_list")
    imports = row.get("test_imports") or []  # in the sanitized rows
    if not tests or not isinstance(tests, list) or not isinstance(imports, list):
        raise InputError(f"an MBPP row has a test_list of strings; row {row.get('task_id')} has {tests!r:.60}")
    setup = "\n".join([*imports, row.get("test_setup_code") or ""])
    if plus:
        tests = [*tests, without_numpy(*_strings(row, ("test",)))]
    return combine_outcomes(run_tests(candidates(response), tests, setup=setup, limits=limits), reward="all")


def combine_outcomes(outcomes: Sequence[Outcome], *, reward: Literal["share", "all"]) -> Verdict:
    """Return the outcomes of a response's tests as one verdict, with the first failure as its reason."""
    passed = sum(outcome.passed for outcome in outcomes)
    share = passed / len(outcomes)
    first = next((outcome.why for outcome in outcomes if not outcome.passed), "")
    why = f"{passed} of {len(outcomes)} tests pass" + (f"; {first}" if first else "")
    raw = [{"passed": outcome.passed, "why": outcome.why} for outcome in outcomes]
    return Verdict(share if reward == "share" else float(share == 1), {"tests_passed": share}, why, raw)


def pass_at_k(num_samples: int, num_correct: int, *, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples is correct (Chen et al. 2021, eq. 1).

    >>> pass_at_k(4, 2, k=1)
    0.5
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise InputError(
            f"pass@{k} needs at least {k} samples per problem, not {num_samples} ({num_correct} of them correct)"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _with_call(test: str, entry_point: str) -> str:
    """Add the call to a test of HumanEval's form, which only defines `check(candidate)`."""
    return f"{test}\n\ncheck({entry_point})" if "def check(" in test else test


def _strings(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    for key in keys:
        if not isinstance(row.get(key), str):
            raise InputError(f"row {row.get('task_id')} has no string {key!r}; its columns are: {', '.join(row)}")
    return [row[key] for key in keys]
