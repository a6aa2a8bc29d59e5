"""Curation: test items out, equal rows to one, equal prompts to one group, near-duplicates out, the best rows kept.

The result depends on the set of rows only: not on their order, their files or the number of processes.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from align.curate.analysis import Analyzer, RowAnalysis, SourceLine, analyses
from align.curate.contamination import PROMPT, Hit, TestItem
from align.curate.groups import is_tie, merge
from align.curate.near_duplicates import Match, near_duplicates
from align.curate.neighbours import Confirm, nearest_pairs, same_features
from align.curate.ngrams import Hashes
from align.curate.row_keys import compared_text, joined, prompt_messages
from align.curate.semantic import Vectors, semantic_duplicates
from align.curate.settings import READ, CurationSettings
from align.data.spool import Spool
from align.data.writing import native_line
from align.records import Comparison, Record

CACHED_TEXTS = 1 << 14  # whose n-grams are kept while near-duplicates are verified

CONTAMINATED, EXACT, NEAR, SEMANTIC = "test items", "exact duplicates", "near-duplicates", "semantic duplicates"
NO_SIGNAL, BELOW = "groups without a reward difference", "below the kept share"
OTHER_TASK = "other task"  # of a row that resembles another one and is no duplicate
NO_TEXT = -1  # of a row that is compared with none

Groups = dict[int, list[int]]  # rows that become one row of the result, by the first of them
Encode = Callable[[Sequence[str]], Vectors]  # texts -> one vector for each, fp32 [N, D]


class Ranking(NamedTuple):
    """The scores of records, and those that have a place in the order, best first."""

    scores: Sequence[float | None]
    order: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What a curation asks models for; what the settings do not ask for is left out."""

    encode: Encode | None = None  # of semantic duplicates
    encode_tests: Encode | None = None  # of rows and test items
    confirm: Confirm = same_features
    rank: Callable[[Sequence[Record]], Ranking] | None = None


class Removal(NamedTuple):
    """A dropped row, with the kept row or the test item that it repeats and their similarity, or with its score."""

    reason: str
    row: int
    similarity: float | None
    other: int | TestItem | None


class Place(NamedTuple):
    """What is kept in memory of a row: where it comes from, its keys, and the number of its compared text."""

    source: str
    rank: tuple[float, int, bytes]
    exact: bytes
    prompt: bytes | None
    text: int

    @property
    def id(self) -> str:
        """Content hash of the row and its source, 32 hex digits."""
        return self.rank[-1].hex()


