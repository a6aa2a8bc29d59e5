"""Ranks of rows, and choices of responses, against brute force over all orders and subsets."""

import random
from itertools import combinations, permutations
from statistics import fmean, pstdev, pvariance

import numpy as np
import pytest

from align.curate.ranking import most_difficult, nearest_target
from align.data.group_choice import best_and_low, most_variance


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_most_variance_is_that_of_the_best_subset(size):
    draw = random.Random(size)
    for _ in range(30):
        rewards = [draw.choice([0.0, 1.0, draw.random(), draw.gauss(0, 3)]) for _ in range(8)]
        chosen = most_variance(rewards, size)
        best = max(pvariance([rewards[index] for index in subset]) for subset in combinations(range(8), size))
        assert pvariance([rewards[index] for index in chosen]) == pytest.approx(best)
        assert len(set(chosen)) == size
        assert [rewards[index] for index in chosen] == sorted((rewards[index] for index in chosen), reverse=True)


def test_best_and_low_is_the_maximum_and_the_closest_to_two_deviations_below_the_mean():
    draw = random.Random(1)
    not_the_worst = 0
    for _ in range(200):
        rewards = [draw.gauss(0, 1) - 5 * (draw.random() < 0.05) for _ in range(draw.randrange(2, 40))]
        best, low = best_and_low(rewards)
        aim = fmean(rewards) - 2 * pstdev(rewards)
        assert rewards[best] == max(rewards)
        assert all(abs(rewards[low] - aim) <= abs(reward - aim) for at, reward in enumerate(rewards) if at != best)
        not_the_worst += rewards[low] > min(rewards)
    assert not_the_worst > 10
    with pytest.raises(ValueError, match="two responses"):
        best_and_low([1.0])


def test_targets_choose_in_turns():
    """Of all orders, only one lets each target take its most similar free row when it is its turn."""
    draw = np.random.default_rng(2)
    rows, targets = draw.normal(size=(6, 4)).astype(np.float32), draw.normal(size=(2, 4)).astype(np.float32)
    scores, order = nearest_target(rows, targets)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (targets, rows)]
    cosines = unit[0] @ unit[1].T
    np.testing.assert_allclose(scores, cosines.max(axis=0), rtol=1e-6)

    def is_in_turns(tried):
        return all(
            cosines[turn % 2, row] >= max(cosines[turn % 2, other] for other in tried[turn:])
            for turn, row in enumerate(tried)
        )

    assert [list(tried) for tried in permutations(range(6)) if is_in_turns(tried)] == [order]


def test_the_most_difficult_rows_below_one_come_first():
    assert most_difficult([0.5, None, 0.9, 1.2, 0.7, 1.0]) == [2, 4, 0]
