"""Copies of known texts: equal but for case, punctuation and white space, or nearly so by their shingles.

Texts with other numbers, operators, negations or quantifiers are different tasks, however similar they are.

The search is exact. Two sets with a Jaccard similarity of at least t share one of the first |s| - ceil(t·|s|) + 1
elements of each in a common order (prefix filtering, Chaudhuri et al. 2006), so only texts that do are compared.
"""

from __future__ import annotations

import math
from collections import defaultdict

from align.rewards.verifiers.same_task import TaskFeatures, task_features
from align.synth.parsing.lists import DUPLICATE, same

NEAR_DUPLICATE = "near duplicate"  # reason
SHINGLE_WORDS = 3
ROUNDING = 1e-9  # of t·|s|


class KnownTexts:
    """Texts that are known, and those of `before`, which is not changed."""

    def __init__(self, threshold: float, before: KnownTexts | None = None) -> None:
        self._threshold, self._before = threshold, before
        self._texts = set[str]()
        self._shingles = list[frozenset[str]]()
        self._features = list[TaskFeatures]()
        self._places = defaultdict[str, list[int]](list)  # shingle of a prefix -> the texts that have it there

    def add(self, text: str) -> None:
        """Add a text."""
        found = shingles(text)
        self._texts.add(same(text))
        for shingle in self._prefix(found):
            self._places[shingle].append(len(self._shingles))
        self._shingles.append(found)
        self._features.append(task_features(text))

    def reason(self, text: str) -> str:
        """Return why a text counts as a copy; empty if it does not."""
        if earlier := self._before.reason(text) if self._before else "":
            return earlier
        if same(text) in self._texts:
            return DUPLICATE
        found = shingles(text)
        near = {place for shingle in self._prefix(found) for place in self._places.get(shingle, ())}
        similar = [place for place in near if similarity(found, self._shingles[place]) >= self._threshold]
        features = task_features(text) if similar else None
        return NEAR_DUPLICATE if any(self._features[place] == features for place in similar) else ""

    def _prefix(self, found: frozenset[str]) -> list[str]:
        """Return the shingles of which a similar text has one."""
        return sorted(found)[: len(found) - math.ceil(self._threshold * len(found) - ROUNDING) + 1]


def shingles(text: str) -> frozenset[str]:
    """Return all runs of three words; a shorter text is one.

    >>> sorted(shingles("Add two numbers, please!"))
    ['add two numbers', 'two numbers please']
    """
    words = same(text).split()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in starts)


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the Jaccard similarity of two sets that are not both empty."""
    return len(one & other) / len(one | other)
