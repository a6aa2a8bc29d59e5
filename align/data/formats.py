"""Rows to records, and back: the formats that are known, how one is recognised, and the native form."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, time
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import Any

from align.artifacts import atomic_file
from align.data.comparisons import (
    LIKED,
    READ_AND_KEPT,
    EmptyResponses,
    group,
    helpsteer,
    judged_pair,
    merged,
    openassistant,
    preference,
    rated,
    sampling_report,
    steerlm,
    unpaired,
)
from align.data.dialogues import demonstration, dialogue, prompt_only, seed_tasks
from align.data.readers.vicuna_eval import reviewed_answers
from align.data.rows import Row, located_rows, read_rows
from align.errors import InputError, one_line
from align.records import Demonstration, Located, Message, Prompt, Record
from align.registry import import_dotted, pick, suggest

__all__ = ["READERS", "RowStatistics", "Reader", "Reading", "Stream", "read", "read_rows", "stream", "write"]


@dataclass(frozen=True, slots=True)
class Reader:
    """How the rows of one format become records."""

    columns: tuple[str, ...]  # sets of columns, each separated by spaces: a row has all of one of them
    read: Callable[[Row], Iterator[Record]]
    join: Callable[[Iterable[Located[Row]]], Iterator[Located[Row]]] | None = None  # rows that belong together, to one
    merge: bool = False  # neighbouring rows of one prompt are one comparison
    keeps: frozenset[str] = frozenset()  # columns that are used and stand in the metadata all the same

    def matches(self, row: Row) -> bool:
        """Whether the row has the columns that this format needs."""
        return any(set(columns.split()) <= row.keys() for columns in self.columns)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source held."""

    records: list[Record]
    format: str
    num_rows: int
    dropped: Mapping[str, int]  # reason -> rows dropped for it, or shortened by an empty response


@dataclass(slots=True)
class RowStatistics:
    """Counts of the rows read so far, by what became of them."""

    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    unused_columns: Counter[str] = field(default_factory=Counter[str])  # column -> rows of which nothing in it was used


@dataclass(frozen=True, slots=True)
class Stream:
    """What a source holds, one record at a time; `statistics` is complete when `records` is exhausted."""

    records: Iterator[Located[Record]]
    format: str
    statistics: RowStatistics

    def read(self) -> Reading:
        """All of it."""
        records = [located.record for located in self.records]
        return Reading(records, self.format, self.statistics.num_rows, dict(self.statistics.dropped))


def read(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, on_error: str = "error"
) -> Reading:
    """The first `limit` records of a file, folder or hub dataset, as `stream` gives them, all at once."""
    return stream(path, format=format, split=split, limit=limit, on_error=on_error).read()


def stream(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, on_error: str = "error"
) -> Stream:
    """The first `limit` records of a file, folder or hub dataset.

    `format` is a name of READERS, `auto`, or a reader of the user's own as `module:name`. A row that cannot be read
    ends the reading with an InputError, or is dropped and counted where `on_error` is `skip`; a group of three or
    more then loses no more than its empty responses.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; at least one record has to be read")
    if on_error not in ("error", "skip"):
        raise InputError(f"on_error is {on_error!r}; {suggest(on_error, ('error', 'skip'))}")
    rows = located_rows(path, split=split)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: holds no rows")
    name = _recognised(first) if format == "auto" else format
    reader = import_dotted(name, "reader") if ":" in name else pick(READERS, name, "format")
    if not isinstance(reader, Reader):
        raise InputError(f"reader {name!r} is a {type(reader).__name__}; a Reader is needed")
    statistics = RowStatistics()
    reading = _Reading(name, reader, statistics, drops=on_error == "skip")
    last = None if limit is None else min(limit, sys.maxsize)  # more than that nothing can count
    return Stream(_some(islice(reading.records(chain([first], rows)), last), path, statistics), name, statistics)


def _some(records: Iterator[Located[Record]], path: str, statistics: RowStatistics) -> Iterator[Located[Record]]:
    """The same, of which there must be one."""
    first = next(records, None)
    if first is None:
        raise InputError(
            f"{path}: none of the {statistics.num_rows} rows can be read: {next(iter(statistics.dropped))}"
        )
    yield first
    yield from records


def _recognised(first: Located[Row]) -> str:
    """The name of the first format that has the row's columns."""
    for name, reader in READERS.items():
        if reader.matches(first.record):
            return name
    sharing = [
        f"{name} ({' or '.join(reader.columns)})"
        for name, reader in READERS.items()
        if any(first.record.keys() & set(columns.split()) for columns in reader.columns)
    ]
    known = ", ".join(sharing or READERS)
    raise InputError(f"{first.place}: no format has {_columns(first.record)}; there are {known}")


def _columns(row: Row) -> str:
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(one_line, row)]
    return f"the columns {', '.join(names[:12])}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


