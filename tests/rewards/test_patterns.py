"""Regular expressions in rows: the meaning of `re`, and a time limit."""

import random
import re
import time

import pytest

from align.errors import InputError
from align.evaluation.task import Answer
from align.evaluation.tasks import TASKS
from align.records import Message, Prompt
from align.rewards.judges import load_judge
from align.rewards.verifiers import patterns
from align.rewards.verifiers.instructions import follows, instructions
from align.rewards.verifiers.patterns import SlowPatternError, count_found, is_found, split

SLOW = "(?:(?:a{1,500}){1,500}){1,500}b"  # neither finds nor rules out a match in time
TEXT = "a" * 3000
PIECES = [
    "sea",
    "a",
    "ö",
    "日本",
    ".",
    r"\d",
    r"\w",
    r"\b",
    "[a-z]",
    "(?:a|b)",
    "(a)",
    "a*",
    "e?",
    "x+",
    "^",
    "$",
    " ",
    "C++",
]


def test_patterns_have_the_meaning_that_they_have_in_re():
    draw = random.Random(0)
    texts = ["The seaside, a sea.\nTwo beaches", "", "C++ and C", "Ödland 日本 12 abba\nSEA", "a" * 30, "x_y é 3"]
    compared = 0
    for _ in range(2000):
        pattern = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 5)))
        try:
            re.compile(rf"\b{pattern}\b")
        except re.error:
            continue
        for text in texts:
            assert is_found(pattern, text) == (re.search(pattern, text, re.IGNORECASE) is not None), (pattern, text)
            assert count_found(pattern, text) == len(re.findall(pattern, text, re.IGNORECASE)), (pattern, text)
            assert split(pattern, text, around=("", r"\d")) == re.split(pattern + r"\d", text), (pattern, text)
            compared += 1
    print(f"compared {compared}")
    assert compared > 5000


ROWS = [
    {"id": "keywords:existence", "kwargs": {"keywords": [SLOW]}},
    {"id": "keywords:forbidden_words", "kwargs": {"forbidden_words": [SLOW]}},
    {"id": "keywords:frequency", "kwargs": {"keyword": SLOW, "frequency": 1, "relation": "at least"}},
    {"id": "detectable_content:postscript", "kwargs": {"postscript_marker": SLOW}},
    {"id": "detectable_format:multiple_sections", "kwargs": {"section_spliter": SLOW, "num_sections": 1}},
]


# Patterns that backtrack exponentially or in a high power of the length, each in its own way
CATASTROPHIC = {
    "nested repeats": SLOW,
    "a repeat of a repeat": "(a+)+b",
    "overlapping alternatives": "(?:a|aa)+b",
    "repeats in a row": "(?:.*a){20}b",
    "a back reference": r"(a+)\1*\1*\1*b",
    "three nested groups": "((a{1,30}){1,30}){1,30}b",
    "a look-ahead in a repeat": "(?:(?=a)(?:a|aa))+b",
    "lazy repeats": "(?:a+?)+?b",
}


def cpu_seconds(function, *arguments):
    """The CPU time of a call that gives a pattern up."""
    start = time.process_time()
    with pytest.raises(SlowPatternError, match=r"the row's patterns take more than"):
        function(*arguments)
    return time.process_time() - start


@pytest.fixture
def limit_s(monkeypatch):
    """A shorter limit, so that the tests are fast."""
    monkeypatch.setattr(patterns, "SEARCH_S", 0.2)
    return 0.2


@pytest.mark.parametrize("pattern", CATASTROPHIC.values(), ids=CATASTROPHIC)
@pytest.mark.parametrize("search", [is_found, count_found], ids=["search", "count"])
def test_a_catastrophic_pattern_is_given_up_at_the_limit(limit_s, search, pattern):
    assert limit_s <= cpu_seconds(search, pattern, TEXT) < 2 * limit_s


@pytest.mark.parametrize("instruction", ROWS, ids=lambda row: row["id"])
def test_a_slow_pattern_is_given_up_in_every_instruction(limit_s, instruction):
    assert cpu_seconds(follows, {"instructions": [instruction]}, TEXT) < 3 * limit_s


def test_many_patterns_of_a_row_share_one_limit(limit_s):
    keyword, text = "(?:a|aa)+b", "a" * 22  # takes about 4 ms, so that none of them exceeds the limit alone
    start = time.process_time()
    assert not is_found(keyword, text)
    assert time.process_time() - start < limit_s / 4
    row = {"key": 7, "prompt": "Go.", "instruction_id_list": ["keywords:forbidden_words"]}
    row["kwargs"] = [{"forbidden_words": [keyword] * 1000}]
    start = time.process_time()
    with pytest.raises(InputError, match=r"row 7: the row's patterns take more than 0.2 s on a response"):
        list(TASKS["ifeval"].grade_answers([row], [Answer(0, text)]))
    assert time.process_time() - start < 4 * limit_s


def test_a_judge_abstains_and_a_task_names_the_row(limit_s):
    prompt = Prompt((Message("user", "Go."),), {"instructions": ROWS[:1]})
    fast = Prompt((Message("user", "Go."),), {"instructions": [{"id": "punctuation:no_comma"}]})
    slow, quick = load_judge("verifier")([(prompt, [TEXT, "a"]), (fast, ["yes"])])
    assert [verdict.reward for verdict in (*slow, *quick)] == [None, None, 1]
    assert f"take more than {limit_s} s" in slow[0].why
    row = {"key": 7, "prompt": "Go.", "instruction_id_list": [ROWS[0]["id"]], "kwargs": [ROWS[0]["kwargs"]]}
    with pytest.raises(InputError, match=r"row 7: the row's patterns take more than"):
        list(TASKS["ifeval"].grade_answers([row], [Answer(0, TEXT)]))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a{99999999999999999999}", "not a valid regular expression"),
        ("(" * 450 + ")" * 450, "not a valid regular expression"),
        ("[", "not a valid regular expression"),
        ("a" * 1001, "at most 1000 characters, not 1001"),
    ],
)
def test_a_pattern_that_cannot_be_searched_is_refused(pattern, said):
    with pytest.raises(InputError, match=said):
        instructions({"instructions": [{"id": "keywords:existence", "kwargs": {"keywords": [pattern]}}]})


def test_many_spaces_before_no_postscript_are_searched_in_time():
    row = {"instructions": [{"id": ROWS[3]["id"], "kwargs": {"postscript_marker": "PS"}}]}
    start = time.process_time()
    assert follows(row, " " * 200_000 + "x") == [False]
    assert time.process_time() - start < 5
