"""Semantic duplicates: texts with similar embeddings that ask for one task.

A high cosine alone is no duplicate: a question and its negation, or one problem with two numbers, have one over 0.9. A
text is a duplicate only of one with the same guard, a hash of what must be equal (`RowKeys`).

Shapes: `U` texts in the order of preference, `D` width, `C` clusters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.curate.near_duplicates import Match
from align.curate.ngrams import Hashes

Vectors = NDArray[np.float32]

MAX_EXACT = 200_000  # texts of which all pairs are compared: 2 U^2 D operations
TEXTS_PER_CLUSTER = 20_000  # on average, of more texts
ROWS, COLUMNS = 512, 16_384  # of the products that are computed at once
ITERATIONS, SAMPLES_PER_CLUSTER = 20, 256  # of k-means; faiss has these defaults for the samples


class SemanticDuplicates(NamedTuple):
    """Texts that resemble a kept one before them."""

    duplicates: dict[int, Match]
    other_tasks: dict[int, Match]  # not duplicates: the guard of the kept text that they resemble most is another one


def semantic_duplicates(
    vectors_UD: Vectors, guards_U: Hashes, *, threshold: float, num_clusters: int | None, seed: int
) -> SemanticDuplicates:
    """Return the texts whose cosine to a kept one before them is at least the threshold.

    Texts are numbered in the order in which they are preferred, and a text is compared with kept ones only: a chain of
    similar texts does not remove what differs from all that is kept. Up to 200,000 texts all pairs are compared, with
    more, or with `num_clusters`, those within a cluster of k-means (SemDeDup, Abbas et al. 2023, sec. 3).
    """
    unit_UD = unit_length(vectors_UD)
    if num_clusters is None and len(unit_UD) > MAX_EXACT:
        num_clusters = math.ceil(len(unit_UD) / TEXTS_PER_CLUSTER)
    found = SemanticDuplicates({}, {})
    labels_U = np.zeros(len(unit_UD), np.int64) if num_clusters is None else clusters(unit_UD, num_clusters, seed=seed)
    order = np.argsort(labels_U, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels_U[order])) + 1):
        _compare(unit_UD, guards_U, members, threshold, found)
    return found


def unit_length(vectors_UD: Vectors) -> Vectors:
    """Return the vectors divided by their lengths, fp32. A vector of length 0 stays as it is."""
    lengths = np.linalg.norm(vectors_UD, axis=1, keepdims=True)
    return (vectors_UD / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _compare(
    unit_UD: Vectors, guards_U: Hashes, members: NDArray[np.int64], threshold: float, found: SemanticDuplicates
) -> None:
    """Compare each of the members, in their order, with the kept ones before it."""
    kept = np.empty(0, np.int64)
    for start in range(0, len(members), ROWS):
        block = members[start : start + ROWS]
        same, other = _Nearest(len(block)), _Nearest(len(block))
        for at in range(0, len(kept), COLUMNS):
            before = kept[at : at + COLUMNS]
            cosines = unit_UD[block] @ unit_UD[before].T
            is_same = guards_U[block][:, None] == guards_U[before]
            same.update(before, cosines, is_same)
            other.update(before, cosines, ~is_same)
        cosines = unit_UD[block] @ unit_UD[block].T
        is_same = guards_U[block][:, None] == guards_U[block]
        is_kept = np.zeros(len(block), np.bool_)
        for place, text in enumerate(block.tolist()):
            before = block[:place][is_kept[:place]]
            row_1N = cosines[place, :place][None, is_kept[:place]]
            is_same_1N = is_same[place, :place][None, is_kept[:place]]
            same.update(before, row_1N, is_same_1N, place)
            other.update(before, row_1N, ~is_same_1N, place)
            if same.cosines[place] >= threshold:
                found.duplicates[text] = same.match(place)
                continue
            is_kept[place] = True
            if other.cosines[place] >= threshold:
                found.other_tasks[text] = other.match(place)
        kept = np.append(kept, block[is_kept])


class _Nearest:
    """For each of B texts the one that resembles it most: with the highest cosine, the first one of equals."""

    def __init__(self, number: int) -> None:
        self.texts = np.zeros(number, np.int64)
        self.cosines = np.full(number, -np.inf, np.float32)

    def update(
        self, texts_N: NDArray[np.int64], cosines_BN: Vectors, counts_BN: NDArray[np.bool_], start: int = 0
    ) -> None:
        """Take those of N later texts into account that count, for the texts from `start` on."""
        if len(texts_N) == 0:
            return
        cosines_BN = np.where(counts_BN, cosines_BN, -np.inf)
        best = cosines_BN.argmax(axis=1)
        highest = cosines_BN[np.arange(len(best)), best]
        mine = slice(start, start + len(best))
        is_higher = highest > self.cosines[mine]
        self.texts[mine] = np.where(is_higher, texts_N[best], self.texts[mine])
        self.cosines[mine] = np.where(is_higher, highest, self.cosines[mine])

    def match(self, place: int) -> Match:
        """Return the nearest text of one text."""
        return Match(int(self.texts[place]), float(self.cosines[place]))


def clusters(unit_UD: Vectors, number: int, *, seed: int) -> NDArray[np.int64]:
    """Return the cluster of each vector: spherical k-means on unit vectors, fitted on at most 256 vectors a cluster.

    It starts from vectors drawn at random; a cluster without vectors keeps its centre.
    """
    draw = np.random.default_rng(seed)
    number = min(number, len(unit_UD))
    sample_SD = unit_UD[np.sort(draw.permutation(len(unit_UD))[: number * SAMPLES_PER_CLUSTER])]
    centres_CD = sample_SD[draw.permutation(len(sample_SD))[:number]]
    for _ in range(ITERATIONS):
        labels = _nearest(sample_SD, centres_CD)
        sums_CD = np.zeros_like(centres_CD)
        np.add.at(sums_CD, labels, sample_SD)
        updated_CD = unit_length(np.where(np.any(sums_CD, axis=1, keepdims=True), sums_CD, centres_CD))
        if np.array_equal(updated_CD, centres_CD):
            break
        centres_CD = updated_CD
    return _nearest(unit_UD, centres_CD)


def _nearest(unit_UD: Vectors, centres_CD: Vectors) -> NDArray[np.int64]:
    parts = [unit_UD[start : start + COLUMNS] @ centres_CD.T for start in range(0, len(unit_UD), COLUMNS)]
    return np.concatenate([part.argmax(axis=1) for part in parts])
