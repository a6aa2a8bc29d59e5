"""Rows of published data sets carry their tests and answers to judges, and judges that know no row are refused."""

import json

import pytest
from sandbox_mark import needs_sandbox

from align.data.reading import read
from align.errors import InputError, RunError
from align.records import Message, Prompt
from align.rewards.judges import check_known, load_judge
from align.rewards.settings import JudgeSettings
from align.stages.responses.sampling import not_empty
from align.synth.group_statistics import GroupStatistics
from align.synth.scored_groups import prompt_of

ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
RIGHT, WRONG = "def double(x):\n    return 2 * x", "def double(x):\n    return x"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]

ANSWERS = {
    "our own": {"prompt": "What is 2 + 2?", "answer": 4},
    "RLVR": {"messages": ASKED, "ground_truth": "4", "dataset": "gsm8k"},
    "RLVR with a list": {"messages": ASKED, "ground_truth": ["4"], "dataset": "math"},
    "verl": {"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "4"}, "ability": "math"},
    "GSM8K": {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"},
}
PROGRAMS = {
    "our own": {"prompt": "Double x.", "tests": TESTS, "entry_point": "double"},
    "MBPP": {
        "task_id": 1,
        "text": "Double x.",
        "code": RIGHT,
        "test_list": [*TESTS, "assert double(Box(2).x) == 4"],
        "test_setup_code": "class Box:\n    def __init__(self, x): self.x = x",
        "challenge_test_list": [],
    },
    "sanitized MBPP": {
        "task_id": 2,
        "prompt": "Double x.",
        "code": RIGHT,
        "test_imports": ["import math"],
        "test_list": [*TESTS, "assert math.isclose(double(2), 4)"],
    },
    "MBPP with null imports": {"prompt": "Double x.", "test_list": TESTS, "test_imports": None},
    "HumanEval": {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Double x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4",
        "entry_point": "double",
    },
    "AceCode": {"prompt": "Double x.", "test_cases": TESTS},
    "RLVR's code": {"messages": [{"role": "user", "content": "Double x."}], "ground_truth": TESTS, "dataset": "code"},
}


def prompt(row, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return prompt_of(read(str(path)).records[0])


def rewards(judge, asked, responses):
    ((*verdicts,),) = load_judge(judge)([(asked, responses)])
    return [verdict.reward for verdict in verdicts]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_known_answer_of_published_rows_reaches_the_judge(name, tmp_path):
    asked = prompt(ANSWERS[name], tmp_path)
    assert rewards("ground_truth", asked, ["The answer is 4.", "The answer is 5."]) == [1, 0]


@needs_sandbox
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_tests_of_published_rows_reach_the_judge(name, tmp_path):
    asked = prompt(PROGRAMS[name], tmp_path)
    assert rewards("executed_tests", asked, [f"```python\n{RIGHT}\n```", f"```python\n{WRONG}\n```"]) == [1, 0]


def test_what_is_no_answer_is_not_taken_for_one(tmp_path):
    checked = {"messages": ASKED, "ground_truth": '{"func_name": "validate_lowercase"}', "dataset": "ifeval"}
    for row in (checked, PROGRAMS["RLVR's code"], {"prompt": "Hi"}):
        assert rewards("ground_truth", prompt(row, tmp_path), ["4"]) == [None]
    for row in (ANSWERS["RLVR"], {"messages": ASKED, "ground_truth": [], "dataset": "code"}):
        assert rewards("executed_tests", prompt(row, tmp_path), ["4"]) == [None]


def settings(*names):
    return [JudgeSettings(name=name) for name in names]


def asked(**metadata):
    return Prompt((Message("user", "Hi"),), metadata)


def test_judges_that_know_no_prompt_are_refused_with_what_they_need():
    with pytest.raises(InputError) as caught:
        check_known(settings("ground_truth", "verifier"), [asked(id=1), asked(answer="")], combine="precedence")
    assert str(caught.value) == (
        "judges: no judge can score any of the 2 prompts: ground_truth needs answer or ground_truth or reward_model; "
        "verifier needs instructions or instruction_id_list or kind; columns found: answer, id"
    )


def test_one_known_prompt_is_enough_by_precedence_and_all_judges_must_know_it_in_a_sum():
    known = [asked(), asked(answer=4)]
    check_known(settings("ground_truth", "executed_tests"), known, combine="precedence")
    with pytest.raises(InputError, match="can score any of the 2 prompts"):
        check_known(settings("ground_truth", "executed_tests"), known, combine="weights")
    check_known(settings("ground_truth", "executed_tests"), [asked(answer=4, tests="x")], combine="weights")
    check_known([], known, combine="precedence")


def test_no_kept_group_is_an_error_with_the_counts():
    statistics = GroupStatistics()
    statistics.counts.update({"prompts": 3, "groups:left out, equal rewards": 3, "responses:none": 0})
    with pytest.raises(RunError, match=r"^no group of responses is kept: 3 groups left out, equal rewards; 3 prompts$"):
        [*not_empty(iter([]), statistics)]
    statistics.counts["groups"] = 1
    assert [*not_empty(iter(["group"]), statistics)] == ["group"]
