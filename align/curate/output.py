"""Files and counts of a curation: the cleaned rows, the removed ones, and the similar ones that are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.artifacts import atomic_file
from align.curate.analysis import Analyzer
from align.curate.contamination import ContaminationIndex, TestItem
from align.curate.curation import OTHER_TASK, Curation, Groups, Models, Removal
from align.curate.groups import chosen_responses
from align.curate.row_keys import joined, prompt_messages, response_texts
from align.curate.settings import KEPT, MERGED, CurationSettings
from align.data.spool import Spool
from align.data.writing import native_line
from align.records import Record
from align.rewards.verifiers.same_task import difference, task_features

ROWS_FILE = "rows.jsonl"
REMOVED_FILE = "removed.jsonl"
SIMILAR_FILE = "similar.jsonl"
SPOOL_FILE = ".spool.jsonl"
NO_MODELS = Models()
CURATED = "curated"  # key of an output row's metadata: its id, its source, and the ids of the rows in its group


def curate(
    rows: Iterable[tuple[str, Record]],
    index: ContaminationIndex | None,
    settings: CurationSettings,
    folder: Path,
    *,
    models: Models = NO_MODELS,
    num_workers: int = 1,
) -> dict[str, Any]:
    """Write the cleaned rows and the list of removed ones to the folder; return the counts of rows by source.

    `rows` are the records, each with the name of its source. Of duplicates, the row with the higher reward is kept,
    then the longer, then the one with the smaller content hash. `removed.jsonl` has a line for every dropped row, with
    the text that it repeats. `similar.jsonl` lists the rows that resemble another one by their meaning and are kept.
    `num_workers` processes read the rows, which does not change the result.
    """
    with Spool(folder / SPOOL_FILE) as spool:
        curation = Curation(settings, Analyzer(settings, index), spool)
        groups = curation.groups(curation.without_equal(curation.read(rows, num_workers=num_workers)))
        groups = curation.without_similar(groups)
        if models.encode is not None:
            groups = curation.without_same_meaning(groups, models.encode)
        groups = curation.without_neighbours(groups, index.items if index is not None else (), models)
        groups = curation.best(curation.with_signal(groups), models)
        duplicate_responses = _write_rows(curation, groups, folder / ROWS_FILE)
        _write_lines(folder / REMOVED_FILE, _shown_with_other(curation, curation.removals))
        if settings.semantic_duplicates is not None:
            _write_lines(folder / SIMILAR_FILE, _shown_with_other(curation, curation.similar))
        report = _report(curation, index)
    return {**report, "duplicate_responses": duplicate_responses}


def _write_rows(curation: Curation, groups: Groups, path: Path) -> int:
    """Write the rows of the result, by id, and count them; return the number of duplicate responses."""
    duplicate_responses = 0
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for leader in sorted(groups, key=lambda row: curation.places[row].id):
            rows = groups[leader]
            for row in rows:
                curation.counts[curation.places[row].source][KEPT if row == leader else MERGED] += 1
            lineage = _lineage(curation, leader, rows)
            if len(rows) == 1 and curation.settings.groups is None:
                unchanged = json.loads(curation.spool.line(leader))
                unchanged["metadata"] = {**unchanged["metadata"], CURATED: lineage}
                stream.write(json.dumps(unchanged) + "\n")
                continue
            record = curation.record(rows)
            if len(rows) > 1:
                num_responses = sum(len(response_texts(curation.spool.record(row))) for row in rows)
                duplicate_responses += num_responses - len(response_texts(record))
            if curation.settings.groups is not None:
                record = chosen_responses(record, curation.settings.groups)
            record = replace(record, metadata={**record.metadata, CURATED: lineage})
            stream.write(native_line(record, path))
    return duplicate_responses


def _lineage(curation: Curation, leader: int, rows: Sequence[int]) -> dict[str, Any]:
    """Return where a row of the result comes from, with its score if rows are ranked."""
    place = curation.places[leader]
    found: dict[str, Any] = {
        "id": place.id,
        "source": place.source,
        "rows": [curation.places[row].id for row in rows],
    }
    if leader in curation.scores and curation.settings.rank is not None:
        found[curation.settings.rank.by] = curation.scores[leader]
    return found


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def _shown_with_other(curation: Curation, removals: Iterable[Removal]) -> Iterator[dict[str, Any]]:
    """Yield what is written of each row, with the row or the test item that it repeats, if there is one."""
    for reason, row, similarity, other in sorted(removals, key=lambda one: (one[0], curation.places[one.row].id)):
        yield {
            **_shown(curation, row),
            "reason": f"{reason}: {_differs(curation, row, other)}" if reason == OTHER_TASK else reason,
            "similarity": similarity,
            "other": None if other is None else _shown(curation, other),
        }


def _shown(curation: Curation, row: int | TestItem) -> dict[str, Any]:
    if isinstance(row, TestItem):
        return asdict(row)
    place = curation.places[row]
    return {"id": place.id, "source": place.source, "text": whole_text(curation.spool.record(row))}


def _differs(curation: Curation, row: int, other: int | TestItem | None) -> str:
    """Return what the tasks of two similar rows differ in."""
    assert isinstance(other, int)
    one, two = (joined(prompt_messages(curation.spool.record(each))) for each in (row, other))
    return difference(task_features(one), task_features(two)) or "numbers, system message, tools or known answer"


def _report(curation: Curation, index: ContaminationIndex | None) -> dict[str, Any]:
    """Return the counts of rows as JSON. Of each source, `rows` is the sum of the other counts."""
    tests: dict[str, Any] = {}
    found = {removal.other for removal in curation.removals if isinstance(removal.other, TestItem)}
    for item in index.items if index is not None else ():
        test = tests.setdefault(item.source, {"items": Counter(), "found": Counter(), "rows": Counter()})
        test["items"][item.part] += 1
        test["found"][item.part] += item in found
    for removal in curation.removals:
        if isinstance(removal.other, TestItem):
            tests[removal.other.source]["rows"][curation.places[removal.row].source] += 1
    similar = Counter(removal.reason for removal in curation.similar)
    return {
        "sources": {source: dict(counts) for source, counts in sorted(curation.counts.items())},
        "tests": tests,
        **({"unclear_neighbours": curation.unclear_neighbours} if curation.unclear_neighbours else {}),
        **({"similar": dict(similar)} if curation.settings.semantic_duplicates is not None else {}),
    }


def whole_text(record: Record) -> str:
    """Return the messages and responses of a record as one text, for readers."""
    return "\n\n".join([joined(prompt_messages(record)), *response_texts(record)])
