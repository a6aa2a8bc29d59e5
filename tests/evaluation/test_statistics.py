import math
import random
from statistics import NormalDist

import numpy as np
import pytest

from align.evaluation.statistics import bootstrap_interval, score


def test_the_value_is_the_mean_and_n_the_number_of_prompts():
    found = score([1, 0, 0, 1, 1])
    assert (found.value, found.n) == (0.6, 5)


def test_counts_weight_the_prompts():
    assert score([1, 3], [2, 6]).value == 0.5
    assert score([2, 0], [2, 6]).value == 0.25


def test_equal_grades_have_a_zero_width_interval():
    assert score([1.0] * 7)[:3] == (1, 1, 1)


def test_the_interval_is_near_that_of_the_normal_approximation():
    draw = random.Random(0)
    grades = [float(draw.random() < 0.3) for _ in range(2000)]
    found = score(grades)
    share = sum(grades) / len(grades)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(share * (1 - share) / len(grades))
    assert found.low == pytest.approx(share - half, abs=0.15 * half)
    assert found.high == pytest.approx(share + half, abs=0.15 * half)


def test_prompts_are_resampled_whole():
    # Ten copies of each of 50 prompts know no more than the 50 prompts: the interval must not shrink.
    draw = random.Random(1)
    grades = [float(draw.random() < 0.5) for _ in range(50)]
    alone, tenfold = score(grades), score([10 * grade for grade in grades], [10] * 50)
    assert tenfold[:3] == pytest.approx(alone[:3])


def test_the_interval_depends_on_the_seed():
    grades = [float(index % 3 == 0) for index in range(40)]
    assert score(grades, seed=3) == score(grades, seed=3)
    assert score(grades, seed=3) != score(grades, seed=4)


def test_intervals_have_the_nominal_coverage():
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = draw.normal(size=60)
        low, high = bootstrap_interval(
            lambda chosen, values=values: float(values[chosen].mean()), 60, seed=seed, resamples=200
        )
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.98
