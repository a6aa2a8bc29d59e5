"""How well made data cover their topics, and how many of the wanted rows each topic kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Coverage(NamedTuple):
    """How evenly rows are spread over a list of topics."""

    covered: float  # share of the topics with enough rows
    evenness: float | None  # entropy of the rows over the topics, divided by its maximum; None for a single topic


def topic_coverage(topics: Iterable[str], kept: Iterable[str], *, at_least: int = 1) -> Coverage:
    """Return the share of the topics with `at_least` kept rows, and how evenly the rows are spread.

    `kept` is the topic of each row. Raise `ValueError` for a topic that is not in the list.

    >>> topic_coverage(["art", "law", "food", "war"], ["art", "art", "law", "law"], at_least=2)
    Coverage(covered=0.5, evenness=0.5)
    """
    known = set(topics)
    counts = Counter(kept)
    if not known or counts.keys() - known:
        raise ValueError(f"rows have topics that are not in the list: {sorted(counts.keys() - known)}")
    covered = sum(counts[topic] >= at_least for topic in known) / len(known)
    if len(known) == 1:
        return Coverage(covered, None)
    shares = [number / counts.total() for number in counts.values()]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    return Coverage(covered, abs(entropy) / math.log(len(known)))


def topic_yield(asked: Mapping[str, int], kept: Iterable[str]) -> dict[str, float]:
    """Return the share of the wanted rows of each topic that were kept, the lowest first.

    >>> topic_yield({"art": 4, "law": 2}, ["art", "law", "law"])
    {'art': 0.25, 'law': 1.0}
    """
    counts = Counter(kept)
    found = {topic: counts[topic] / number for topic, number in asked.items() if number}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))
