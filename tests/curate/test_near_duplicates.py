"""Near-duplicates against the Jaccard similarity of all pairs, computed on sets of tuples of words."""

import random
from itertools import combinations

import numpy as np
import pytest

from align.curate.near_duplicates import MinHasher, near_duplicates
from align.curate.ngrams import WORDS_AND_MARKS, WordHashes, jaccard, ngram_hashes, normalized
from align.curate.settings import Bands, NearDuplicateSettings
from align.errors import InputError

NGRAM = 5


def shingles(text, size=NGRAM):
    words = WORDS_AND_MARKS.findall(normalized(text))
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))}


def similarity(one, other):
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def hashed(text, hashes=WordHashes()):  # noqa: B008 - hashes of words are constant
    return np.unique(ngram_hashes(hashes.of(normalized(text)), NGRAM))


def texts(number, *, seed):
    """Texts of which some are rewordings of earlier ones, in chains, by 1 to 5 words."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        words = [f"w{draw.randrange(400)}" for _ in range(draw.randrange(3, 150))]
        if found and draw.random() < 0.6:
            words = draw.choice(found).split()
            for _ in range(draw.randrange(1, 6)):
                words[draw.randrange(len(words))] = f"w{draw.randrange(400)}"
        found.append(" ".join(words))
    return found


def greedy(known, threshold):
    """The texts that a comparison of all pairs drops, in order of preference."""
    kept, dropped = [], {}
    for number, text in enumerate(known):
        best = max(((similarity(text, known[other]), -other) for other in kept), default=(0, 0))
        if best[0] >= threshold:
            dropped[number] = (-best[1], best[0])
        else:
            kept.append(number)
    return dropped


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_greedy_minhash_drops_what_a_comparison_of_all_pairs_drops(threshold):
    known = texts(300, seed=1)
    hasher = MinHasher(NearDuplicateSettings(threshold=threshold).bands())
    keys = np.stack([hasher.band_keys(hashed(text)) for text in known])
    found = near_duplicates(keys, lambda number: hashed(known[number]), threshold=threshold)
    expected = greedy(known, threshold)
    assert {text: match.kept for text, match in found.items()} == {text: kept for text, (kept, _) in expected.items()}
    assert all(match.similarity == pytest.approx(expected[text][1]) for text, match in found.items())
    assert 10 < len(found) < 200


def test_texts_without_anything_in_common_are_kept():
    keys = np.arange(12, dtype=np.uint64).reshape(4, 3)
    assert near_duplicates(keys, lambda _: np.empty(0, np.uint64), threshold=0.5) == {}


def test_hashed_similarity_is_that_of_the_sets():
    known = texts(60, seed=2)
    for one, other in combinations(known, 2):
        assert jaccard(hashed(one), hashed(other)) == pytest.approx(similarity(one, other))


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_signatures_find_pairs_at_the_threshold_as_often_as_their_formula_says(threshold):
    bands = NearDuplicateSettings(threshold=threshold).bands()
    assert bands.number * bands.rows <= 128
    formula = 1 - (1 - threshold**bands.rows) ** bands.number
    assert formula >= 0.999
    hasher, draw = MinHasher(bands), np.random.default_rng(3)
    shared = round(2000 * threshold / (1 + threshold))  # J = s / (2000 - s) for two sets of 1,000
    found = 0
    for _ in range(100):
        values = np.unique(draw.integers(0, 2**63, 2000 - shared, dtype=np.uint64))
        one, other = values[:1000], values[-1000:]
        found += bool((hasher.band_keys(one) == hasher.band_keys(other)).any())
    assert found >= 98  # fewer than 98 of 100 have a probability below 2e-4 at 0.999


def test_the_share_of_equal_minima_is_the_similarity():
    hasher, draw = MinHasher(Bands(400, 1)), np.random.default_rng(4)
    for shared in (100, 500, 900):
        values = draw.integers(0, 2**63, 2000 - shared, dtype=np.uint64)
        agree = (hasher.band_keys(values[:1000]) == hasher.band_keys(values[-1000:])).mean()
        expected = shared / (2000 - shared)
        assert abs(agree - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)


def test_words_of_scripts_without_spaces_are_characters():
    assert WORDS_AND_MARKS.findall(normalized("東京は Ｔｏｋｙｏ 100%")) == ["東", "京", "は", "tokyo", "100", "%"]


def test_too_few_permutations_for_the_threshold_are_refused():
    with pytest.raises(InputError, match="17 are needed"):
        NearDuplicateSettings(threshold=0.35, permutations=16)
