"""Write `measures.json` of a step's folder: what the report shows about the rows that the step made."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.artifacts import MEASURES, write_json
from align.synth.measures.coverage import topic_coverage, topic_yield
from align.synth.measures.hashed_words import Vectors, hashed_words
from align.synth.measures.texts import distinct_n, self_bleu, words
from align.synth.measures.vectors import main_axes, mean_distance, nearest_distance, vendi_score

Row = Mapping[str, Any]
Embedder = Callable[[Sequence[str]], NDArray[np.floating[Any]]]

# Measures of diversity grow or fall with the size of a sample, so every family is measured on the same one: as large as
# the smallest family within these limits. A family below them is measured on all it has, and its size is reported.
MIN_ROWS, MAX_ROWS = 100, 500  # self-BLEU samples 500 (Zhu et al. 2018)
MIN_WORDS, MAX_WORDS = 2000, 10_000
ORDER = 2  # of distinct-n
MAX_EMBEDDED = 2000  # rows, of all families together; each has the same share
MAX_POINTS = 600  # on the map
BINS = 20  # of the histogram of rewards
NUM_EXAMPLES = 2  # of each family
MAX_ANCESTORS = 4  # of an example
MAX_CHARACTERS, MAX_TITLE = 1200, 100  # of a text in an example, and of a point on the map
NUM_TOPICS = 5  # with the lowest yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Yields:
    """What became of the rows that were asked for: asked = kept + Σ dropped, by family and by topic."""

    asked: Mapping[str, int] = field(default_factory=dict[str, int])  # family -> rows
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])  # -> reason -> rows
    topics: Mapping[str, int] = field(default_factory=dict[str, int])  # topic -> rows that were asked for


def write_measures(
    folder: Path,
    rows: Iterable[Row],
    *,
    yields: Yields = Yields(),  # noqa: B008 - frozen
    ancestors: Iterable[Row] = (),
    embedder: Embedder = hashed_words,
    embedding: str = "hashed words",
) -> Path:
    """Measure the kept rows of a step by family, write `measures.json` and return its path.

    A row has an `id`, a `family` and a `text`; optionally a `topic`, a `reward`, its `parents` (ids of rows or
    `ancestors`), an `ifd` and a `pass_rate`. `embedder` returns vectors of unit length, and `embedding` says
    in a few words what it is, such as `make_encoder(…).encode` and "hidden states of sft". Samples are
    chosen by a hash of the id, so they depend neither on the order of the rows nor on chance.
    """
    known = sorted(rows, key=_hash)
    others = sorted({row["family"] for row in known} - yields.asked.keys())
    families: dict[str, list[Row]] = {name: [] for name in (*yields.asked, *others)}
    for row in known:
        families[row["family"]].append(row)
    sample = _Sample(families)
    # The first rows of each family and of all rows, the same number of each
    chosen = {row["id"] for own in (*families.values(), known) for row in own[: sample.embedded]}
    embedded = [row for row in known if row["id"] in chosen]
    vectors = np.zeros((0, 1))
    if embedded:
        vectors = np.asarray(embedder([row["text"] for row in embedded]), np.float64)
    places = {row["id"]: place for place, row in enumerate(embedded)}

    def measured(name: str, own: Sequence[Row]) -> dict[str, Any]:
        inside = [vectors[places[row["id"]]] for row in own[: sample.embedded]]
        found = {"rows": len(own), "asked": yields.asked.get(name), "dropped": dict(yields.dropped.get(name, {}))}
        return {**found, **sample.of_texts(own), **_of_vectors(inside), **_of_numbers(own)}

    by_family = {name: measured(name, own) for name, own in families.items()}
    reasons = Counter[str]()
    for counts in yields.dropped.values():
        reasons.update(counts)
    everything = {**measured("", known), "asked": sum(yields.asked.values()) or None, "dropped": dict(reasons)}
    value = {
        "embedding": embedding,
        "sample": {"rows": sample.rows, "embedded": sample.embedded, "words": sample.words, "n": ORDER},
        "families": by_family,
        "all": everything,
        "topics": _topics(known, yields),
        "rewards": _histogram(families),
        "map": _map(embedded, vectors),
        "examples": _examples(families, {row["id"]: row for row in (*ancestors, *known)}),
    }
    write_json(folder / MEASURES, value, sort_keys=False)
    return folder / MEASURES


class _Sample:
    """The rows and words that every family is measured on."""

    def __init__(self, families: Mapping[str, Sequence[Row]]) -> None:
        num_words = (sum(len(words(row["text"])) for row in own) for own in families.values())
        self.rows = _smallest(map(len, families.values()), MIN_ROWS, MAX_ROWS)
        self.embedded = min(self.rows, MAX_EMBEDDED // max(1, sum(map(bool, families.values()))))
        self.words = _smallest(num_words, MIN_WORDS, MAX_WORDS)

    def of_texts(self, own: Sequence[Row]) -> dict[str, Any]:
        texts = [row["text"] for row in own]
        distinct = distinct_n(texts, n=ORDER, budget=self.words)
        sampled = texts[: self.rows]
        return {
            "distinct": distinct.value,
            "words": distinct.words,
            "self_bleu": self_bleu(sampled),
            "sampled": len(sampled),
            "mean_words": fmean(len(words(text)) for text in texts) if texts else None,
        }


def _smallest(sizes: Iterable[int], low: int, high: int) -> int:
    """Return the smallest of the sizes from `low` on, and at most `high`; `low` where all are smaller."""
    return min(high, min((size for size in sizes if size >= low), default=low))


def _of_vectors(inside: Sequence[Vectors]) -> dict[str, Any]:
    if len(inside) < 2:  # noqa: PLR2004 - a distance needs two
        return {"embedded": len(inside), "vendi": None, "mean_distance": None, "nearest_distance": None}
    vectors_ND = np.stack(inside)
    return {
        "embedded": len(inside),
        "vendi": vendi_score(vectors_ND),
        "mean_distance": mean_distance(vectors_ND),
        "nearest_distance": nearest_distance(vectors_ND),
    }


def _numbers(own: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in own if row.get(name) is not None]


def _of_numbers(own: Sequence[Row]) -> dict[str, Any]:
    """Return means of the numbers that rows have; None if no row has one."""
    rewards, difficulties, rates = (_numbers(own, name) for name in ("reward", "ifd", "pass_rate"))
    return {
        "rewarded": len(rewards),
        "reward_mean": fmean(rewards) if rewards else None,
        "reward_deviation": pstdev(rewards) if rewards else None,
        "ifd_mean": fmean(difficulties) if difficulties else None,
        "ifd_above_one": fmean(value > 1 for value in difficulties) if difficulties else None,
        "pass_rate_mean": fmean(rates) if rates else None,
        "pass_rate_between": fmean(0 < rate < 1 for rate in rates) if rates else None,
    }


def _topics(known: Sequence[Row], yields: Yields) -> dict[str, Any] | None:
    """Return coverage of the topics that rows were asked for, or that rows have; None without topics."""
    kept = [row["topic"] for row in known if row.get("topic") is not None]
    topics = {*yields.topics, *kept}
    if not topics:
        return None
    coverage = topic_coverage(topics, kept)
    lowest = list(topic_yield(yields.topics, kept).items())[:NUM_TOPICS]
    return {"num": len(topics), "covered": coverage.covered, "evenness": coverage.evenness, "lowest": lowest}


def _histogram(families: Mapping[str, Sequence[Row]]) -> dict[str, Any] | None:
    """Return the number of rewards of each family in bins that all families share; None without rewards."""
    rewards = {name: found for name, own in families.items() if (found := _numbers(own, "reward"))}
    if not rewards:
        return None
    everything = [reward for found in rewards.values() for reward in found]
    low, high = min(everything), max(everything)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    edges = np.linspace(low, high, BINS + 1)
    counts = {name: np.histogram(found, edges)[0].tolist() for name, found in rewards.items()}
    return {"edges": edges.tolist(), "counts": counts}


def _map(embedded: Sequence[Row], vectors: Vectors) -> dict[str, Any] | None:
    """Return the first rows as points in the plane of the main axes of all embedded rows; None for too few rows."""
    if len(embedded) < 3:  # noqa: PLR2004 - two points are always on a line
        return None
    axes = main_axes(vectors)
    points = [
        [row["family"], round(float(x), 5), round(float(y), 5), _cut(" ".join(row["text"].split()), MAX_TITLE)]
        for row, (x, y) in zip(embedded[:MAX_POINTS], axes.points_N2, strict=False)
    ]
    return {"explained": list(axes.explained), "rows": len(embedded), "points": points}


def _examples(families: Mapping[str, Sequence[Row]], by_id: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return the first rows of each family with their first parents, grandparents and so on."""
    found: list[dict[str, Any]] = []
    for own in families.values():
        for row in own[:NUM_EXAMPLES]:
            lineage = list[dict[str, Any]]()
            seen = {row["id"]}
            parent = _parent(row, by_id)
            while parent is not None and parent["id"] not in seen and len(lineage) < MAX_ANCESTORS:
                seen.add(parent["id"])
                lineage.append(_shown(parent))
                parent = _parent(parent, by_id)
            found.append({**_shown(row), "parents": len(row.get("parents") or ()), "lineage": lineage})
    return found


def _parent(row: Row, by_id: Mapping[str, Row]) -> Row | None:
    return next((by_id[name] for name in row.get("parents") or () if name in by_id), None)


def _shown(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "family": row["family"],
        "text": _cut(row["text"], MAX_CHARACTERS),
        "reward": row.get("reward"),
    }


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text) - length:,} more characters)"


def _hash(row: Row) -> str:
    return hashlib.sha256(str(row["id"]).encode("utf-8", "surrogatepass")).hexdigest()
