"""Read files, folders and Hugging Face datasets as records: `read` and `stream`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from align.data.columns import Row, missing_column, renamed
from align.data.file_types import BadRow
from align.data.readers.detection import detect_format, mismatch
from align.data.readers.ratings import merged
from align.data.readers.reader import Reader
from align.data.readers.response_groups import EMPTY, EmptyResponses
from align.data.readers.synonyms import ESSENTIAL, competing
from align.data.readers.table import READERS
from align.data.readers.tool_calls import TOOLS_COLUMN, TOOLS_TAG, tools_of
from align.data.rejections import count_limited
from align.data.rows import located_rows, rows_in_memory
from align.data.where import RowFilter, Where
from align.errors import InputError, RunError, one_line
from align.records import Comparison, Located, Record, Tools
from align.registry import UserCode, import_dotted, pick, suggest


@dataclass(frozen=True, slots=True)
class Reading:
    """The records of a source, with statistics of its rows."""

    records: list[Record]
    format: str  # a key of READERS, or the dotted path of a reader
    num_rows: int
    dropped: Mapping[str, int]  # reason -> rows that were dropped or lost empty responses


@dataclass(slots=True)
class RowStatistics:
    """Counts of the rows read so far, by what became of them."""

    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])  # reason -> rows
    unused_columns: Counter[str] = field(default_factory=Counter[str])  # column -> rows with an unused value in it


@dataclass(frozen=True, slots=True)
class Stream:
    """The records of a source, one at a time. `statistics` is complete once `records` is exhausted."""

    records: Iterator[Located[Record]]
    format: str
    statistics: RowStatistics
    found_columns: tuple[str, ...] = ()  # those of the first row that the format needs

    def read(self) -> Reading:
        """Return all records at once."""
        records = [located.record for located in self.records]
        return Reading(records, self.format, self.statistics.num_rows, dict(self.statistics.dropped))


def read(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    columns: Mapping[str, str] | None = None,
    where: Where | None = None,
) -> Reading:
    """Return the first `limit` records of a file, a folder or a Hugging Face dataset (`owner/name[:config]`).

    Files are JSON, JSON lines, CSV, Parquet or Arrow, also gzipped. `format` is a key of `READERS`, `auto` to detect it
    from the columns of the first row, or a reader of your own as `module:name`. `columns` renames columns to those of
    the format: `{"prompt": "question"}`. `split` selects the split of a folder or dataset. With `on_error="error"` a
    row that cannot be read raises `InputError` with its place; with `skip` it is dropped and counted in
    `Reading.dropped`, and a group of three or more responses loses only its empty ones. `where` keeps the rows in
    which a column of the file, or an entry of the metadata that the format adds, has one of the values:
    `{"data_source": ["PRM800K", "ARB"]}`; the others are counted in `Reading.dropped`.

    >>> import json, pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "pairs.jsonl"
    >>> _ = path.write_text(json.dumps({"question": "2 + 2?", "good": "4", "bad": "5"}))
    >>> reading = read(path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    >>> reading.format, reading.num_rows
    ('preference', 1)
    >>> [response.content for response in reading.records[0].responses]
    ['4', '5']
    >>> folder.cleanup()
    """
    found = stream(str(path), format=format, split=split, limit=limit, on_error=on_error, columns=columns, where=where)
    return found.read()


def stream(
    path: str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    columns: Mapping[str, str] | None = None,
    where: Where | None = None,
    in_memory: Iterable[Mapping[str, Any]] | None = None,
) -> Stream:
    """Return the records of `read` one at a time, each with its place; of rows `in_memory`, `path` is only the name.

    The first row is read at once, to detect the format; the others when the records are iterated. A source without a
    readable row raises `InputError`. So does, after the last row, a value of `where` that no row has had.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if on_error not in ("error", "skip"):
        raise InputError(f"on_error is {on_error!r}; {suggest(on_error, ('error', 'skip'))}")
    statistics = RowStatistics()
    rows = _RowErrors(statistics, skips=on_error == "skip")
    row_filter = RowFilter(where or {})
    located = located_rows(path, split=split) if in_memory is None else rows_in_memory(in_memory, path)
    usable = rows.wanted(rows.usable(located), row_filter)
    first = next(usable, None)
    if first is None:
        row_filter.check_found(path)
        raise _nothing_read(path, statistics)
    columns = columns or {}
    if error := missing_column(first.record, columns, columns):
        raise InputError(f"{first.place}: {error}")
    named = _with_names(first, columns)
    name = detect_format(named) if format == "auto" else format
    reader = find_reader(name)
    stop = None if limit is None else min(limit, sys.maxsize)  # islice accepts no more
    if where and reader.join:
        raise InputError(f"where cannot select rows of format {name}, which joins several rows to one", ("where",))
    row_reader = _RowReader(name, reader, columns, rows, row_filter)
    records = islice(_all_found(row_reader.records(chain([first], usable)), row_filter, path), stop)
    return Stream(_not_empty(records, path, statistics), name, statistics, reader.found_columns(named.record))


def find_reader(name: str) -> Reader:
    """Return the reader of a name in `READERS`, or a user's own by its dotted path `module:name`."""
    reader = import_dotted(name, "reader") if ":" in name else pick(READERS, name, "format")
    if not isinstance(reader, Reader):
        raise InputError(f"reader {name!r} is of type {type(reader).__name__}; a Reader is needed")
    return _of_user(reader, UserCode("reader", name)) if ":" in name else reader


def _of_user(reader: Reader, code: UserCode) -> Reader:
    """Return a user's reader with its exceptions handled."""

    def read(row: Row) -> Iterator[Record]:
        return code.iterate(code.call(reader.read, row))

    def join(rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
        return code.iterate(code.call(reader.join or iter, rows))

    return replace(reader, read=read, join=reader.join and join)


def _with_names(located: Located[Row], columns: Mapping[str, str]) -> Located[Row]:
    """Return the row with its columns renamed. Its metadata are the columns that these take the place of."""
    if not columns:
        return located
    row, replaced = renamed(located.record, columns)
    hidden = competing(row, columns)
    shown = {name: value for name, value in row.items() if name not in hidden}
    return Located(shown, located.place, metadata={**replaced, **{name: row[name] for name in hidden}})


def _not_empty(records: Iterator[Located[Record]], path: str, statistics: RowStatistics) -> Iterator[Located[Record]]:
    """Yield the records. Raise `InputError` if there are none."""
    first = next(records, None)
    if first is None:
        raise _nothing_read(path, statistics)
    yield first
    yield from records


def _all_found(records: Iterator[Located[Record]], row_filter: RowFilter, path: str) -> Iterator[Located[Record]]:
    """Yield the records. Raise `InputError` after the last one for a value of `where` that no row has had."""
    yield from records
    row_filter.check_found(path)


def _nothing_read(path: str, statistics: RowStatistics) -> InputError:
    if not statistics.num_rows:
        return InputError(f"{path}: contains no rows")
    reason = next(iter(statistics.dropped))
    return InputError(f"{path}: none of the {statistics.num_rows} rows can be read: {reason}")


class _RowErrors:
    """What happens to rows that cannot be used: an error, or a count."""

    def __init__(self, statistics: RowStatistics, *, skips: bool) -> None:
        self.statistics, self._skips = statistics, skips

    def usable(self, rows: Iterable[Located[Row | BadRow]]) -> Iterator[Located[Row]]:
        """Yield the rows that are objects, and count all rows."""
        for located in rows:
            self.statistics.num_rows += 1
            if isinstance(located.record, BadRow):
                self.add(located.place, InputError(located.record.message))
            else:
                yield Located(located.record, located.place)

    def wanted(self, rows: Iterable[Located[Row]], row_filter: RowFilter) -> Iterator[Located[Row]]:
        """Yield the rows with the values of `where`, and count the others."""
        for located in rows:
            if self.is_wanted(located.record, row_filter):
                yield located

    def is_wanted(self, row: Row, row_filter: RowFilter) -> bool:
        """Return whether the row has the values of `where`; count it as dropped if it has not."""
        column = row_filter.excluding(row)
        if column is not None:
            self.statistics.dropped[f"{column} not in where"] += 1
        return column is None

    def add(self, place: str, error: InputError) -> None:
        """Count the error, or raise it with the place of its row."""
        if not self._skips:
            raise InputError(f"{place}: {error}") from error
        count_limited(self.statistics.dropped, one_line(error))


class _RowReader:
    """Read rows with one reader, after renaming their columns."""

    def __init__(
        self, name: str, reader: Reader, columns: Mapping[str, str], errors: _RowErrors, row_filter: RowFilter
    ) -> None:
        self._name, self._reader, self._columns = name, reader, columns
        self._errors, self._filter = errors, row_filter

    def records(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Record]]:
        """Yield the records of the rows, each with its index and metadata."""
        matching = self._matching(rows)
        joined = self._reader.join(matching) if self._reader.join else matching
        records = chain.from_iterable(map(self._read, joined))
        for row, located in enumerate(merged(records) if self._reader.merge else records):
            yield replace(located, row=row, metadata=located.record.metadata)

    def _matching(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
        """Yield the rows of the reader's format, with their columns renamed."""
        needed = ESSENTIAL.union(*self._reader.alternatives).intersection(self._columns)
        for located in rows:
            if error := missing_column(located.record, self._columns, sorted(needed)):
                self._errors.add(located.place, error)
                continue
            named = _with_names(located, self._columns)
            if self._reader.matches(named.record):
                yield named
            else:
                self._errors.add(located.place, mismatch(self._name, self._reader, named.record))

    def _read(self, located: Located[Row], remaining: Sequence[Record] = ()) -> list[Located[Record]]:
        """Return the records of a row; `remaining` are those of a row without its empty responses."""
        try:
            tools = () if ":" in self._name else tools_of(located.record)
            records = [_with_tools(each, tools) for each in remaining or self._reader.read(located.record)]
            if not records:
                raise InputError("the row contains no record")
            if located.metadata:
                records = [replace(each, metadata={**located.metadata, **each.metadata}) for each in records]
            whole = {**located.record, **located.metadata}
            unused = _unused_columns(whole, records, self._reader) - self._filter.columns
            self._errors.statistics.unused_columns.update(unused)
            return [Located(record, located.place) for record in records if self._is_wanted(record, whole)]
        except InputError as error:
            self._errors.add(located.place, error)
            return self._read(located, [error.remaining]) if isinstance(error, EmptyResponses) else []
        except RunError as error:
            raise RunError(f"{located.place}: {error}") from error

    def _is_wanted(self, record: Record, row: Row) -> bool:
        """Return whether the record's metadata have the values of `where`, where the row's own columns had none."""
        if not self._filter.columns:
            return True
        self._filter.check_known({*row, *record.metadata, *self._columns.values()})
        return self._errors.is_wanted(record.metadata, self._filter)


def _with_tools(record: Record, tools: Tools) -> Record:
    """Return a record with the tools of its row, unless its reader found others or its system message has them."""
    if not tools:
        return record
    metadata = {name: value for name, value in record.metadata.items() if name != TOOLS_COLUMN}
    messages = record.prompt if isinstance(record, Comparison) else record.messages
    is_written = any(message.role == "system" and TOOLS_TAG in message.content for message in messages)
    return replace(record, tools=record.tools or (() if is_written else tools), metadata=metadata)


def _unused_columns(row: Row, records: Iterable[Record], reader: Reader) -> set[str]:
    """Return the columns with a value that is kept in the metadata only, and what the reader does not read."""
    kept = {name for record in records for name in record.metadata} - reader.keeps
    unread = reader.unread(row) if reader.unread is not None else ()
    return {name for name in kept if row.get(name) not in EMPTY} | set(unread)
