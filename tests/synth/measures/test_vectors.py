"""Measures of embeddings: exact values for copies and orthogonal vectors, brute force for the rest."""

import math

import numpy as np
import pytest

from align.synth.measures.hashed_words import hashed_words, unit_length
from align.synth.measures.vectors import main_axes, mean_distance, nearest_distance, vendi_score

ORDERS = (0.5, 1, 2, 5, math.inf)


def drawn(num_texts, width, seed=0):
    return unit_length(np.random.default_rng(seed).normal(size=(num_texts, width)))


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("num_texts", [1, 2, 9])
def test_copies_count_as_one_text_and_orthogonal_texts_as_all(q, num_texts):
    copies = np.repeat(drawn(1, 4), num_texts, axis=0)
    assert vendi_score(copies, q=q) == pytest.approx(1.0)
    assert vendi_score(np.eye(9)[:num_texts], q=q) == pytest.approx(num_texts)


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize(("num_texts", "width"), [(12, 5), (5, 12), (7, 7)])
def test_the_vendi_score_is_that_of_the_eigenvalues_of_all_similarities(q, num_texts, width):
    vectors = drawn(num_texts, width)
    values = np.linalg.svd(vectors @ vectors.T / num_texts, compute_uv=False)
    values = values[values > 1e-12]
    if q == 1:
        expected = np.prod(values**-values)
    elif math.isinf(q):
        expected = 1 / values.max()
    else:
        expected = np.sum(values**q) ** (1 / (1 - q))
    assert vendi_score(vectors, q=q) == pytest.approx(expected, rel=1e-6)


def test_the_vendi_score_of_groups_of_copies_is_the_number_of_groups_of_equal_size():
    groups = np.repeat(np.eye(6)[:3], 4, axis=0)
    assert [vendi_score(groups, q=q) for q in ORDERS] == pytest.approx([3.0] * len(ORDERS))


def test_an_order_of_zero_is_refused():
    with pytest.raises(ValueError, match="q is 0; an order above 0 is needed"):
        vendi_score(np.eye(3), q=0)


@pytest.mark.parametrize(("num_texts", "width"), [(2, 3), (30, 7), (1100, 5)])
def test_distances_are_those_of_all_pairs(num_texts, width):
    vectors = drawn(num_texts, width)
    if num_texts < 100:
        pairs = [1 - vectors[i] @ vectors[j] for i in range(num_texts) for j in range(num_texts) if i != j]
        assert mean_distance(vectors) == pytest.approx(np.mean(pairs))
    nearest = [1 - np.delete(vectors @ row, index).max() for index, row in enumerate(vectors)]
    assert nearest_distance(vectors) == pytest.approx(np.mean(nearest))


def test_the_main_axes_are_the_eigenvectors_of_the_covariance():
    vectors = drawn(40, 6) * np.array([5, 3, 1, 1, 1, 1])
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    axes = main_axes(vectors)
    assert axes.explained == pytest.approx(tuple(values[:2] / values.sum()))
    assert axes.points_N2.var(axis=0, ddof=1) == pytest.approx(values[:2])
    assert np.corrcoef(axes.points_N2.T)[0, 1] == pytest.approx(0, abs=1e-9)
    assert axes.points_N2[:, 0] @ vectors[:, 0] > 0, "the axis of the largest variance points to its own side"


def test_texts_without_variance_are_one_point():
    axes = main_axes(np.repeat(drawn(1, 3), 4, axis=0))
    assert np.allclose(axes.points_N2, 0, atol=1e-9)


TEXTS = ["The cat is red.", "The cat is", "Gladly, the wolf is green, and so on, and so on.", "No", "The cat is red."]


def test_hashed_words_are_equal_for_equal_words_and_orthogonal_without_common_ones():
    found = hashed_words(["Red cat!", "red CAT !", "a wolf sleeps", "", ""], width=1 << 16)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(5))
    similar = found @ found.T
    assert similar[0, 1] == pytest.approx(1) and similar[3, 4] == pytest.approx(1)
    assert similar[0, 2] == pytest.approx(0) and similar[0, 3] == pytest.approx(0)


def test_a_rare_word_in_common_is_more_similar_than_a_frequent_one():
    texts = ["the alpha", "the beta", "gamma alpha", "the delta", "the epsilon"]
    similar = hashed_words(texts, width=1 << 16) @ hashed_words(texts, width=1 << 16).T
    assert similar[0, 2] > similar[0, 1] > 0
