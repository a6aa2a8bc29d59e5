"""Pairs that the data ranks, and the accuracy of rewards on them."""

import pytest

from align.evaluation.pair_accuracy import Pair, pair_accuracy, preference_pairs
from align.records import Comparison, Message, Response

PROMPT = (Message("user", "say"),)
WORTH = {"true": 1.0, "long": -0.5}


def comparison(*rewards, chosen=None, attributes=None):
    rated = attributes or [{}] * len(rewards)
    responses = tuple(Response(f"r{at}", reward, rated[at]) for at, reward in enumerate(rewards))
    return Comparison(PROMPT, responses, chosen)


def found(one, rewards):
    return [(pair.margin, pair.correct) for pair in preference_pairs(0, one, rewards, weights=WORTH)]


def test_pairs_with_different_rewards_count_and_ties_do_not():
    one = comparison(3.0, 1.0, 1.0, 2.0)
    assert found(one, [9.0, 1.0, 5.0, 7.0]) == [(2.0, 1), (2.0, 1), (1.0, 1), (1.0, 1), (1.0, 1)]
    assert found(one, [0.0, 1.0, 5.0, 0.0]) == [(2.0, 0), (2.0, 0), (1.0, 0.5), (1.0, 0), (1.0, 0)]
    assert found(comparison(2.0, 2.0), [1.0, 0.0]) == []


def test_a_label_takes_precedence_and_its_margin_may_be_negative():
    assert found(comparison(3.0, 1.0, chosen=1), [0.0, 1.0]) == [(-2.0, 1)]
    assert found(comparison(2.0, 2.0, chosen=0), [0.0, 1.0]) == [(0.0, 0)]
    # Without rewards a label is worth 1; of the other two nothing is known.
    assert found(comparison(None, None, None, chosen=2), [0.0, 0.5, 1.0]) == [(1.0, 1), (1.0, 1)]


def test_attributes_rank_responses_if_all_are_known():
    known = [{"true": 2.0, "long": 2.0}, {"true": 2.0, "long": 4.0}]
    assert found(comparison(None, None, attributes=known), [1.0, 0.0]) == [(1.0, 1)]
    assert found(comparison(None, None, attributes=[known[0], {"true": 2.0}]), [1.0, 0.0]) == []


def test_accuracy_is_a_share_of_pairs_with_an_interval_over_prompts():
    pairs = [Pair(0, 1.0, 1.0), Pair(0, 1.0, 1.0), Pair(0, 1.0, 1.0), Pair(1, 1.0, 0.0)]
    overall = pair_accuracy(pairs)["all"]
    assert overall["value"] == 0.75
    assert (overall["n"], overall["pairs"]) == (2, 4)
    assert (overall["low"], overall["high"]) == (0.0, 1.0)  # either prompt may be drawn twice
    assert pair_accuracy([]) == {}


@pytest.mark.parametrize(
    ("margins", "bins"),
    [
        ([5, 3, 1, 2, 4, 6], [([1, 2], 2), ([3, 4], 2), ([5, 6], 2)]),
        ([1] * 9, [([1, 1], 9)]),
        ([1] * 5 + [2], [([1, 1], 5), ([2, 2], 1)]),
        ([7], [([7, 7], 1)]),
        ([-1, 0], [([-1, -1], 1), ([0, 0], 1)]),
    ],
)
def test_margins_form_three_bins_and_equal_margins_share_one(margins, bins):
    pairs = [Pair(row, float(margin), 1.0) for row, margin in enumerate(margins)]
    assert [(each["margin"], each["pairs"]) for each in pair_accuracy(pairs)["by_margin"]] == bins


def test_subsets_are_reported_separately():
    pairs = [Pair(0, 1.0, 1.0, "chat"), Pair(1, 1.0, 0.0, "maths"), Pair(2, 1.0, 1.0, "maths"), Pair(3, 1.0, 1.0)]
    by_subset = {each["subset"]: (each["value"], each["pairs"]) for each in pair_accuracy(pairs)["by_subset"]}
    assert by_subset == {"chat": (1.0, 1), "maths": (0.5, 2)}
