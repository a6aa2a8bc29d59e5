"""Words of a text, and hashes of its n-grams."""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts without spaces between words; each of their characters counts as a word
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
WORDS_AND_MARKS = re.compile(rf"[{CJK}]|[^\W{CJK}]+|[^\w\s]")
ASCII_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]", re.ASCII)  # the same for such texts, and faster
EXPONENT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")  # superscript digits and signs
NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 / golden ratio (Knuth, TAOCP vol. 3, sec. 6.4)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64 (Steele et al. 2014)
MAX_VOCABULARY = 1 << 20  # words whose hashes are remembered


def normalized(text: str) -> str:
    """Return the text in Unicode form NFKC, in lower case, with single spaces.

    An exponent, of which NFKC would make a digit like all others, follows the mark ^.

    >>> normalized("  Ｈow   far is it?"), normalized("2²")
    ('how far is it?', '2^2')
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", EXPONENT.sub(r"^\g<0>", text))
    return " ".join(text.lower().split())


def mixed(values: Hashes) -> Hashes:
    """Return the values with their bits mixed by the bijection of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * MIX[0]
    values = (values ^ (values >> np.uint64(27))) * MIX[1]
    return values ^ (values >> np.uint64(31))


class WordHashes(dict[str, int]):
    """Hashes of words and marks, 64 bits each, equal in every process; those of words are odd."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_VOCABULARY:
            self.clear()
        value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found = value | 1 if WORDS.match(word) else value & ~1
        return found

    def of(self, text: str) -> Hashes:
        """Return the hash of each word and mark of a normalized text, uint64, shape [W]."""
        words = (ASCII_WORDS_AND_MARKS if text.isascii() else WORDS_AND_MARKS).findall(text)
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def only_words(hashes_W: Hashes) -> Hashes:
    """Return the hashes without those of marks."""
    return hashes_W[(hashes_W & np.uint64(1)).astype(np.bool_)]


def distinct(values: Hashes) -> Hashes:
    """Return the distinct values, sorted. `np.unique` hashes them first, which takes longer."""
    ordered = np.sort(values)
    return ordered[np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def ngram_hashes(words_W: Hashes, size: int) -> Hashes:
    """Return the hash of each n-gram of `size` words, shape [W - size + 1]; of fewer words, one hash of them all.

    The hash is a polynomial in the words modulo 2^64. A text without words has none.
    """
    if not len(words_W):
        return words_W
    width = min(size, len(words_W))
    number = len(words_W) - width + 1
    total = np.uint64(width * int(MULTIPLIER) ** width % 2**64) + _powers_sum(words_W, width)[:number]
    return mixed(total)


def _powers_sum(words_W: Hashes, width: int) -> Hashes:
    """Return the value of the polynomial of each n-gram of `width` words, shape [W - width + 1], from two halves."""
    if width == 1:
        return words_W
    half = width // 2
    halves = _powers_sum(words_W, half)
    number = len(words_W) - 2 * half + 1
    factor = np.uint64(int(MULTIPLIER) ** half % 2**64)
    total = halves[:number] * factor + halves[half : half + number]
    return total if width % 2 == 0 else total[:-1] * MULTIPLIER + words_W[width - 1 :]


def jaccard(first: Hashes, second: Hashes) -> float:
    """Return the Jaccard similarity of two sorted arrays of distinct values; 0 for two empty ones."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    total = len(first) + len(second) - shared
    return shared / total if total else 0.0
