"""Thoughts are removed, in one place, before every verifier, final answer, unit test and judge."""

import pickle

import pytest

from align.config import build
from align.errors import InputError
from align.evaluation.task import Answer
from align.evaluation.tasks import TASKS
from align.inference.samples import Sample, Throughput, prompt_key
from align.records import Message, Prompt
from align.rewards.answers.extraction import final_answer
from align.rewards.builtin_judges import LlmSettings
from align.rewards.judge_prompts.parsing import parse_preference, parse_rating
from align.rewards.judges import load_judge, make_judge
from align.rewards.llm_judge import LlmJudge
from align.rewards.settings import JudgeSettings
from align.rewards.thoughts import ThoughtSettings, VisibleText, response_text, visible_text
from align.rewards.verdicts import Verdict
from align.rewards.verifiers.instructions import follows

OFF = ThoughtSettings(strip=False)
TEXTS = [  # a response and what its reader sees
    ("no thought at all", "no thought at all"),
    ("  two spaces stay", "  two spaces stay"),
    ("<think>hm</think>yes", "yes"),
    ("<think>\nhm\n</think>\n\nyes", "yes"),
    ("<think></think>yes", "yes"),
    ("<think>\n\n</think>\n\n    return x", "    return x"),  # the indentation of code is no space after a thought
    ("hm, so\n</think>\nyes", "yes"),  # the prompt opened the thought
    ("hm</think>no</think>yes", "yes"),
    ("<think>a</think>one <think>b</think>two", "one two"),
    ("<think>a<think>b</think>yes", "yes"),
    ("<think>the answer is 18", ""),
    ("so far 18 <think>no, 17", ""),
    ("<think>a</think>18 <think>no", ""),
    ("<think>", ""),
    ("</think>", ""),
    ("a < b > c </ think>", "a < b > c </ think>"),
]


@pytest.mark.parametrize(("response", "seen"), TEXTS)
def test_the_visible_part_of_a_response_is_behind_its_thoughts(response, seen):
    visible = visible_text(response)
    assert visible == seen
    assert visible_text(visible) is visible
    assert visible_text(response, OFF) == response


def test_marks_can_be_set_and_must_differ():
    marks = ThoughtSettings(start="[THINK]", end="[/THINK]")
    assert visible_text("[THINK]<think>[/THINK]yes", marks) == "yes"
    assert visible_text("<think>kept</think>", marks) == "<think>kept</think>"
    with pytest.raises(InputError, match="two different marks"):
        build(ThoughtSettings, {"start": "|", "end": "|"}, ("thoughts",))


def test_visible_text_survives_pickling():
    text = visible_text(response_text("<think>a</think>b", "length"))
    copy = pickle.loads(pickle.dumps(text))
    assert (copy, copy.is_cut, type(copy)) == ("b", True, VisibleText)


def test_a_final_answer_is_not_taken_from_a_thought():
    assert final_answer("<think>3 + 2\n#### 5</think> There are 4 apples.") == "4 apples"
    assert final_answer("<think>the answer is 18</think> I refuse.") != "18"
    assert final_answer(r"<think>\boxed{18}") is None


def test_verifiers_do_not_read_thoughts():
    row = {"instructions": [{"id": "punctuation:no_comma"}]}
    assert follows(row, "<think>first, second</think>No comma") == [True]
    assert follows(row, "<think>first</think>One, comma") == [False]
    assert follows(row, "<think>an unfinished thought") == [False]


GOOD_CODE = "def add(a, b):\n    return a + b"
BAD_CODE = "def add(a, b):\n    return a - b"
# judge -> (prompt's metadata, a response that is right, one that is wrong)
JUDGED = {
    "ground_truth": ({"answer": "42"}, "The answer is 42.", "The answer is 41."),
    "verifier": ({"instructions": [{"id": "punctuation:no_comma"}]}, "No comma", "A, comma"),
    "executed_tests": ({"tests": ["assert add(1, 2) == 3"]}, GOOD_CODE, BAD_CODE),
    f"{__name__}:make": ({}, "red", "blue"),
}


def make():
    """A user's own judge, which knows nothing of thoughts."""

    def judge(groups):
        return [tuple(Verdict(float(text == "red")) for text in responses) for _, responses in groups]

    return judge


@pytest.mark.parametrize("name", JUDGED)
def test_no_judge_sees_thoughts(name):
    metadata, right, wrong = JUDGED[name]
    prompt = Prompt((Message("user", "Go."),), metadata)
    responses = [
        f"<think>\n{wrong}\n</think>\n\n{right}",
        f"<think>\n{right}\n</think>\n\n{wrong}",
        f"{wrong}\n</think>\n{right}",
        f"<think>\n{right}",
    ]
    for judge in (load_judge(name), make_judge([JudgeSettings(name=name)])):
        [verdicts] = judge([(prompt, responses)])
        assert [verdict.reward for verdict in verdicts] == [1, 0, 1, 0]
    [(verdict,)] = make_judge([JudgeSettings(name=name)], thoughts=OFF)([(prompt, [right])])
    assert verdict.reward == 1


