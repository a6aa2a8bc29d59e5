import hashlib
import random

import pytest

from align.errors import InputError
from align.evaluation.pairs.judging import judged_games
from align.evaluation.pairs.table import JudgedGame, pairs_of
from align.evaluation.pairs.win_rates import RULES, equal_length, pair_counts, position_bias, win_rate
from align.inference.samples import Sample, Throughput, prompt_key
from align.records import Message, Prompt
from align.rewards.builtin_judges import LlmSettings
from align.rewards.judges import Precedence
from align.rewards.llm_judge import LlmJudge
from align.rewards.verdicts import Game, Verdict

PROMPT = Prompt((Message("user", "Say it."),))


def by(rule):
    """A judge whose rewards are a function of the response."""

    def judge(groups):
        for _, responses in groups:
            yield tuple(Verdict(rule(response)) for response in responses)

    return judge


def groups(*pairs):
    return [(PROMPT, pair) for pair in pairs]


def judged_pairs(groups, judge):
    return pairs_of(judged_games(groups, judge))


def table(*pairs):
    """Pairs with these outcomes of their games, in both orders."""
    games = [
        (str(number), order, win)
        for number, wins in enumerate(pairs)
        for order, win in zip(("a first", "b first"), wins, strict=False)
    ]
    known = {"prompt": "", "a": "a", "b": "b", "judge": ""}
    return pairs_of(
        JudgedGame(id=number, order=order, verdict=win, void="no mark" * (win is None), **known)
        for number, order, win in games
    )


def rates(pairs):
    return {rule: found and found.value for rule in RULES for found in [win_rate(pairs, rule)]}


@pytest.mark.parametrize("rule", RULES)
def test_ties_count_one_half(rule):
    pairs = judged_pairs(groups(("good", "bad"), ("bad", "good"), ("good", "good"), ("good", "bad")), by(len))
    assert win_rate(pairs, rule).value == 2.5 / 4


@pytest.mark.parametrize("rule", RULES)
def test_a_judge_without_an_order_gives_every_rule_the_same_rate_and_void_pairs_none(rule):
    judge = by(lambda response: None if response == "?" else len(response))
    pairs = judged_pairs(groups(("good", "bad"), ("?", "bad")), judge)
    found = win_rate(pairs, rule)
    assert (found.value, found.n, pair_counts(pairs)["void_games"]) == (1, 1, 1)


def test_prompts_with_one_id_are_an_error_before_the_judge_is_asked():
    def judge(groups):
        pytest.fail("the judge is asked")

    named, unnamed = (Prompt(PROMPT.messages, {"id": name}) for name in ("2", None))
    with pytest.raises(InputError, match="2 prompts have the id '2'"):
        judged_games([(named, ("a", "b")), (unnamed, ("a", "b"))], judge)


def test_one_table_has_a_rate_for_each_rule():
    won, lost, disagrees, half_void, void = (1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, None), (None, None)
    pairs = table(won, won, won, lost, disagrees, disagrees, half_void, void)
    assert rates(pairs) == {
        "consistent": 3 / 4,  # of the first four
        "both_games": (6 + 2 + 1) / 13,
        "tie_if_inconsistent": (3 + 1) / 6,
    }
    counts = pair_counts(pairs)
    assert (counts["pairs"], counts["games"], counts["void"], counts["inconsistent"]) == (8, 16, {"no mark": 3}, 2)
    assert counts["bounds"] == {
        "win_rate.consistent": (3 / 5, 5 / 6),  # of the half void pair one game is won: as a loss it is inconsistent
        "win_rate.both_games": (9 / 16, 12 / 16),
        "win_rate.tie_if_inconsistent": (4.5 / 8, 6 / 8),
    }


def test_a_tie_and_a_win_disagree():
    assert rates(table((0.5, 1.0), (0.5, 0.5))) == {
        "consistent": 0.5,
        "both_games": 2.5 / 4,
        "tie_if_inconsistent": 0.5,
    }


def test_probabilities_weight_the_rate_and_agree_if_they_name_the_same_response():
    """AlpacaEval's weighted win rate is the mean of the judge's probabilities."""
    assert rates(table((0.9, 0.7), (0.6, 0.3))) == pytest.approx(
        {"consistent": 0.8, "both_games": (0.9 + 0.7 + 0.6 + 0.3) / 4, "tie_if_inconsistent": (0.8 + 0.5) / 2}
    )


def test_a_rule_that_no_pair_satisfies_has_no_rate():
    assert rates(table((1.0, 0.0), (0.0, 1.0))) == {
        "consistent": None,
        "both_games": 0.5,
        "tie_if_inconsistent": 0.5,
    }


