import re

import pytest

from align.inference.samples import Sample, Throughput, prompt_key
from align.records import Message, Prompt
from align.rewards.builtin_judges import LlmSettings
from align.rewards.judge_prompts.parsing import parse_preference, parse_rating
from align.rewards.llm_judge import LlmJudge

PROMPT = Prompt((Message("user", "Name a colour {of} the flag."),))
BLOCK = re.compile(r"<answer(?:_a|_b)?>\n(.*?)\n</answer", re.DOTALL)


class ScriptedEngine:
    """An engine whose answer is a function of the dialogue; it records every question."""

    name = "scripted"

    def __init__(self, answer):
        self.answer, self.throughput, self.asked = answer, Throughput(), []

    def sample(self, prompts, settings, *, finished=frozenset()):
        for prompt in reversed(prompts):  # engines complete samples in any order
            self.asked.append(prompt)
            yield Sample(prompt_key(prompt), 0, self.name, self.answer(prompt.messages), 1, "stop", 0)


def shown(messages):
    """Return the responses in the first message, in order."""
    return BLOCK.findall(messages[0].content)


def longest(messages):
    first, second = map(len, shown(messages))
    return "Because.\n[[C]]" if first == second else f"It says more. [[{'A' if first > second else 'B'}]]"


def judge_by(engine, **settings):
    return LlmJudge(engine, LlmSettings(model="scripted", **settings))


def rewards(judge, *responses):
    ((*verdicts,),) = judge([(PROMPT, responses)])
    return [verdict.reward for verdict in verdicts]


def test_the_better_response_wins_at_either_position():
    assert rewards(judge_by(ScriptedEngine(longest)), "red", "dark red") == [0, 1]
    assert rewards(judge_by(ScriptedEngine(longest)), "dark red", "red") == [1, 0]


def test_both_orders_are_compared():
    engine = ScriptedEngine(longest)
    rewards(judge_by(engine), "red", "dark red")
    assert sorted(shown(asked.messages) for asked in engine.asked) == [["dark red", "red"], ["red", "dark red"]]
    assert all("Name a colour {of} the flag." in asked.messages[0].content for asked in engine.asked)


@pytest.mark.parametrize("mark", ["A", "B"])
def test_a_judge_that_prefers_a_position_decides_nothing(mark):
    judge = judge_by(ScriptedEngine(lambda _: f"[[{mark}]]"))
    ((*verdicts,),) = judge([(PROMPT, ["red", "dark red", "blue"])])
    assert [verdict.reward for verdict in verdicts] == [None] * 3
    assert "the two orders disagree (2)" in verdicts[0].why


def test_a_tie_in_both_orders_is_a_tie():
    assert rewards(judge_by(ScriptedEngine(lambda _: "[[C]]")), "red", "blue") == [0.5, 0.5]


def test_a_tie_in_one_order_decides_nothing():
    judge = judge_by(ScriptedEngine(lambda messages: "[[C]]" if shown(messages)[0] == "red" else "[[A]]"))
    assert rewards(judge, "red", "blue") == [None, None]


def test_a_reward_is_the_mean_over_decided_pairs():
    # By length: 1 < 2 = 2 < 3, so of three pairs each wins 0, 1.5, 1.5 and 3.
    assert rewards(judge_by(ScriptedEngine(longest)), "a", "bb", "cc", "ddd") == [0, 0.5, 0.5, 1]


def test_an_undecided_pair_counts_for_neither_response():
    def say(messages):
        first, second = shown(messages)
        return "[[A]]" if {first, second} == {"a", "bb"} else longest(messages)

    assert rewards(judge_by(ScriptedEngine(say)), "a", "bb", "ccc") == [0, 0, 1]


def test_a_retry_asks_for_the_required_form():
    engine = ScriptedEngine(lambda messages: "I like both." if len(messages) == 1 else longest(messages))
    assert rewards(judge_by(engine), "red", "dark red") == [0, 1]
    again = [asked.messages for asked in engine.asked if len(asked.messages) > 1]
    assert len(again) == 2
    assert [message.role for message in again[0]] == ["user", "assistant", "user"]
    assert again[0][1].content == "I like both."
    assert "[[A]], [[B]] or [[C]]" in again[0][2].content


def test_unparsable_answers_are_retried_up_to_the_limit():
    engine = ScriptedEngine(lambda _: "hmm")
    ((*verdicts,),) = judge_by(engine, attempts=4)([(PROMPT, ["red", "dark red"])])
    assert len(engine.asked) == 2 * 4
    assert [verdict.reward for verdict in verdicts] == [None, None]
    assert "no answer could be parsed (1)" in verdicts[0].why


def test_only_unparsed_questions_are_retried():
    engine = ScriptedEngine(
        lambda messages: "hmm" if len(messages) == 1 and shown(messages)[0] == "red" else longest(messages)
    )
    rewards(judge_by(engine), "red", "dark red")
    assert len(engine.asked) == 3


def test_a_single_response_is_not_compared():
    ((verdict,),) = judge_by(ScriptedEngine(longest))([(PROMPT, ["red"])])
    assert (verdict.reward, verdict.why) == (None, "no other response to compare with")


def test_each_response_is_rated_separately():
    engine = ScriptedEngine(lambda messages: f"Fine. [[{len(shown(messages)[0])}]]")
    assert rewards(judge_by(engine, mode="rating"), "red", "white") == [3, 5]
    assert rewards(judge_by(engine, mode="rating", attempts=1), "red", "a" * 11) == [3, None]


def test_groups_keep_their_order_over_several_batches():
    groups = [(PROMPT, ["a" * (index % 3 + 1), "bb"]) for index in range(40)]
    found = [tuple(verdict.reward for verdict in verdicts) for verdicts in judge_by(ScriptedEngine(longest))(groups)]
    assert found == [[(0, 1), (0.5, 0.5), (1, 0)][index % 3] for index in range(40)]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("[[A]]", 1),
        ("so [[ b ]]", 0),
        ("[[A]] at first, but then [[C]]", 0.5),
        ("A", None),
        ("[[D]]", None),
        ("[A]", None),
        ("", None),
        ("[[A]] or [[?]]", None),
    ],
)
def test_the_last_decision_is_the_preference(answer, value):
    assert (parse_preference(answer) or [None])[0] == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("[[7]]", 7),
        ("[[ 7.5 ]]", 7.5),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("7", None),
        ("[[x]]", None),
    ],
)
def test_ratings_are_numbers_from_one_to_ten(answer, value):
    assert (parse_rating(answer) or [None])[0] == value
