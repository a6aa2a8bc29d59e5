"""Test items among the rows: equal prompts, and the share of an item that n-grams of one row cover.

The index holds every n-gram of every test item, so nothing is missed that the rule finds (the rule of Tülu 3, Lambert
et al. 2024, with an index that is complete in place of a search engine).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.curate.ngrams import Hashes, WordHashes, ngram_hashes, normalized, only_words

MAX_ITEMS = 10  # items that an n-gram may be in; one in more is part of a template, and does not count
PROMPT, ANSWER = "prompt", "answer"
FILTER_BITS = range(10, 25)  # of the number of places of the filter; at least 16 places for each n-gram


@dataclass(frozen=True, slots=True)
class TestItem:
    """A prompt of a test set, or an answer to one."""

    __test__ = False  # for pytest

    source: str
    part: str  # PROMPT or ANSWER
    text: str


class Hit(NamedTuple):
    """The test item that a row contains most of, and how much."""

    coverage: float  # share of the item's words that do not belong to a template; 1 for an equal prompt
    item: TestItem
    is_equal: bool  # the row's prompt is the item's


@dataclass(slots=True)
class ContaminationIndex:
    """All n-grams of test items, by hash."""

    items: list[TestItem]
    ngram: int
    _words: WordHashes = field(default_factory=WordHashes)
    _equal: dict[str, TestItem] = field(default_factory=dict[str, TestItem])
    _hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))  # sorted, distinct
    _first: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # of each hash among the postings
    _filter: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, np.bool_))  # lower bits that a hash has
    _item: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # of each posting
    _start: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # word at which it begins
    _counted: list[NDArray[np.bool_]] = field(default_factory=list[NDArray[np.bool_]])  # words of each item that count

    @classmethod
    def of(cls, items: Iterable[TestItem], ngram: int) -> ContaminationIndex:
        """Return the index of the items. Answers shorter than an n-gram are left out: they are equal by chance."""
        words = WordHashes()
        unique = sorted(set(items), key=lambda item: (item.source, item.part, item.text))
        hashed = [(item, only_words(words.of(normalized(item.text)))) for item in unique]
        used = [(item, found) for item, found in hashed if item.part == PROMPT or len(found) >= ngram]
        index = cls([item for item, _ in used], ngram, words)
        for item, _ in reversed(used):
            if item.part == PROMPT:
                index._equal[normalized(item.text)] = item
        index._post([found for _, found in used])
        return index

    def _post(self, words: Sequence[Hashes]) -> None:
        """Build the postings of the items, given their words."""
        if not words:
            return
        grams = [ngram_hashes(each, self.ngram) for each in words]
        hashes = np.concatenate(grams)
        item = np.repeat(np.arange(len(grams)), [len(each) for each in grams])
        start = np.concatenate([np.arange(len(each)) for each in grams])
        order = np.argsort(hashes, kind="stable")
        hashes, item, start = hashes[order], item[order], start[order]
        _, which = np.unique(hashes, return_inverse=True)
        is_new_item = np.r_[True, (which[1:] != which[:-1]) | (item[1:] != item[:-1])] if len(which) else which > 0
        is_kept = np.bincount(which, is_new_item)[which] <= MAX_ITEMS
        self._item, self._start = item[is_kept], start[is_kept]
        self._hashes, self._first = np.unique(hashes[is_kept], return_index=True)
        self._first = np.append(self._first, len(self._item))
        bits = next((bits for bits in FILTER_BITS if 1 << bits >= 16 * len(self._hashes)), FILTER_BITS[-1])
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[self._places(self._hashes)] = True
        self._counted = [np.zeros(len(each), np.bool_) for each in words]
        for posting, word in zip(self._item.tolist(), self._start.tolist(), strict=True):
            self._counted[posting][word : word + self.ngram] = True

    def find(self, prompt: str, responses: Sequence[str]) -> Hit | None:
        """Return the item that a row contains most of; None if it shares no n-gram with any.

        A test prompt shorter than an n-gram is found where it is the whole prompt of the row.
        """
        texts = [normalized(text) for text in (prompt, *responses)]
        return self.find_words(texts[0], [self._words.of(text) for text in texts])

    def find_words(self, prompt: str, fields: Sequence[Hashes]) -> Hit | None:
        """Return what `find` does, for a normalized prompt, and the hashed words and marks of prompt and responses."""
        if (equal := self._equal.get(prompt)) is not None:
            return Hit(1.0, equal, is_equal=True)
        covered: dict[int, NDArray[np.bool_]] = {}
        for number, found in enumerate(fields):
            words = only_words(found)
            if not number or len(words) >= self.ngram:
                self._cover(ngram_hashes(words, self.ngram), covered)
        shares = ((item, float(found.sum() / self._counted[item].sum())) for item, found in covered.items())
        best = max(shares, key=lambda share: (share[1], -share[0]), default=None)
        return None if best is None else Hit(best[1], self.items[best[0]], is_equal=False)

    def _places(self, hashes: Hashes) -> NDArray[np.int64]:
        """Return the place of each hash in the filter."""
        return (hashes & np.uint64(len(self._filter) - 1)).astype(np.int64)

    def _cover(self, hashes: Hashes, covered: dict[int, NDArray[np.bool_]]) -> None:
        """Mark the words of each item that the n-grams cover."""
        hashes = hashes[self._filter[self._places(hashes)]]
        if not len(hashes):
            return
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        for found in np.unique(at[self._hashes[at] == hashes]).tolist():
            for posting in range(self._first[found], self._first[found + 1]):
                item, start = int(self._item[posting]), int(self._start[posting])
                mask = covered.setdefault(item, np.zeros(len(self._counted[item]), np.bool_))
                mask[start : start + self.ngram] = True
