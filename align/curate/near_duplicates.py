"""Near-duplicates: candidates by MinHash and banding, verified by the Jaccard similarity of their n-grams.

Shapes: `U` texts, `B` bands, `R` permutations of a band, `S` n-grams of a text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.curate.ngrams import MULTIPLIER, Hashes, jaccard, mixed
from align.curate.settings import Bands

CHUNK = 512  # n-grams of a text that are permuted at once


class MinHasher:
    """MinHash signatures (Broder 1997), cut into bands; one 64-bit key a band."""

    def __init__(self, bands: Bands) -> None:
        self._bands = bands
        number = bands.number * bands.rows
        constants = _halves(mixed(np.arange(1, 2 * number + 1, dtype=np.uint64) * MULTIPLIER))
        self._factors_P = constants[:number, None] | np.uint32(1)
        self._offsets_P = constants[number:, None]

    def band_keys(self, ngrams_S: Hashes) -> Hashes:
        """Return the keys of a set of n-grams, shape [B]. Raise `ValueError` for an empty set."""
        halves_S = _halves(ngrams_S)
        minima_P = np.minimum.reduce(
            [
                (self._factors_P * halves_S[start : start + CHUNK] + self._offsets_P).min(axis=1)
                for start in range(0, len(halves_S), CHUNK)
            ]
        )
        minima_BR = minima_P.reshape(self._bands).astype(np.uint64)
        keys_B = np.zeros(self._bands.number, np.uint64)
        for row in range(self._bands.rows):
            keys_B = keys_B * MULTIPLIER + minima_BR[:, row]
        return mixed(keys_B)


def _halves(values: Hashes) -> NDArray[np.uint32]:
    """Return the upper halves: processors multiply several numbers of 32 bits at once, and not of 64."""
    return (values >> np.uint64(32)).astype(np.uint32)


class Match(NamedTuple):
    """The kept text that a dropped one resembles most, and their Jaccard similarity."""

    kept: int
    similarity: float


def near_duplicates(keys_UB: Hashes, ngrams: Callable[[int], Hashes], *, threshold: float) -> dict[int, Match]:
    """Return the texts that resemble a kept one before them by at least the threshold.

    Texts are numbered in the order in which they are preferred. A text is dropped only for a kept one, so that a chain
    of similar texts does not remove what differs from all that is kept. `ngrams` returns a text's n-grams, sorted.
    """
    kept_in: defaultdict[int, list[int]] = defaultdict(list)
    dropped: dict[int, Match] = {}
    for text, buckets in _shared_buckets(keys_UB):
        own = ngrams(text)
        candidates = sorted({other for bucket in buckets for other in kept_in[bucket]})
        matches = [Match(other, jaccard(own, ngrams(other))) for other in candidates]
        best = max(matches, key=lambda match: (match.similarity, -match.kept), default=None)
        if best is not None and best.similarity >= threshold:
            dropped[text] = best
            continue
        for bucket in buckets:
            kept_in[bucket].append(text)
    return dropped


def _shared_buckets(keys_UB: Hashes) -> Iterator[tuple[int, list[int]]]:
    """Yield each text that shares a key of a band with another, with the numbers of its shared (band, key) pairs."""
    num_texts, num_bands = keys_UB.shape
    texts: list[NDArray[np.int64]] = []
    buckets: list[NDArray[np.int64]] = []
    for band in range(num_bands):
        _, bucket_U, sizes = np.unique(keys_UB[:, band], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes[bucket_U] > 1)
        texts.append(shared)
        buckets.append(bucket_U[shared] + band * num_texts)
    text, bucket = np.concatenate(texts), np.concatenate(buckets)
    order = np.argsort(text, kind="stable")
    text, bucket = text[order], bucket[order]
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    for start, end in zip(starts, np.append(starts, len(text))[1:], strict=True):
        yield int(text[start]), bucket[start:end].tolist()