class _Reading:
    """A reading in progress: it counts what it meets."""

    def __init__(self, name: str, reader: Reader, statistics: RowStatistics, *, drops: bool) -> None:
        self._name, self._reader, self._statistics, self._drops = name, reader, statistics, drops

    def records(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Record]]:
        """The records of the rows."""
        counted = self._matching(rows)
        joined = self._reader.join(counted) if self._reader.join else counted
        single = chain.from_iterable(map(self._read, joined))
        merged_or_single = merged(single) if self._reader.merge else single
        for row, located in enumerate(merged_or_single):
            yield replace(located, row=row, metadata=located.record.metadata)

    def _matching(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
        for located in rows:
            self._statistics.num_rows += 1
            if self._reader.matches(located.record):
                yield located
            else:
                needed = " or ".join(self._reader.columns)
                self._wrong(located, InputError(f"{self._name} needs {needed}; there are {_columns(located.record)}"))

    def _read(self, located: Located[Row]) -> list[Located[Record]]:
        try:
            records = list(self._reader.read(located.record))
            if not records:
                raise InputError("the row holds no record")
            self._statistics.unused_columns.update(_unused(located.record, records, self._reader))
            return [Located(record, located.place) for record in records]
        except InputError as error:
            self._wrong(located, error)
            return [Located(error.remaining, located.place)] if isinstance(error, EmptyResponses) else []

    def _wrong(self, located: Located[Row], error: InputError) -> None:
        if not self._drops:
            raise InputError(f"{located.place}: {error}") from error
        self._statistics.dropped[str(error)] += 1


def _unused(row: Row, records: Iterable[Record], reader: Reader) -> set[str]:
    """The columns that hold something, of which a record has nothing but the metadata."""
    left = {name for record in records for name in record.metadata} - reader.keeps
    return {name for name in left if row.get(name) not in (None, "", [], {})}


def native(row: Row) -> Iterator[Record]:
    """A record as `write` writes it."""
    if "responses" in row:
        return group(row)
    return dialogue(row) if "messages" in row else prompt_only(row)


def native_row(record: Record) -> dict[str, Any]:
    """The row that `native` reads back as the record."""
    metadata = dict(record.metadata)
    if isinstance(record, Prompt):
        return {"prompt": _turns(record.messages), "metadata": metadata}
    if isinstance(record, Demonstration):
        if record.messages[-1].role != "assistant":
            raise InputError("a demonstration that waits for an answer would read back as a prompt")
        return {"messages": _turns(record.messages), "metadata": metadata}
    responses = [
        {"content": one.content, "reward": one.reward, "attributes": dict(one.attributes)} for one in record.responses
    ]
    return {"prompt": _turns(record.prompt), "responses": responses, "chosen": record.chosen, "metadata": metadata}


def _turns(said: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in said]


def _as_text(value: object) -> str:
    """Dates and decimals, which tables hold and JSON does not, as text."""
    if not isinstance(value, date | time | Decimal):
        raise TypeError(f"metadata holds a {type(value).__name__}, which JSON has no form for")
    return str(value)


def write(path: Path | str, records: Iterable[Record]) -> None:
    """Write the records in the native form, one JSON object per line, atomically."""
    target = Path(path)
    if target.suffix != ".jsonl":
        raise InputError(f"{target}: records are written as .jsonl, not as {target.suffix or 'a file without suffix'}")
    try:
        with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(native_row(record), allow_nan=False, default=_as_text) + "\n")
    except (TypeError, ValueError) as error:
        raise InputError(f"{target}: cannot be written: {one_line(error)}") from error


# The first format that has a row's columns reads it, so the special stand before the general.
READERS = {
    "openassistant": Reader(("message_tree_id prompt", "message_id text role replies"), openassistant),
    "nemo_aligner": Reader(("prompt chosen_response rejected_response",), preference, keeps=READ_AND_KEPT),
    "nemo_rl": Reader(("context completions",), group),
    "preference": Reader(("chosen rejected", "chosen_messages rejected_messages"), preference, keeps=READ_AND_KEPT),
    "unpaired": Reader(
        ("messages label", "prompt completion label", "conversations kto_tag", "instruction output kto_tag"),
        unpaired,
        keeps=frozenset({LIKED}),
    ),
    "steerlm": Reader(("text label",), steerlm, merge=True),
    "helpsteer": Reader(("prompt response helpfulness",), helpsteer, merge=True),
    "just_eval": Reader(("prompt response ratings", "input output_cand parsed_result"), rated),
    "just_eval_pairs": Reader(
        ("input output_A output_B parsed_result",), judged_pair, keeps=frozenset({"parsed_result"})
    ),
    "ultrafeedback": Reader(("instruction completions",), group),
    "alpaca_eval": Reader(("instruction responses",), group),
    "acecode": Reader(("question inferences",), group),
    "completions": Reader(("prompt completions", "raw_text completions"), group),
    "sampling_report": Reader(("prompt results",), sampling_report),
    "vicuna_eval": Reader(("question_id text", "question_id answer1_id score"), native, join=reviewed_answers),
    "self_instruct": Reader(("instruction instances",), seed_tasks),
    "alpaca": Reader(("instruction output", "instruction response"), demonstration),
    "mbpp": Reader(("text code", "prompt code"), demonstration),
    "question_answer": Reader(("question answer", "problem solution"), demonstration),
    "prompt_completion": Reader(
        ("prompt completion", "prompt response", "prompt output", "input output", "query response"), demonstration
    ),
    "native": Reader(("prompt responses", "messages metadata", "prompt metadata"), native),
    "messages": Reader(("messages", "conversation"), dialogue),
    "sharegpt": Reader(("conversations",), dialogue),
    "topic_following": Reader(("conversation_json",), dialogue),
    "prompt": Reader(("prompt",), prompt_only),
}