def test_no_decided_comparison_is_an_error():
    with pytest.raises(InputError, match="none of 1"):
        equal_length(judged_pairs(groups(("good", "bad")), by(lambda _: None)))


def test_groups_must_have_two_responses():
    with pytest.raises(InputError, match="prompt 2 has 3"):
        judged_pairs(groups(("a", "b"), ("a", "b", "c")), by(len))


def test_a_game_out_of_range_is_an_error():
    with pytest.raises(InputError, match="a game of 2"):
        judged_pairs(groups(("a", "b")), lambda _: [(Verdict(1.0, games=[Game(2), Game(0)]),) * 2])


NUM_PAIRS = 1500


class ScriptedJudge:
    """An engine that answers comparisons with a known bias and noise; the response that ends in `+` is the better one.

    With probability `bias` it names the answer shown first; else it names the better one, or with probability `noise`
    the other; with probability `void` it says nothing that can be read.
    """

    name = "scripted"

    def __init__(self, *, bias=0.0, noise=0.0, void=0.0):
        self.bias, self.noise, self.void, self.throughput = bias, noise, void, Throughput()

    def sample(self, prompts, settings, *, finished=frozenset()):
        for prompt in prompts:
            key = prompt_key(prompt)
            yield Sample(key, 0, self.name, self.answer(prompt.messages[0].content), 1, "stop", 0)

    def answer(self, question):
        draw = random.Random(hashlib.sha256(question.encode()).digest())
        if draw.random() < self.void:
            return "I cannot say."
        first_is_better = "+" in question.split("</answer_a>")[0]
        if draw.random() < self.bias:
            return "[[A]]"
        return "[[A]]" if first_is_better != (draw.random() < self.noise) else "[[B]]"


def scripted(*, share_better=1.0, **judge):
    """Return the judged pairs of an LLM judge; our response is the better one in `share_better` of them."""
    better = [number < share_better * NUM_PAIRS for number in range(NUM_PAIRS)]
    pairs = [(f"{n} ours{'+' * is_better}", f"{n} theirs{'+' * (not is_better)}") for n, is_better in enumerate(better)]
    return judged_pairs(groups(*pairs), LlmJudge(ScriptedJudge(**judge), LlmSettings(model="scripted", attempts=1)))


@pytest.mark.parametrize("bias", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_measured_position_bias_is_the_planted_one(bias, noise):
    found = position_bias(scripted(bias=bias, noise=noise, share_better=0.5))
    assert found.n == NUM_PAIRS
    assert found.low <= bias <= found.high
    assert found.high - found.low < 0.1


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_of_a_noisy_judge_each_rule_has_its_own_rate(noise):
    pairs = scripted(noise=noise)
    kept = (1 - noise) ** 2 + noise**2  # both games right, or both wrong
    expected = {
        "consistent": (1 - noise) ** 2 / kept,
        "both_games": 1 - noise,
        "tie_if_inconsistent": (1 - noise) ** 2 + (1 - kept) / 2,
    }
    for rule, value in expected.items():
        found = win_rate(pairs, rule)
        assert found.low <= value <= found.high
    deviation = (kept * (1 - kept) / NUM_PAIRS) ** 0.5
    assert win_rate(pairs, "consistent").n / NUM_PAIRS == pytest.approx(kept, abs=3 * deviation)
    assert pair_counts(pairs)["inconsistent"] == NUM_PAIRS - win_rate(pairs, "consistent").n


def test_the_rate_without_void_games_is_within_the_bounds():
    pairs = scripted(noise=0.1, void=0.15)
    counts = pair_counts(pairs)
    low, high = counts["bounds"]["win_rate.both_games"]
    share_void = counts["void_games"] / (2 * NUM_PAIRS)
    assert share_void == pytest.approx(0.15, abs=0.02)
    assert high - low == pytest.approx(share_void)
    assert low < win_rate(pairs, "both_games").value < high
    assert low < win_rate(scripted(noise=0.1), "both_games").value < high


def test_games_are_those_of_our_response_at_either_position():
    """A judge that always names the first answer: ours wins if it is shown first."""
    ((*verdicts,),) = LlmJudge(ScriptedJudge(bias=1.0), LlmSettings(model="scripted"))(groups(("a", "b")))
    assert [[game.win for game in verdict.games] for verdict in verdicts] == [[1, 0], [1, 0]]
    assert [verdict.reward for verdict in verdicts] == [None, None]


def test_games_survive_a_combination_of_judges_that_all_abstain():
    judge = Precedence({"rule": by(lambda _: None), "llm": LlmJudge(ScriptedJudge(bias=1.0), LlmSettings(model="s"))})
    (pair,) = judged_pairs(groups(("a", "b")), judge)
    assert pair.wins == [1, 0]
