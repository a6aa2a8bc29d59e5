"""What curation computes of each row alone, in several processes."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import NamedTuple

import numpy as np

from align.curate.contamination import ContaminationIndex, Hit
from align.curate.near_duplicates import MinHasher
from align.curate.ngrams import Hashes, WordHashes, distinct, ngram_hashes, normalized
from align.curate.row_keys import row_keys
from align.curate.settings import CurationSettings
from align.data.readers.native import native_record
from align.errors import RunError

ROWS_ALONE = 10_000  # computed in this process, before others are started
CHUNK = 250  # rows that a process is given at once


class SourceLine(NamedTuple):
    """A row in its native form, as JSON."""

    source: str
    line: str


class RowAnalysis(NamedTuple):
    """The keys, MinHash and test items of a row."""

    source: str
    rank: tuple[float, int, bytes]
    exact: bytes
    prompt: bytes | None
    hit: Hit | None  # the test item that the row is dropped for
    text: bytes | None = None  # key of the compared text; None without words, and where texts are not compared
    guard: int = 0  # equal where two texts may be duplicates by their meaning
    bands_B: Hashes | None = None  # keys of the text's bands


class Analyzer:
    """Computes the keys of rows, their MinHash and their test items."""

    def __init__(self, settings: CurationSettings, index: ContaminationIndex | None) -> None:
        self._rule, self._near = settings.decontamination, settings.near_duplicates
        self._index = index if self._rule is not None else None
        self._is_compared = self._near is not None or settings.semantic_duplicates is not None
        self._hasher = None if self._near is None else MinHasher(self._near.bands())
        self._words = WordHashes()

    def __call__(self, row: SourceLine) -> RowAnalysis:
        """Return the analysis of a row."""
        record = native_record(json.loads(row.line))
        keys = row_keys(record, row.source, row.line, with_task=self._is_compared)
        fields = [self._words.of(field) for field in keys.fields]
        found = RowAnalysis(row.source, keys.rank, keys.exact, keys.prompt, self._hit(keys.fields[0], fields))
        words_W = np.concatenate(fields[: keys.num_compared])
        if not self._is_compared or found.hit is not None or not len(words_W):
            return found
        found = found._replace(text=keys.text, guard=keys.guard ^ keys.task)
        if self._near is None or self._hasher is None:
            return found
        guard = found.guard if self._near.same_task else keys.guard
        keys_B = self._hasher.band_keys(distinct(ngram_hashes(words_W, self._near.ngram)))
        return found._replace(bands_B=keys_B ^ np.uint64(guard))

    def ngrams(self, text: str) -> Hashes:
        """Return the distinct n-grams of a text, sorted."""
        assert self._near is not None
        return distinct(ngram_hashes(self._words.of(normalized(text)), self._near.ngram))

    def _hit(self, prompt: str, fields: Sequence[Hashes]) -> Hit | None:
        if self._index is None or self._rule is None:
            return None
        hit = self._index.find_words(prompt, fields)
        return hit if hit is not None and (hit.is_equal or hit.coverage > self._rule.threshold) else None


def analyses(rows: Iterable[SourceLine], analyzer: Analyzer, *, num_workers: int) -> Iterator[RowAnalysis]:
    """Yield the analysis of each row, in order; the first ones by this process, as others take a second to start.

    Raise `RunError` for a process that was killed.
    """
    stream = iter(rows)
    yield from map(analyzer, islice(stream, None if num_workers < 2 else ROWS_ALONE))
    if (first := next(stream, None)) is None:
        return
    stream = chain([first], stream)
    waiting: deque[Future[list[RowAnalysis]]] = deque()
    try:
        with ProcessPoolExecutor(num_workers, get_context("spawn"), _start, (analyzer,)) as pool:
            while chunk := list(islice(stream, CHUNK)):
                waiting.append(pool.submit(_analyze, chunk))
                if len(waiting) > 2 * num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError("a process that curates rows was killed, perhaps for its memory; rerun the step") from error


_worker: list[Analyzer] = []  # of this process, where it is a worker


def _start(analyzer: Analyzer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(analyzer)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; its queue stays open, as all workers can write to it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _analyze(rows: Sequence[SourceLine]) -> list[RowAnalysis]:
    return list(map(_worker[0], rows))