@dataclass(slots=True)
class Curation:
    """The rows of a step, and what became of them."""

    settings: CurationSettings
    analyzer: Analyzer
    spool: Spool
    places: list[Place] = field(default_factory=list[Place])
    counts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by source
    removals: list[Removal] = field(default_factory=list[Removal])
    similar: list[Removal] = field(default_factory=list[Removal])  # rows that are kept and resemble another one
    scores: dict[int, float | None] = field(default_factory=dict[int, float | None])  # of the first rows of groups
    unclear_neighbours: int = 0  # pairs of a test item and a row on which the judge gives no clear answer
    _bands: bytearray = field(default_factory=bytearray)  # keys of each text's bands, one text after another
    _guards: array[int] = field(default_factory=lambda: array("Q"))  # of each text

    def read(self, rows: Iterable[tuple[str, Record]], *, num_workers: int) -> list[int]:
        """Spool the rows; return those without test items."""
        texts: dict[bytes, int] = {}
        clean: list[int] = []
        for row, found in enumerate(analyses(self._spooled(rows), self.analyzer, num_workers=num_workers)):
            text = NO_TEXT if found.text is None else texts.setdefault(found.text, len(texts))
            if text == len(self._guards):
                self._add_text(found)
            self.places.append(Place(found.source, found.rank, found.exact, found.prompt, text))
            if found.hit is None:
                clean.append(row)
            else:
                self.remove_contaminated(row, "equal prompt" if found.hit.is_equal else "n-grams", found.hit)
        return clean

    def _spooled(self, rows: Iterable[tuple[str, Record]]) -> Iterator[SourceLine]:
        for source, record in rows:
            line = native_line(record, Path("rows.jsonl"))
            self.spool.add(line)
            self.counts[source][READ] += 1
            yield SourceLine(source, line)

    def _add_text(self, found: RowAnalysis) -> None:
        self._guards.append(found.guard)
        if found.bands_B is not None:
            self._bands += found.bands_B.tobytes()

    def remove_contaminated(self, row: int, how: str, hit: Hit) -> None:
        """Drop a row that repeats a test item."""
        self.counts[self.places[row].source][CONTAMINATED] += 1
        self.removals.append(Removal(f"{CONTAMINATED}: {how}", row, hit.coverage, hit.item))

    def without_equal(self, rows: Iterable[int]) -> list[int]:
        """Return the rows in the order of preference, the first of each set of equal ones."""
        order = sorted(rows, key=lambda row: self.places[row].rank)
        if not self.settings.exact_duplicates:
            return order
        first: dict[bytes, int] = {}
        kept: list[int] = []
        for row in order:
            other = first.setdefault(self.places[row].exact, row)
            if other == row:
                kept.append(row)
            else:
                self._remove(row, EXACT, 1.0, other)
        return kept

    def groups(self, rows: Iterable[int]) -> Groups:
        """Return the rows that become one row of the result, by the first of them, in the order of preference."""
        first: dict[bytes, int] = {}
        found: Groups = {}
        for row in rows:
            prompt = self.places[row].prompt if self.settings.merge_prompts else None
            leader = row if prompt is None else first.setdefault(prompt, row)
            found.setdefault(leader, []).append(row)
        return found

    def without_similar(self, groups: Groups) -> Groups:
        """Return the groups whose text does not share most n-grams with that of a preferred one."""
        near = self.settings.near_duplicates
        rows = self._first_rows(groups)
        if near is None or not rows:
            return groups
        bands_TB = np.frombuffer(self._bands, np.uint64).reshape(len(self._guards), -1)

        @lru_cache(maxsize=CACHED_TEXTS)
        def ngrams(number: int) -> Hashes:
            return self.analyzer.ngrams(compared_text(self.spool.record(rows[number])))

        keys_UB = bands_TB[[self.places[row].text for row in rows]]
        return self._without(groups, rows, near_duplicates(keys_UB, ngrams, threshold=near.threshold), NEAR)

    def without_same_meaning(self, groups: Groups, encode: Encode) -> Groups:
        """Return the groups without those whose text has the meaning of that of a preferred one, where that is asked.

        Rows that resemble another one and are kept are added to `similar`.
        """
        rule = self.settings.semantic_duplicates
        rows = self._first_rows(groups)
        if rule is None or not rows:
            return groups
        vectors = encode([compared_text(self.spool.record(row)) for row in rows])
        guards = np.array([self._guards[self.places[row].text] for row in rows], np.uint64)
        found = semantic_duplicates(
            vectors, guards, threshold=rule.threshold, num_clusters=rule.clusters, seed=rule.seed
        )
        for number, match in found.other_tasks.items():
            self.similar.append(Removal(OTHER_TASK, rows[number], match.similarity, rows[match.kept]))
        if rule.action == "remove":
            return self._without(groups, rows, found.duplicates, SEMANTIC)
        for number, match in found.duplicates.items():
            self.similar.append(Removal(SEMANTIC, rows[number], match.similarity, rows[match.kept]))
        return groups

    def without_neighbours(self, groups: Groups, items: Sequence[TestItem], models: Models) -> Groups:
        """Return the groups without those whose prompt is confirmed to be a test prompt in other words."""
        rule = self.settings.neighbours
        tests = [item for item in items if item.part == PROMPT]
        leaders = list(groups)
        if rule is None or models.encode_tests is None or not tests or not leaders:
            return groups
        with_prompt: dict[str, list[int]] = {}  # rows of one prompt count as one of the nearest
        for leader in leaders:
            with_prompt.setdefault(joined(prompt_messages(self.spool.record(leader))), []).append(leader)
        prompts = list(with_prompt)
        vectors = models.encode_tests([*(item.text for item in tests), *prompts])
        pairs = nearest_pairs(
            vectors[: len(tests)], vectors[len(tests) :], number=rule.nearest, threshold=rule.threshold
        )
        answers = models.confirm([(tests[pair.item].text, prompts[pair.row]) for pair in pairs]) if pairs else []
        self.unclear_neighbours = sum(answer is None for answer in answers)
        hits: dict[int, Hit] = {}
        for pair, answer in sorted(zip(pairs, answers, strict=True), key=lambda each: -each[0].cosine):
            for leader in with_prompt[prompts[pair.row]] if answer else ():
                hits.setdefault(leader, Hit(pair.cosine, tests[pair.item], is_equal=False))
        for leader, hit in hits.items():
            for row in groups[leader]:
                self.remove_contaminated(row, "neighbours", hit)
        return {leader: rows for leader, rows in groups.items() if leader not in hits}

    def with_signal(self, groups: Groups) -> Groups:
        """Return the groups without those whose responses all have one reward, where that is asked."""
        rule = self.settings.groups
        if rule is None or not rule.drop_ties:
            return groups
        return self._kept({leader: not is_tie(self.record(rows)) for leader, rows in groups.items()}, groups, NO_SIGNAL)

    def best(self, groups: Groups, models: Models) -> Groups:
        """Return the groups with the best ranks, where that is asked; `scores` has the scores of all."""
        rule = self.settings.rank
        if rule is None or models.rank is None or not groups:
            return groups
        leaders = sorted(groups, key=lambda row: self.places[row].rank)
        scores, order = models.rank([self.record(groups[leader]) for leader in leaders])
        self.scores = dict(zip(leaders, scores, strict=True))
        if rule.keep is None:
            return groups
        kept = {leaders[at] for at in order[: max(1, round(rule.keep * len(leaders)))]}
        return self._kept({leader: leader in kept for leader in groups}, groups, BELOW)

    def record(self, rows: Sequence[int]) -> Record:
        """Return a row of the result: the merged group of several rows."""
        records = [self.spool.record(row) for row in rows]
        return records[0] if len(rows) == 1 else merge([each for each in records if isinstance(each, Comparison)])

    def _kept(self, is_kept: dict[int, bool], groups: Groups, reason: str) -> Groups:
        for leader, rows in groups.items():
            for row in () if is_kept[leader] else rows:
                self._remove(row, reason, self.scores.get(leader), None)
        return {leader: rows for leader, rows in groups.items() if is_kept[leader]}

    def _first_rows(self, groups: Groups) -> list[int]:
        """Return the first row with each text that is compared, in the order of preference."""
        first: dict[int, int] = {}
        for leader in groups:
            first.setdefault(self.places[leader].text, leader)
        first.pop(NO_TEXT, None)
        return list(first.values())

    def _without(self, groups: Groups, rows: Sequence[int], dropped: dict[int, Match], reason: str) -> Groups:
        """Return the groups without those that have one of the dropped texts; texts are numbered as `rows`."""
        matches = {self.places[rows[number]].text: match for number, match in dropped.items()}
        kept: Groups = {}
        for leader, members in groups.items():
            match = matches.get(self.places[leader].text)
            if match is None:
                kept[leader] = members
                continue
            for row in members:
                self._remove(row, reason, match.similarity, rows[match.kept])
        return kept

    def _remove(self, row: int, reason: str, similarity: float | None, other: int | None) -> None:
        self.counts[self.places[row].source][reason] += 1
        self.removals.append(Removal(reason, row, similarity, other))
