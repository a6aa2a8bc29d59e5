"""Vectors of texts by their hashed words, where there is no encoder.

Shape legend: N texts, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from align.synth.measures.texts import words

Vectors: TypeAlias = NDArray[np.float64]
WIDTH = 1024  # of hashed words


def hashed_words(texts: Sequence[str], *, width: int = WIDTH) -> Vectors:
    """Return a vector of unit length for each text from its words and pairs of words, fp64 [N, `width`].

    Each is hashed to a place and a sign (Weinberger et al. 2009) and weighted with (1 + log count) · (1 + log((1 + N) /
    (1 + texts that have it))): texts with no word in common are nearly orthogonal. It captures no meaning.
    """
    grams = [Counter([*found, *zip(found, found[1:], strict=False)] or [""]) for found in map(words, texts)]
    num_texts = Counter(gram for counts in grams for gram in counts)
    places = {gram: _place(repr(gram), width) for gram in num_texts}
    vectors = np.zeros((len(texts), width))
    for row, counts in enumerate(grams):
        for gram, number in counts.items():
            place, sign = places[gram]
            weight = 1 + math.log((1 + len(texts)) / (1 + num_texts[gram]))
            vectors[row, place] += sign * (1 + math.log(number)) * weight
    return unit_length(vectors)


def _place(gram: str, width: int) -> tuple[int, int]:
    digest = int.from_bytes(hashlib.blake2b(gram.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return (digest >> 1) % width, 1 if digest & 1 else -1


def unit_length(vectors_ND: Vectors) -> Vectors:
    """Return the vectors divided by their lengths. A vector of length 0 stays as it is."""
    lengths = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(lengths == 0, 1, lengths)
