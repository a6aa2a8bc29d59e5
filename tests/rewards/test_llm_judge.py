import re

import pytest

from align.inference.samples import Sample, Speed, prompt_key
from align.records import Message, Prompt
from align.rewards.builtin_judges import LlmSettings
from align.rewards.llm_judge import LlmJudge, parse_preference, parse_rating

PROMPT = Prompt((Message("user", "Name a colour {of} the flag."),))
BLOCK = re.compile(r"<answer(?:_a|_b)?>\n(.*?)\n</answer", re.DOTALL)


class Voice:
    """An engine whose words are a function of what it is asked; it remembers every question."""

    name = "voice"

    def __init__(self, say):
        self.say, self.speed, self.asked = say, Speed(), []

    def sample(self, prompts, settings, *, done=frozenset()):
        for prompt in reversed(prompts):  # completion has an order of its own
            self.asked.append(prompt)
            yield Sample(prompt_key(prompt), 0, self.name, self.say(prompt.messages), 1, "stop", 0)


def shown(messages):
    """The answers that the first message shows, in order."""
    return BLOCK.findall(messages[0].content)


def longest(messages):
    first, second = map(len, shown(messages))
    return "Because.\n[[C]]" if first == second else f"It says more. [[{'A' if first > second else 'B'}]]"


def judge_by(voice, **settings):
    return LlmJudge(voice, LlmSettings(model="voice", **settings))


def rewards(judge, *responses):
    ((*verdicts,),) = judge([(PROMPT, responses)])
    return [verdict.reward for verdict in verdicts]


def test_the_better_of_two_wins_in_whatever_order_they_stand():
    assert rewards(judge_by(Voice(longest)), "red", "dark red") == [0, 1]
    assert rewards(judge_by(Voice(longest)), "dark red", "red") == [1, 0]


def test_both_orders_are_asked_for():
    voice = Voice(longest)
    rewards(judge_by(voice), "red", "dark red")
    assert sorted(shown(asked.messages) for asked in voice.asked) == [["dark red", "red"], ["red", "dark red"]]
    assert all("Name a colour {of} the flag." in asked.messages[0].content for asked in voice.asked)


@pytest.mark.parametrize("mark", ["A", "B"])
def test_a_judge_that_always_prefers_a_place_decides_nothing(mark):
    judge = judge_by(Voice(lambda _: f"[[{mark}]]"))
    ((*verdicts,),) = judge([(PROMPT, ["red", "dark red", "blue"])])
    assert [verdict.reward for verdict in verdicts] == [None] * 3
    assert "the two orders disagree (2)" in verdicts[0].why


def test_a_tie_in_both_orders_is_a_tie():
    assert rewards(judge_by(Voice(lambda _: "[[C]]")), "red", "blue") == [0.5, 0.5]


def test_a_tie_in_one_order_only_decides_nothing():
    judge = judge_by(Voice(lambda messages: "[[C]]" if shown(messages)[0] == "red" else "[[A]]"))
    assert rewards(judge, "red", "blue") == [None, None]


def test_of_many_responses_each_gets_the_mean_of_its_decided_pairs():
    # By length: 1 < 2 = 2 < 3, so of three pairs each wins 0, 1.5, 1.5 and 3.
    assert rewards(judge_by(Voice(longest)), "a", "bb", "cc", "ddd") == [0, 0.5, 0.5, 1]


def test_a_pair_that_is_void_counts_for_neither():
    def say(messages):
        first, second = shown(messages)
        return "[[A]]" if {first, second} == {"a", "bb"} else longest(messages)

    assert rewards(judge_by(Voice(say)), "a", "bb", "ccc") == [0, 0, 1]


def test_what_cannot_be_read_is_asked_for_again_with_the_form_that_is_wanted():
    voice = Voice(lambda messages: "I like both." if len(messages) == 1 else longest(messages))
    assert rewards(judge_by(voice), "red", "dark red") == [0, 1]
    again = [asked.messages for asked in voice.asked if len(asked.messages) > 1]
    assert len(again) == 2
    assert [message.role for message in again[0]] == ["user", "assistant", "user"]
    assert again[0][1].content == "I like both."
    assert "[[A]], [[B]] or [[C]]" in again[0][2].content


def test_garbage_is_asked_for_as_often_as_allowed_and_then_given_up():
    voice = Voice(lambda _: "hmm")
    ((*verdicts,),) = judge_by(voice, attempts=4)([(PROMPT, ["red", "dark red"])])
    assert len(voice.asked) == 2 * 4
    assert [verdict.reward for verdict in verdicts] == [None, None]
    assert "no answer could be parsed (1)" in verdicts[0].why


def test_only_what_was_not_read_is_asked_for_again():
    voice = Voice(lambda messages: "hmm" if len(messages) == 1 and shown(messages)[0] == "red" else longest(messages))
    rewards(judge_by(voice), "red", "dark red")
    assert len(voice.asked) == 3


def test_one_response_has_nothing_to_be_compared_with():
    ((verdict,),) = judge_by(Voice(longest))([(PROMPT, ["red"])])
    assert (verdict.reward, verdict.why) == (None, "no other response to compare with")


def test_ratings_are_of_each_response_by_itself():
    voice = Voice(lambda messages: f"Fine. [[{len(shown(messages)[0])}]]")
    assert rewards(judge_by(voice, mode="rating"), "red", "white") == [3, 5]
    assert rewards(judge_by(voice, mode="rating", attempts=1), "red", "a" * 11) == [3, None]


def test_groups_come_back_in_order_over_more_than_one_round():
    groups = [(PROMPT, ["a" * (index % 3 + 1), "bb"]) for index in range(40)]
    found = [tuple(verdict.reward for verdict in verdicts) for verdicts in judge_by(Voice(longest))(groups)]
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
def test_preferences_are_read_from_the_last_mark(answer, value):
    assert parse_preference(answer) == value


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
    assert parse_rating(answer) == value
