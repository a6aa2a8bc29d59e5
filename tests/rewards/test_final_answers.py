"""Final answers: where they are found, which ones are equal, and the time and memory of a comparison."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align.evaluation.pairs.arena_hard import LIST_ITEM
from align.evaluation.tasks.mmlu import STATED
from align.rewards.answers import math_equality
from align.rewards.answers.comparison import same_answer
from align.rewards.answers.extraction import final_answer
from align.rewards.answers.math_equality import COMPARISON_S, equal_maths
from align.rewards.judge_prompts.parsing import parse_first_rating, parse_preference
from align.rewards.verifiers import layout

GSM8K = Path(__file__).parents[2] / ".." / "shared" / "data" / "gsm8k" / "train.jsonl.gz"

FOUND = [  # a response and the answer that it gives
    ("48/2 = <<48/2=24>>24\n#### 72", "72"),
    ("#### 1,234\n", "1,234"),
    ("#### Step 1\nWe add 5.\n#### 2. Result\nThe answer is 8", "8"),  # headings of the fourth order
    ("#### 42\n\nIs there anything else? I have 3 minutes.", "42"),
    (r"so \boxed{\frac{1}{2}} it is, not 3", r"\frac{1}{2}"),
    (r"\boxed{1} or rather \boxed{2}", "2"),
    (r"\boxed{\text{(B)}}", r"\text{(B)}"),
    ("The answer is 42. I hope it is correct.", "42"),
    ("**Final Answer**: 42 apples", "42 apples"),
    ("**Answer: 42**", "42"),
    ("Answer:\n\n42\n\nThere were 3 steps.", "42"),
    ("The answer is $x = 5$, since 2 + 3 = 5.", "x = 5"),
    ("The answer is:\n\\[\n\\frac{3}{4}\n\\]", r"\frac{3}{4}"),
    ("The answer is (B) Paris because of 3 reasons.", "(B) Paris"),
    ("Is the answer 3? No, the answer is 4.", "4"),
    ("The answer is about $1,234.50 per year.", "$1,234.50 per year"),
    (
        "To find the answer: we first look at each of the 2 sides\nand so there are 8.",
        "we first look at each of the 2 sides",
    ),
    ("To find the answer: we first look at all of the sides\nand so there are 8.", "8"),
    ("They cost $5 each, so the total is $10.", "$10"),
    ("In May it was -5 degrees", "-5"),
    ("It took 8-5 = 3 hours, in 2 parts: 2.5 hours and .5", ".5"),
    ("We see that $x = \\frac{3}{4}$.", r"x = \frac{3}{4}"),
    ("About 3/4 of them left", "3/4"),
    ("B", "B"),
    (r"$\frac{1}{2}$", r"\frac{1}{2}"),
    ("(1, 2]", "(1, 2]"),
    ("I do not know.", None),
    ("", None),
]
SAME = [
    ("1,000", "1000"),
    ("$1,000.00", "1000"),
    ("-$3", "-3"),
    ("−3", "-3"),
    ("18.0", "18"),
    ("42 apples", "42"),
    ("42 Apples", "42 apple"),
    ("5 p.m.", "5 pm"),
    ("5 million dollars", "5,000,000"),
    ("50%", "0.5"),
    (r"50\%", "50"),  # as math-verify has it: a question asks for percent or does not
    ("3/4", "0.75"),
    ("3 1/2", "3.5"),
    ("0.333333", "1/3"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"3\frac{1}{2}", "7/2"),
    (r"5\text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("x = 5", "5"),
    ("5 - 3 = 2", "2"),
    ("x^2 + 1", "1 + x^2"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("10^3", "1000"),
    ("(1,2]", "(1, 2]"),
    (r"(-\infty, 3)", r"\left(-\infty, 3\right)"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("x > 3", "3 < x"),
    ("(B)", "B"),
    ("B. Paris", "b"),
    (r"\text{(B)}", "B"),
    ("  PARIS. ", "Paris"),
    (r"\boxed{7}", "$7$"),
]
DIFFERENT = [
    ("1000", "1001"),
    ("1,000", "1"),
    ("3", "-3"),
    ("42 cm", "42 m"),
    ("5 million", "5"),
    ("0.667", "2/3"),
    ("5x", "5"),
    ("2 pi", "2"),
    (r"2\pi", "2"),
    ("5 or 6", "6"),
    ("3 < 5", "5"),
    ("[1,2]", "(1,2]"),
    ("(1,2)", "(2,1)"),
    ("x^2", "x^3"),
    ("B", "C"),
    ("Because", "B"),
    ("A, B and C are wrong", "B"),
    ("silent", "listen"),
    ("1/0", "1"),
    ("", "0"),
    ("x", ""),
]
HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    r"\sum_{n=1}^{100000000}\frac{1}{n}",
    "99999999999!",
    "((((((((((" * 50,
    r"\frac{" * 90,
    "1" * 900,
    "1" * 100_000,
    r"\int " * 60 + "x",
    "$" + " " * 50_000 + "x",
]
LONG = [
    "#### $" + " " * 50_000 + "x",
    "\\(" * 5_000,
    "\\boxed{" * 5_000,
    "$" * 20_000,
    "answer is " * 5_000,
    "####" * 10_000,
]


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_the_final_answer_of_a_response_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("given", "expected"), SAME)
def test_different_notations_of_an_answer_are_equal(given, expected):
    assert same_answer(given, expected)
    assert same_answer(expected, expected)


@pytest.mark.parametrize(("given", "expected"), DIFFERENT)
def test_different_answers_are_not_equal(given, expected):
    assert not same_answer(given, expected)


FORMS = [
    "{n}",
    "${n:,}",
    "{n}.00",
    "\\boxed{{{n}}}",
    "The answer is {n}.",
    "So 5 + 3 = 8, and she has {n:,} apples left.",
    "Step 1: 5 + 3 = 8\n**Answer:** {n:,} apples",
    "Thus $x = {n}$.",
    "5 and then\n\\[ {n} \\]",
    "#### {n}\n",
]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"the published data set is not at {GSM8K}")
def test_the_answers_of_gsm8k_are_found_and_differ_from_other_numbers():
    solutions = [json.loads(line)["answer"] for line in gzip.decompress(GSM8K.read_bytes()).decode().splitlines()]
    assert len(solutions) == 7473
    for row, solution in enumerate(solutions[::5]):
        known = solution.split("#### ")[1]
        number = int(known.replace(",", ""))
        answers = [final_answer(solution), final_answer(FORMS[row % len(FORMS)].format(n=number))]
        assert all(same_answer(answer, known) for answer in answers), (row, answers, known)
        for other in (number + 1, number - 1, number * 10 + 7, -number - 1):
            assert not any(same_answer(answer, str(other)) for answer in answers), (row, answers, other)


@pytest.mark.slow
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:20])
def test_an_endless_comparison_is_stopped_in_time(answer):
    start = time.monotonic()
    assert not same_answer(answer, "5")
    took_s = time.monotonic() - start
    assert same_answer("x^2 + 1", "1 + x^2"), "the next comparison is as good as any"
    print(f"given up after {took_s:.1f} s")
    assert took_s < 2 * math_equality.START_S  # it may have had to start a process, on a busy machine


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_a_text_of_many_near_answers_is_searched_in_time(text):
    start = time.process_time()
    final_answer(text)
    assert time.process_time() - start < COMPARISON_S


@pytest.mark.slow
def test_an_undecided_comparison_is_none():
    assert equal_maths("9^{9^{9^{9}}}", "5") is None
    assert equal_maths("2^2", "4") is True
    assert equal_maths("2^2", "5") is False


def test_a_comparison_waits_for_a_worker_that_a_busy_machine_does_not_run(monkeypatch):
    assert equal_maths("5^2", "25")
    worker = math_equality._service._worker._process
    waited = []
    get = math_equality._Worker._answer

    def answer(self, limit_s):
        waited.append(limit_s)
        threading.Timer(0.2, worker.send_signal, [signal.SIGCONT]).start()
        return get(self, limit_s)

    monkeypatch.setattr(math_equality._Worker, "_answer", answer)
    worker.send_signal(signal.SIGSTOP)
    assert equal_maths("6^2", "36")
    assert waited == [math_equality.START_S]  # its own limit is of processor time


def test_concurrent_comparisons_do_not_mix_results():
    powers = [(f"x^{first} \\cdot x", f"x^{second}") for first in range(6) for second in range(6)]
    with ThreadPoolExecutor(8) as threads:
        same = list(threads.map(lambda pair: same_answer(*pair), powers))
    assert [pair for pair, verdict in zip(powers, same, strict=True) if verdict] == [
        (f"x^{power} \\cdot x", f"x^{power + 1}") for power in range(5)
    ]


def test_the_math_worker_ends_with_its_parent():
    code = """
