"""Diversity of texts by their words: distinct-n and self-BLEU."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

WORD = re.compile(r"\w+|[^\w\s]")
BLEU_ORDER = 4  # Papineni et al. 2002
EPSILON = 0.1  # count of an order without a match; method 1 of Chen and Cherry 2014, and NLTK's default for it

Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text in small letters.

    >>> words("Don't stop.")
    ['don', "'", 't', 'stop', '.']
    """
    return WORD.findall(text.lower())


class Distinct(NamedTuple):
    """The share of n-grams that are different from each other, and the words that were looked at."""

    value: float | None  # None without an n-gram
    words: int


def distinct_n(texts: Sequence[str], *, n: int, budget: int) -> Distinct:
    """Return the number of different n-grams divided by all n-grams, in the first `budget` words of the texts.

    The share falls with the number of words, so only values with the same budget can be compared; Li et al. 2016. No
    n-gram reaches over the end of a text.
    """
    grams: Counter[Gram] = Counter()
    used = 0
    for text in texts:
        found = words(text)[: budget - used]
        used += len(found)
        grams.update(_grams(found, n))
        if used >= budget:
            break
    total = grams.total()
    return Distinct(len(grams) / total if total else None, used)


def self_bleu(texts: Sequence[str]) -> float | None:
    """Return the mean BLEU-4 of each text with all others as references, from 0 to 1; 1 if all texts are the same.

    Zhu et al. 2018 (Texygen), smoothed by EPSILON as there. It grows with the number of texts, so only samples of one
    size can be compared. None for fewer than two texts. Time and memory grow with the number of words: for every n-gram
    its largest count in any text, and the second largest for the text that has the largest one, are enough.
    """
    split = [words(text) for text in texts]
    if len(split) < 2:  # noqa: PLR2004 - a text needs another one
        return None
    precisions = zip(*(_precisions(split, n) for n in range(1, BLEU_ORDER + 1)), strict=True)
    lengths = sorted(map(len, split))
    return fmean(
        _brevity(len(found), lengths) * math.exp(fmean(map(math.log, orders))) if found and orders[0] > 0 else 0.0
        for found, orders in zip(split, precisions, strict=True)
    )


def _grams(found: Sequence[str], n: int) -> Iterator[Gram]:
    return (tuple(found[start : start + n]) for start in range(len(found) - n + 1))


def _precisions(split: Sequence[Sequence[str]], n: int) -> Iterator[float]:
    """Yield the clipped precision of each text; 0 for words that no other text has, which makes its BLEU 0."""
    counts = [Counter(_grams(found, n)) for found in split]
    best: dict[Gram, tuple[int, int]] = {}  # n-gram -> largest and second largest count in one text
    for one in counts:
        for gram, number in one.items():
            largest, second = best.get(gram, (0, 0))
            best[gram] = (max(largest, number), max(second, min(largest, number)))
    for one in counts:
        # The largest count among the others is the second largest of all for a text that has the largest
        matched = sum(min(number, _of_others(best[gram], number)) for gram, number in one.items())
        total = max(1, one.total())
        yield matched / total if matched or n == 1 else EPSILON / total


def _of_others(best: tuple[int, int], own: int) -> int:
    largest, second = best
    return second if own == largest else largest


def _brevity(length: int, lengths: Sequence[int]) -> float:
    """Return BLEU's brevity penalty with the other text whose length is the closest; the shorter of two."""
    place = bisect_left(lengths, length)  # of the text itself, or of another one as long
    if place + 1 < len(lengths) and lengths[place + 1] == length:
        return 1.0
    shorter = lengths[place - 1] if place else None
    longer = lengths[place + 1] if place + 1 < len(lengths) else None
    if shorter is not None and (longer is None or length - shorter <= longer - length):
        return 1.0
    assert longer is not None, "there are at least two texts"
    return math.exp(1 - longer / length)
