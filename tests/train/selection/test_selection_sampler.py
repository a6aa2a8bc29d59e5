"""The sampler against brute force, closed forms, and itself in other chunks."""

from collections import Counter
from itertools import combinations, permutations
from math import exp

import numpy as np
import pytest

from align.errors import InputError
from align.train.selection.sampler import gumbel_noise, select

NUM_DRAWS = 6000


def chi_square_limit(freedom):
    """Return the value that chi-square exceeds once in 10,000 times (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def clustered(seed):
    """Return scores and a coupling under which rows of one of three clusters are worth little together."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat([0, 1, 2], 4)
    scores = 1 + 0.2 * rng.random(12) + np.array([1.0, 0.5, 0.0])[cluster]
    coupling = -0.45 * (cluster[:, None] == cluster[None]) - 0.05 * rng.random((12, 12))
    np.fill_diagonal(coupling, 100)  # must not be read
    return scores, coupling


def total(rows, scores, coupling):
    rows = list(rows)
    return scores[rows].sum() + sum(coupling[i, j] for i in rows for j in rows if i != j)


@pytest.mark.parametrize("chunks", [1, 3, 16])
def test_independent_rows_give_the_highest_scores_in_any_number_of_chunks(chunks):
    scores = np.random.default_rng(0).normal(size=100)
    chosen = select(scores, size=16, chunks=chunks)
    assert sorted(chosen.rows_b) == sorted(np.argsort(scores)[-16:])


def test_equal_scores_are_taken_in_order():
    assert select(np.zeros(9), size=4, chunks=2).rows_b.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("chunks", [1, 2])
def test_independent_rows_are_drawn_with_plackett_luce_probabilities_in_any_number_of_chunks(chunks):
    scores = np.array([0.0, 0.5, 1.0, -0.5, 0.2, 1.5])
    expected = Counter()
    for first, second in permutations(range(6), 2):
        weights = [exp(score) for score in scores]
        expected[frozenset((first, second))] += (
            weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        )
    found = Counter()
    for step in range(NUM_DRAWS):
        noise = gumbel_noise(7, step, range(6), chunks)
        found[frozenset(select(scores, size=2, chunks=chunks, gain=1.0, noise_NB=noise).rows_b.tolist())] += 1
    chi_square = sum((found[each] - NUM_DRAWS * p) ** 2 / (NUM_DRAWS * p) for each, p in expected.items())
    assert chi_square < chi_square_limit(len(expected) - 1)


def test_one_row_at_a_time_the_conditional_scores_sum_to_the_score_of_the_sub_batch():
    rng = np.random.default_rng(1)
    scores, coupling = rng.normal(size=40), rng.normal(size=(40, 40))
    noise = gumbel_noise(0, 3, range(40), 12)
    chosen = select(scores, coupling, size=12, chunks=12, gain=0.5, noise_NB=noise)
    assert abs(chosen.scores_b.sum() - total(chosen.rows_b, scores, coupling)) < 1e-9
    assert len(set(chosen.rows_b.tolist())) == 12


def test_the_best_of_all_subsets_is_nearly_reached_and_independent_choice_is_clearly_worse():
    joint, independent = [], []
    for seed in range(20):
        scores, coupling = clustered(seed)
        best = max(total(rows, scores, coupling) for rows in combinations(range(12), 4))
        joint.append(total(select(scores, coupling, size=4, chunks=4).rows_b, scores, coupling) / best)
        independent.append(total(select(scores, size=4, chunks=4).rows_b, scores, coupling) / best)
    assert np.mean(joint) > 0.98
    assert np.mean(independent) < 0.6


def test_noise_depends_on_the_group_and_not_on_its_place_or_on_the_number_of_chunks():
    noise = gumbel_noise(1, 2, [5, 6, 7], 2)
    np.testing.assert_array_equal(gumbel_noise(1, 2, [7, 5], 1), noise[:1, [2, 0]])
    assert not np.isin(gumbel_noise(1, 3, [5, 6, 7], 2), noise).any()
    many = gumbel_noise(0, 0, range(20000), 2)
    assert abs(many.mean() - 0.5772) < 0.03  # Euler's constant; the standard error is 0.0064
    assert abs(np.corrcoef(many)[0, 1]) < 0.03


def test_a_group_that_occurs_twice_is_drawn_twice():
    noise = gumbel_noise(1, 2, [5, 6, 5, 7, 5], 2)
    np.testing.assert_array_equal(noise[:, [0, 1, 3]], gumbel_noise(1, 2, [5, 6, 7], 2))
    assert len(np.unique(noise)) == 10
    draws = np.array([gumbel_noise(0, step, [4, 4], 1)[0] for step in range(5000)])
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.06


@pytest.mark.parametrize(("size", "chunks"), [(9, 2), (2, 3), (0, 1)])
def test_more_rows_than_there_are_or_more_chunks_than_rows_are_refused(size, chunks):
    with pytest.raises(InputError, match="cannot choose"):
        select(np.zeros(8), size=size, chunks=chunks)
