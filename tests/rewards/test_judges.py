import math

import numpy as np
import pytest

from align.config import build
from align.errors import InputError, RunError
from align.records import Message, Prompt
from align.rewards.builtin_judges import JUDGES
from align.rewards.judges import Precedence, WeightedSum, make_judge, parse_judge
from align.rewards.settings import JudgeSettings
from align.rewards.verdicts import Verdict


def prompt(text="Q", **metadata):
    return Prompt((Message("user", text),), metadata)


class FixedJudge:
    """A judge with one reward for all responses to each prompt in `rewards`; it records its prompts."""

    def __init__(self, rewards, why="no reason"):
        self.rewards, self.why, self.asked = rewards, why, []

    def __call__(self, groups):
        for asked, responses in groups:
            text = asked.messages[0].content
            self.asked.append(text)
            reward = self.rewards.get(text)
            yield tuple(Verdict(reward, {"x": 1.0}, "" if reward is not None else self.why) for _ in responses)


GROUPS = [(prompt("Q"), ["a", "b"]), (prompt("R"), ["a"]), (prompt("S"), ["a", "b", "c"])]


def rewards(judge, groups=GROUPS):
    return [tuple(verdict.reward for verdict in verdicts) for verdicts in judge(groups)]


def test_precedence_uses_only_the_first_judge_with_a_reward():
    first, second = FixedJudge({"Q": 1.0}), FixedJudge({"Q": 5.0, "S": 6.0})
    judge = Precedence({"first": first, "second": second})
    assert rewards(judge) == [(1, 1), (None,), (6, 6, 6)]
    assert (first.asked, second.asked) == (["Q", "R", "S"], ["R", "S"])


def test_no_further_judge_is_called_once_all_groups_are_decided():
    def never(groups):
        raise AssertionError(groups)

    assert rewards(Precedence({"first": FixedJudge({"Q": 1.0}), "second": never}), GROUPS[:1]) == [(1, 1)]


def fixed(**given):
    """A user's own judge."""
    return lambda groups: [tuple(Verdict(**{"reward": 1.0, **given}) for _ in responses) for _, responses in groups]


@pytest.mark.parametrize("given", [{"reward": math.nan}, {"reward": np.float32(1)}, {"raw": {"length": np.int64(3)}}])
def test_a_verdict_that_json_cannot_hold_names_the_judge(given):
    judge = JudgeSettings(name="test_judges:fixed", settings=given).make()
    with pytest.raises(RunError, match=r"^judge 'test_judges:fixed' must yield verdicts of JSON values"):
        list(judge(GROUPS))


def test_a_verdict_names_its_judge_or_why_all_abstain():
    judge = Precedence({"first": FixedJudge({"Q": 1.0}, "no answer"), "second": FixedJudge({"S": 6.0}, "no tests")})
    of_q, of_r, of_s = judge(GROUPS)
    assert (of_q[0].raw["judge"], of_s[0].raw["judge"]) == ("first", "second")
    assert of_r[0].why == "every judge abstains: first: no answer; second: no tests"


def test_precedence_keeps_the_order_of_more_groups_than_one_batch():
    groups = [(prompt("QRS"[index % 3]), ["a"]) for index in range(200)]
    judge = Precedence({"first": FixedJudge({"Q": 1.0}), "second": FixedJudge({"R": 2.0, "S": 3.0})})
    assert rewards(judge, groups) == [(1.0 + index % 3,) for index in range(200)]


def test_weighted_rewards_are_summed():
    judge = WeightedSum([("first", 0.5, FixedJudge({"Q": 1.0})), ("second", -2.0, FixedJudge({"Q": 3.0, "S": 1.0}))])
    assert rewards(judge) == [(0.5 - 6, 0.5 - 6), (None,), (None, None, None)]


def test_a_weighted_sum_names_the_judge_that_abstains():
    judge = WeightedSum([("first", 0.5, FixedJudge({}, "no answer")), ("second", 1.0, FixedJudge({"Q": 3.0}))])
    verdict = next(iter(judge(GROUPS)))[0]
    assert verdict.why == "first abstains: no answer"
    assert verdict.raw["second"]["reward"] == 3


def by_length(scale: float = 1.0):
    """A user's own judge: the length of a response."""
    return lambda groups: [tuple(Verdict(scale * len(text)) for text in responses) for _, responses in groups]


def test_a_custom_judge_is_imported_by_dotted_path_and_gets_its_settings():
    own = JudgeSettings(name=f"{__name__}:by_length", settings={"scale": 2.0})
    assert rewards(make_judge([own]), [(prompt(), ["a", "bbb"])]) == [(2, 6)]


def test_the_weight_of_a_single_judge_counts():
    own = JudgeSettings(name=f"{__name__}:by_length", weight=-1.0)
    assert rewards(make_judge([own], combine="weights"), [(prompt(), ["a", "bbb"])]) == [(-1, -3)]


