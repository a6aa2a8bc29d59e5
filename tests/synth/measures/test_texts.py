"""Measures of words: distinct-n against its formula for copies, self-BLEU against NLTK."""

from itertools import product
from random import Random

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from align.synth.measures.texts import distinct_n, self_bleu, words

ALPHABET = ["red", "blue", "green", "dog", "cat", "runs", "sleeps"]


def drawn(seed, *, num_texts, longest=12):
    draw = Random(seed)
    return [" ".join(draw.choices(ALPHABET, k=draw.randint(1, longest))) for _ in range(num_texts)]


@pytest.mark.parametrize(("n", "copies"), list(product((1, 2, 3), (1, 2, 7))))
def test_copies_divide_the_distinct_n_grams_of_one_text(n, copies):
    text = "the cat saw the cat and the dog"  # 8 words: 5, 6 and 6 different 1-, 2- and 3-grams of 8, 7 and 6
    different, all_of_one = {1: (5, 8), 2: (6, 7), 3: (6, 6)}[n]
    found = distinct_n([text] * copies, n=n, budget=10**6)
    assert found.value == pytest.approx(different / (all_of_one * copies))
    assert found.words == 8 * copies


def test_only_the_budget_of_words_is_looked_at():
    texts = ["a b c d", "a b e f", "a a a a"]
    assert distinct_n(texts, n=2, budget=8) == distinct_n(texts[:2], n=2, budget=100) == (5 / 6, 8)
    assert distinct_n(texts, n=2, budget=6) == (3 / 4, 6), "ab bc cd ab"


def test_n_grams_end_with_their_text():
    assert distinct_n(["a b", "b a"], n=2, budget=100).value == 1.0, "ab and ba, no bb"
    assert distinct_n(["a", "b", ""], n=2, budget=100) == (None, 2)


def test_punctuation_is_a_word_and_case_does_not_count():
    assert words("Yes, YES!") == ["yes", ",", "yes", "!"]


def peer(texts):
    """Self-BLEU by NLTK, one text after the other with all others as references."""
    split = [words(text) for text in texts]
    smooth = SmoothingFunction().method1
    others = [[other for place, other in enumerate(split) if place != index] for index in range(len(split))]
    scores = [sentence_bleu(each, own, smoothing_function=smooth) for each, own in zip(others, split, strict=True)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_is_that_of_nltk(seed):
    texts = drawn(seed, num_texts=2 + seed % 9, longest=3 + seed % 12)
    assert self_bleu(texts) == pytest.approx(float(peer(texts)), abs=1e-12)


def test_self_bleu_of_copies_is_one_and_of_texts_without_a_common_word_zero():
    text = "a b c d e f"
    assert self_bleu([text] * 3) == pytest.approx(1.0)
    assert self_bleu([text, "g h i j k", "l m n"]) == 0.0
    assert self_bleu([text]) is None
    assert self_bleu(["", text, text]) == pytest.approx(2 / 3)
