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
        before = [kept[at : at + COLUMNS] for at in range(0, len(kept), COLUMNS)]
        parts = [_similar(unit_UD, block, others, threshold) for others in [*before, block]]
        texts, others, cosines = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((others, -cosines, texts))
        for text, other, cosine in zip(*(each[order].tolist() for each in (texts, others, cosines)), strict=True):
            if other >= text or text in found.duplicates or other in found.duplicates:
                continue
            if guards_U[text] == guards_U[other]:
                found.duplicates[text] = Match(other, cosine)
                found.other_tasks.pop(text, None)
            else:
                found.other_tasks.setdefault(text, Match(other, cosine))
        kept = np.append(kept, [text for text in block.tolist() if text not in found.duplicates])


def _similar(
    unit_UD: Vectors, texts: NDArray[np.int64], others: NDArray[np.int64], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], Vectors]:
    """Return the pairs of a text and another one whose cosine is at least the threshold, and the cosines."""
    cosines = unit_UD[texts] @ unit_UD[others].T
    row, column = np.nonzero(cosines >= threshold)
    return texts[row], others[column], cosines[row, column]


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