from align.rewards.answers.math_equality import _service, equal_maths
assert equal_maths("2^2", "4")
print(_service._worker._process.pid, flush=True)
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)


LONG = 50_000
DEGENERATE = {
    "blank lines": (final_answer, "\n" * LONG + "x"),
    "open formulas": (final_answer, r"\( " * (LONG // 5) + "5 x"),
    "spaces behind a box": (final_answer, r"\boxed{1}" + " " * LONG + r"x\boxed{2}"),
    "an open decision": (parse_preference, "[[" + " " * LONG + "x"),
    "an open rating": (parse_first_rating, "[[" + "1" * LONG),
    "an answer without a letter": (STATED.search, "answer" + " " * LONG),
    "a list of blank lines": (LIST_ITEM.findall, "\n" * LONG),
    "bullets of blank lines": (lambda text: layout.number_bullet_lists(text, num_bullets=1), "\n" * LONG),
    "open placeholders": (lambda text: layout.number_placeholders(text, num_placeholders=1), "[" * LONG),
    "an open title": (layout.title, "<" * LONG),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_the_time_for_degenerate_output_grows_with_its_length_only(name):
    read, text = DEGENERATE[name]
    start = time.process_time()
    read(text)
    assert time.process_time() - start < 1.5  # 0.3 s at most; quadratic time is above 3 s


@pytest.mark.parametrize(
    ("answer", "value"),
    [("[[A]] [[ ]]", None), ("[[  B\n]]", 0), ("[[A]] [[no decision]]", 1), ("[[ " + " " * 20 + "A]]", 1)],
)
def test_a_decision_may_have_spaces_around_it(answer, value):
    found = parse_preference(answer)
    assert (found and found.value) == value
