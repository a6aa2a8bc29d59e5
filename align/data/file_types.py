"""Rows of JSON, JSON-lines, CSV, Parquet and Arrow files, each also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from align.errors import InputError
from align.lazy import LazyModule

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import ipc, parquet
else:  # most files need neither, and a wrong recipe is answered faster
    ipc, parquet = LazyModule("pyarrow.ipc"), LazyModule("pyarrow.parquet")

ROW_KEYS = ("data", "rows", "examples", "records", "prompts")  # keys under which a JSON object can hold its rows
Opener = Callable[[BinaryIO, Path], Iterator[Any]]


def opener_of(file: Path) -> Opener | None:
    """Return the function that reads a file with this suffix, or None for a suffix that is not known."""
    return OPENERS.get(Path(file.name.removesuffix(".gz")).suffix.lower())


def file_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a file, of any JSON type. Raise `InputError` for an unknown suffix or malformed content."""
    opener = opener_of(file)
    if opener is None:
        raise InputError(f"{file}: not a data file; those end in {known_suffixes()}")
    with file.open("rb") as stream:
        yield from opener(cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if file.suffix == ".gz" else stream, file)


def known_suffixes() -> str:
    """Return the suffixes of data files, for an error."""
    return f"{', '.join(OPENERS)}, each also with .gz"


def _line_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _not_json(error, file, number) from error


def _json_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    """Yield the items of a list, of the list in an object under a key of `ROW_KEYS`, or the lines."""
    content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig")) if content.strip() else []
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _not_json(error, file, error.lineno) from error
        value = _line_rows(cast(BinaryIO, io.BytesIO(content)), file)
    if isinstance(value, dict):
        value = _rows_of_object(cast(dict[str, Any], value), file)
    yield from value


def _rows_of_object(value: dict[str, Any], file: Path) -> list[Any]:
    """Return the list in a JSON object under a key of `ROW_KEYS`, or the object as the only row."""
    lists = {key: value[key] for key in ROW_KEYS if isinstance(value.get(key), list)}
    filled = [key for key, rows in lists.items() if rows]
    if len(filled) > 1:
        raise InputError(f"{file}: contains several lists of rows, {' and '.join(filled)}; keep one of them")
    if filled:
        return lists[filled[0]]
    return [] if lists else [value]


def _not_json(error: json.JSONDecodeError, file: Path, line: int) -> InputError:
    return InputError(f"{file}: line {line}: not valid JSON ({error.msg}, column {error.colno})")


def _csv_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # a dialogue can exceed the default of 128 KiB
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        repeated = [name for name, times in Counter(rows.fieldnames or ()).items() if times > 1]
        if repeated:
            raise InputError(f"{file}: the header names the column {repeated[0]!r} more than once")
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error("the next row has more or fewer fields than the header")
            yield row


def _parquet_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    for batch in parquet.ParquetFile(io.BytesIO(stream.read()) if file.suffix == ".gz" else stream).iter_batches():
        yield from batch.to_pylist()


def _arrow_rows(stream: BinaryIO, _: Path) -> Iterator[Any]:
    content = stream.read()
    is_file = content.startswith(b"ARROW1")  # Arrow has a file form and a stream form; `datasets` writes streams
    table: pa.Table = ipc.open_file(content).read_all() if is_file else ipc.open_stream(content).read_all()
    yield from table.to_pylist()


OPENERS: dict[str, Opener] = {
    ".json": _json_rows,
    ".jsonl": _line_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
