"""Read files, folders and Hugging Face datasets as records: `read` and `stream`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from align.data.readers.ratings import merged
from align.data.readers.response_groups import EmptyResponses
from align.data.readers.table import READERS, Reader, describe_columns, detect_format
from align.data.rows import Row, located_rows
from align.errors import InputError
from align.records import Located, Record
from align.registry import import_dotted, pick, suggest


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

    def read(self) -> Reading:
        """Return all records at once."""
        records = [located.record for located in self.records]
        return Reading(records, self.format, self.statistics.num_rows, dict(self.statistics.dropped))


def read(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, on_error: str = "error"
) -> Reading:
    """Return the first `limit` records of a file, a folder or a Hugging Face dataset (`owner/name[:config]`).

    Files are JSON, JSON lines, CSV, Parquet or Arrow, also gzipped. `format` is a key of `READERS`, `auto` to detect it
    from the columns of the first row, or a reader of your own as `module:name`. `split` selects the split of a folder
    or dataset. With `on_error="error"` a row that cannot be read raises `InputError` with its place; with `skip` it
    is dropped and counted in `Reading.dropped`, and a group of three or more responses loses only its empty ones.

    >>> import json, pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "pairs.jsonl"
    >>> _ = path.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}))
    >>> reading = read(str(path))
    >>> reading.format, reading.num_rows
    ('preference', 1)
    >>> [response.content for response in reading.records[0].responses]
    ['4', '5']
    >>> folder.cleanup()
    """
    return stream(path, format=format, split=split, limit=limit, on_error=on_error).read()


def stream(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, on_error: str = "error"
) -> Stream:
    """Return the records of `read` one at a time, each with its place.

    The first row is read at once, to detect the format; the others when the records are iterated. A source without a
    readable row raises `InputError`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if on_error not in ("error", "skip"):
        raise InputError(f"on_error is {on_error!r}; {suggest(on_error, ('error', 'skip'))}")
    rows = located_rows(path, split=split)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: contains no rows")
    name = detect_format(first) if format == "auto" else format
    reader = find_reader(name)
    statistics = RowStatistics()
    row_reader = _RowReader(name, reader, statistics, skips_errors=on_error == "skip")
    stop = None if limit is None else min(limit, sys.maxsize)  # islice accepts no more
    records = islice(row_reader.records(chain([first], rows)), stop)
    return Stream(_not_empty(records, path, statistics), name, statistics)


def find_reader(name: str) -> Reader:
    """Return the reader of a name in `READERS`, or a user's own by its dotted path `module:name`."""
    reader = import_dotted(name, "reader") if ":" in name else pick(READERS, name, "format")
    if not isinstance(reader, Reader):
        raise InputError(f"reader {name!r} is of type {type(reader).__name__}; a Reader is needed")
    return reader


def _not_empty(records: Iterator[Located[Record]], path: str, statistics: RowStatistics) -> Iterator[Located[Record]]:
    """Yield the records. Raise `InputError` if there are none."""
    first = next(records, None)
    if first is None:
        reason = next(iter(statistics.dropped))
        raise InputError(f"{path}: none of the {statistics.num_rows} rows can be read: {reason}")
    yield first
    yield from records


class _RowReader:
    """Read rows with one reader, and count them."""

    def __init__(self, name: str, reader: Reader, statistics: RowStatistics, *, skips_errors: bool) -> None:
        self._name, self._reader, self._statistics = name, reader, statistics
        self._skips_errors = skips_errors

    def records(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Record]]:
        """Yield the records of the rows, each with its index and metadata."""
        matching = self._matching(rows)
        joined = self._reader.join(matching) if self._reader.join else matching
        records = chain.from_iterable(map(self._read, joined))
        for row, located in enumerate(merged(records) if self._reader.merge else records):
            yield replace(located, row=row, metadata=located.record.metadata)

    def _matching(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
        for located in rows:
            self._statistics.num_rows += 1
            if self._reader.matches(located.record):
                yield located
            else:
                needed = " or ".join(self._reader.columns)
                present = describe_columns(located.record)
                self._fail(located, InputError(f"{self._name} needs {needed}, and the row has {present}"))

    def _read(self, located: Located[Row]) -> list[Located[Record]]:
        try:
            records = list(self._reader.read(located.record))
            if not records:
                raise InputError("the row contains no record")
            self._statistics.unused_columns.update(_unused_columns(located.record, records, self._reader))
            return [Located(record, located.place) for record in records]
        except InputError as error:
            self._fail(located, error)
            return [Located(error.remaining, located.place)] if isinstance(error, EmptyResponses) else []

    def _fail(self, located: Located[Row], error: InputError) -> None:
        if not self._skips_errors:
            raise InputError(f"{located.place}: {error}") from error
        self._statistics.dropped[str(error)] += 1


def _unused_columns(row: Row, records: Iterable[Record], reader: Reader) -> set[str]:
    """Return the columns with a value that is kept in the metadata only."""
    kept = {name for record in records for name in record.metadata} - reader.keeps
    return {name for name in kept if row.get(name) not in (None, "", [], {})}
