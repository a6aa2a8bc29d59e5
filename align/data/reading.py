"""Read files, folders and Hugging Face datasets as records: `read` and `stream`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from align.data.file_types import BadRow
from align.data.readers.detection import detect_format, mismatch
from align.data.readers.ratings import merged
from align.data.readers.reader import Reader
from align.data.readers.response_groups import EMPTY, EmptyResponses
from align.data.readers.synonyms import competing
from align.data.readers.table import READERS
from align.data.rows import Row, check_columns, located_rows, renamed
from align.errors import InputError, RunError
from align.records import Located, Record
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

    def read(self) -> Reading:
        """Return all records at once."""
        records = [located.record for located in self.records]
        return Reading(records, self.format, self.statistics.num_rows, dict(self.statistics.dropped))


def read(
    path: str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    columns: Mapping[str, str] | None = None,
) -> Reading:
    """Return the first `limit` records of a file, a folder or a Hugging Face dataset (`owner/name[:config]`).

    Files are JSON, JSON lines, CSV, Parquet or Arrow, also gzipped. `format` is a key of `READERS`, `auto` to detect it
    from the columns of the first row, or a reader of your own as `module:name`. `columns` renames columns to those of
    the format: `{"prompt": "question"}`. `split` selects the split of a folder or dataset. With `on_error="error"` a
    row that cannot be read raises `InputError` with its place; with `skip` it is dropped and counted in
    `Reading.dropped`, and a group of three or more responses loses only its empty ones.

    >>> import json, pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name) / "pairs.jsonl"
    >>> _ = path.write_text(json.dumps({"question": "2 + 2?", "good": "4", "bad": "5"}))
    >>> reading = read(str(path), columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    >>> reading.format, reading.num_rows
    ('preference', 1)
    >>> [response.content for response in reading.records[0].responses]
    ['4', '5']
    >>> folder.cleanup()
    """
    return stream(path, format=format, split=split, limit=limit, on_error=on_error, columns=columns).read()


def stream(
    path: str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    on_error: str = "error",
    columns: Mapping[str, str] | None = None,
) -> Stream:
    """Return the records of `read` one at a time, each with its place.

    The first row is read at once, to detect the format; the others when the records are iterated. A source without a
    readable row raises `InputError`.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    if on_error not in ("error", "skip"):
        raise InputError(f"on_error is {on_error!r}; {suggest(on_error, ('error', 'skip'))}")
    statistics = RowStatistics()
    rows = _RowErrors(statistics, skips=on_error == "skip")
    usable = rows.usable(located_rows(path, split=split))
    first = next(usable, None)
    if first is None:
        raise _nothing_read(path, statistics)
    if columns:
        check_columns(first.record, columns, first.place)
    name = detect_format(_with_names(first, columns or {})) if format == "auto" else format
    reader = find_reader(name)
    stop = None if limit is None else min(limit, sys.maxsize)  # islice accepts no more
    row_reader = _RowReader(name, reader, columns or {}, rows)
    records = islice(row_reader.records(chain([first], usable)), stop)
    return Stream(_not_empty(records, path, statistics), name, statistics)


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

    def add(self, place: str, error: InputError) -> None:
        """Count the error, or raise it with the place of its row."""
        if not self._skips:
            raise InputError(f"{place}: {error}") from error
        self.statistics.dropped[str(error)] += 1


class _RowReader:
    """Read rows with one reader, after renaming their columns."""

    def __init__(self, name: str, reader: Reader, columns: Mapping[str, str], errors: _RowErrors) -> None:
        self._name, self._reader, self._columns, self._errors = name, reader, columns, errors

    def records(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Record]]:
        """Yield the records of the rows, each with its index and metadata."""
        matching = self._matching(_with_names(row, self._columns) for row in rows)
        joined = self._reader.join(matching) if self._reader.join else matching
        records = chain.from_iterable(map(self._read, joined))
        for row, located in enumerate(merged(records) if self._reader.merge else records):
            yield replace(located, row=row, metadata=located.record.metadata)

    def _matching(self, rows: Iterable[Located[Row]]) -> Iterator[Located[Row]]:
        for located in rows:
            if self._reader.matches(located.record):
                yield located
            else:
                self._errors.add(located.place, mismatch(self._name, self._reader, located.record))

    def _read(self, located: Located[Row]) -> list[Located[Record]]:
        try:
            records = list(self._reader.read(located.record))
            if not records:
                raise InputError("the row contains no record")
            if located.metadata:
                records = [replace(each, metadata={**located.metadata, **each.metadata}) for each in records]
            whole = {**located.record, **located.metadata}
            self._errors.statistics.unused_columns.update(_unused_columns(whole, records, self._reader))
            return [Located(record, located.place) for record in records]
        except InputError as error:
            self._errors.add(located.place, error)
            return [Located(error.remaining, located.place)] if isinstance(error, EmptyResponses) else []
        except RunError as error:
            raise RunError(f"{located.place}: {error}") from error


def _unused_columns(row: Row, records: Iterable[Record], reader: Reader) -> set[str]:
    """Return the columns with a value that is kept in the metadata only, and what the reader does not read."""
    kept = {name for record in records for name in record.metadata} - reader.keeps
    unread = reader.unread(row) if reader.unread is not None else ()
    return {name for name in kept if row.get(name) not in EMPTY} | set(unread)