def test_judges_take_precedence_in_their_order():
    names = ["ground_truth", "verifier", f"{__name__}:by_length"]
    judge = make_judge([JudgeSettings(name=name) for name in names])
    groups = [
        (prompt(answer="42", instructions=[{"id": "punctuation:no_comma", "kwargs": {}}]), ["#### 42", "#### 41"]),
        (prompt(instructions=[{"id": "punctuation:no_comma", "kwargs": {}}]), ["a, b", "a b"]),
        (prompt(), ["a", "bb"]),
    ]
    assert rewards(judge, groups) == [(1, 0), (0, 1), (1, 2)]


BROKEN = {
    "parentheses.py": ("def make(:\n", "parentheses.py:1: "),
    "names.py": ("x = 1\nmake = nowhere\n", "names.py:2: NameError: name 'nowhere' is not defined"),
    "keys.py": ("make = {}['a']\n", "keys.py:1: KeyError: 'a'"),
    "other.py": ("def mak():\n    pass\n", "has no attribute 'make'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_in_the_module_of_a_custom_judge_names_its_line(tmp_path, monkeypatch, name):
    program, message = BROKEN[name]
    module = f"broken_{name}"
    (tmp_path / module).write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        build(JudgeSettings, {"name": f"{module.removesuffix('.py')}:make"}, ("judges", 0))
    assert str(caught.value).startswith(f"judges.0.name: judge '{module.removesuffix('.py')}:make' cannot be imported")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "oracle"}, "name: no judge is called 'oracle'; "),
        ({"name": "verifer"}, "name: no judge is called 'verifer'; did you mean 'verifier'"),
        ({"name": "verifier", "settings": {"lose": True}}, "settings.lose: unknown key; did you mean 'loose'"),
        ({"name": "verifier", "settings": {"min_words": -1}}, "settings.min_words: Input should be greater than or"),
        (
            {"name": "verifier", "settings": {"verifiers": {"a": "no.such:x"}}},
            "settings.verifiers.a: verifier 'no.such:x' cannot be",
        ),
        (
            {"name": "ground_truth", "settings": {"missing": 1}},
            "settings.missing: Input should be 'abstain' or 'error'",
        ),
        (
            {"name": "executed_tests", "settings": {"rewards": "all"}},
            "settings.rewards: unknown key; did you mean 'reward'",
        ),
        ({"name": "reward_model"}, "settings.path: this key is required"),
        ({"name": "reward_model", "settings": {"path": 5}}, "settings.path: Input should be a valid string (got 5)"),
        (
            {"name": "reward_model", "settings": {"path": "x", "pat": "y"}},
            "settings.pat: unknown key; did you mean 'path'",
        ),
        (
            {"name": "llm", "settings": {"model": "m", "mod": "rating"}},
            "settings.mod: unknown key; did you mean 'mode'",
        ),
        (
            {"name": "llm", "settings": {"model": "m", "mode": "vote"}},
            "settings.mode: Input should be 'pairs' or 'rating'",
        ),
        (
            {"name": "llm", "settings": {"model": "m", "attempts": "two"}},
            "settings.attempts: Input should be a valid int",
        ),
        ({"name": "llm", "settings": {"model": "m", "attempts": 0}}, "settings.attempts: Input should be greater than"),
        (
            {"name": "llm", "settings": {"model": "m", "temperature": -1}},
            "settings.temperature: Input should be greater",
        ),
        (
            {"name": "llm", "settings": {"model": "m", "engine": {"server": {"base_url": "u", "retry": 3}}}},
            "settings.engine.server.retry: unknown key; did you mean 'retries'",
        ),
        ({"name": "no.such.module:judge"}, "name: judge 'no.such.module:judge' cannot be imported"),
        ({"name": f"{__name__}:by_length", "settings": {"scal": 1}}, "settings: got an unexpected keyword argument"),
    ],
)
def test_invalid_settings_are_reported_in_one_line_with_their_location(given, message):
    with pytest.raises(InputError) as caught:
        build(JudgeSettings, given, ("judges", 0))
    assert str(caught.value).startswith(f"judges.0.{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"), [([], "at least one"), (["verifier", "verifier"], "'verifier' is listed twice")]
)
def test_no_judge_and_a_judge_listed_twice_are_rejected(names, message):
    with pytest.raises(InputError, match=message):
        make_judge([JudgeSettings(name=name) for name in names])


def test_an_open_quotation_in_a_judge_is_reported_in_one_line():
    with pytest.raises(InputError, match="No closing quotation"):
        parse_judge("verifier reward='both")


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_without_effect_is_rejected(weight):
    with pytest.raises(ValueError, match="has no effect|finite"):
        JudgeSettings(name="verifier", weight=weight)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("verifier", {"name": "verifier", "settings": {}}),
        ("verifier loose=true weight=0.5", {"name": "verifier", "weight": 0.5, "settings": {"loose": True}}),
        ("reward_model path='a b'", {"name": "reward_model", "settings": {"path": "a b"}}),
    ],
)
def test_a_judge_is_parsed_from_one_line(text, settings):
    assert parse_judge(text) == settings


def test_the_table_has_the_documented_judges():
    assert set(JUDGES) == {"ground_truth", "executed_tests", "verifier", "reward_model", "llm"}