def test_thoughts_count_where_stripping_is_off():
    prompt = Prompt((Message("user", "Go."),), {"answer": "42"})
    judge = make_judge([JudgeSettings(name="ground_truth")], thoughts=OFF)
    [verdicts] = judge([(prompt, ["<think>#### 42\n</think> I refuse."])])
    assert [verdict.reward for verdict in verdicts] == [1]


class Scripted:
    """A chat model that always gives the same answer, and records what it was asked."""

    name = "scripted"

    def __init__(self, answer, finish="stop"):
        self.answer, self.finish, self.throughput, self.asked = answer, finish, Throughput(), []

    def sample(self, prompts, settings, *, finished=frozenset()):
        for prompt in prompts:
            self.asked.append(prompt.messages[0].content)
            yield Sample(prompt_key(prompt), 0, self.name, self.answer, 1, self.finish, 0)


def ratings(answer, finish="stop", **settings):
    judge = LlmJudge(Scripted(answer, finish), LlmSettings(model="scripted", mode="rating", **settings))
    [verdicts] = judge([(Prompt((Message("user", "Go."),)), ["a", "b"])])
    return [verdict.reward for verdict in verdicts]


def test_a_verdict_in_a_thought_or_of_a_cut_answer_does_not_count():
    assert ratings("<think>Between [[3]] and [[7]]</think> It is fine. [[7]]") == [7, 7]
    assert ratings("It is fine. [[7]]</think> On reflection: [[6]]") == [6, 6]
    assert ratings("<think>I would say [[3]], but") == [None, None]
    assert ratings("I would say [[3]], but", finish="length") == [None, None]
    assert ratings("<t>[[3]]</t>[[4]]", thoughts={"start": "<t>", "end": "</t>"}) == [4, 4]
    assert parse_rating("<think>[[3]]") is parse_preference("<think>[[A]]") is None
    assert parse_preference("<think>[[A]]</think> [[B]]").value == 0


def test_a_chat_model_is_not_shown_thoughts():
    for mode in ("rating", "pairs"):
        engine = Scripted("[[5]] [[C]]")
        judge = LlmJudge(engine, LlmSettings(model="scripted", mode=mode))
        list(judge([(Prompt((Message("user", "Go."),)), ["<think>secret</think>a", "<think>secret</think>b"])]))
        assert engine.asked
        assert not any("secret" in text for text in engine.asked)


GRADED = {  # task -> (row, a response that is right, one that is wrong)
    "gsm8k": ({"question": "6 * 7?", "answer": "#### 42"}, "#### 42", "#### 41"),
    "ifeval": ({"prompt": "Go.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "No", "No, no"),
    "mbpp": ({"task_id": 1, "text": "Add.", "test_list": ["assert add(1, 2) == 3"]}, GOOD_CODE, BAD_CODE),
    "humaneval": (
        {
            "task_id": "0",
            "prompt": "def add(a, b):\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        },
        "    return a + b",
        "    return a - b",
    ),
    "code": (
        {"prompt": "Write Python for a list x.", "kind": "code", "examples": [["[1, 2]", "[3, 4]"], ["[]", "[]"]]},
        "lambda x: [v + 2 for v in x]",
        "lambda x: [v * 3 for v in x]",
    ),
}


@pytest.mark.parametrize("task", GRADED)
def test_no_task_grades_thoughts(task):
    row, right, wrong = GRADED[task]
    responses = [f"<think>\n{wrong}\n</think>\n{right}", f"{right}\n</think>\n{wrong}", f"<think>\n{right}"]
    grades = list(TASKS[task].grade_answers([row], [Answer(0, response) for response in responses]))
    assert [grade.reward for grade in grades] == [1, 0, 0]
    [grade] = TASKS[task].grade_answers([row], [Answer(0, right)], OFF)
    assert grade.reward == 1


def test_an_answer_that_may_be_cut_off_does_not_count():
    row = {"question": "6 * 70?", "answer": "#### 420"}
    cases = [
        ("So that is 420", "length", 0),  # and perhaps 4200
        ("The answer is 420", "length", 0),
        ("#### 420", "length", 0),
        ("#### 420\nLet me check: 6 * 7", "length", 1),
        ("The answer is 420. Let me check: 6 * 7", "length", 1),
        (r"\boxed{420} because 6", "max_tokens", 1),
        ("So that is 420", "stop", 1),
        ("So that is 420", None, 1),
    ]
    answers = [Answer(0, text, finish=finish) for text, finish, _ in cases]
    grades = TASKS["gsm8k"].grade_answers([row], answers)
    assert [grade.reward for grade in grades] == [right for *_, right in cases]
