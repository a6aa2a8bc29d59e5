"""Rows of JSON, JSON-lines, CSV, Parquet and Arrow files, each also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from align.data.encodings import check_encoding, decoded, not_utf8
from align.data.strict_json import from_columns, parse_json, parse_json_at, skip_space
from align.errors import InputError, one_line
from align.registry import LazyModule

if TYPE_CHECKING:
    from pyarrow import ipc, parquet
else:  # most files need neither, and a wrong recipe is answered faster
    ipc, parquet = LazyModule("pyarrow.ipc"), LazyModule("pyarrow.parquet")

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")  # Hendrycks et al. 2021
ARROW_MAGIC = b"ARROW1"  # begins the file form of Arrow, and not its stream form, which `datasets` writes
ROW_KEYS = ("data", "rows", "examples", "records", "prompts")  # keys under which a JSON object can hold its rows


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, with the reason."""

    message: str
    line: int | None = None  # of the file, where it is known


Opener = Callable[[BinaryIO, Path], Iterator[Any]]


def opener_of(file: Path) -> Opener | None:
    """Return the function that reads a file with this suffix, or None for a suffix that is not known."""
    return OPENERS.get(Path(file.name.removesuffix(".gz")).suffix.lower())


def file_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a file, of any JSON type, or as `BadRow`.

    Raise `InputError` for an unknown suffix or malformed content.
    """
    opener = opener_of(file)
    if opener is None:
        raise InputError(f"{file}: not a data file; those end in {known_suffixes()}")
    with file.open("rb") as stream:
        yield from opener(cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if file.suffix == ".gz" else stream, file)


def known_suffixes() -> str:
    """Return the suffixes of data files, for an error."""
    return f"{', '.join(OPENERS)}, each also with .gz"


def _line_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            check_encoding(line, file)
        if line.strip():
            yield _row_of_line(decoded(line.rstrip(b"\r\n"), file, line=number), number)


def _row_of_line(text: str, number: int) -> Any:  # noqa: ANN401 - JSON holds any type
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON ({error.msg}, column {error.colno})", number)
    except InputError as error:
        return BadRow(one_line(error), number)
    except RecursionError:
        return BadRow("nested too deeply", number)
    except ValueError:
        return BadRow("a number has too many digits", number)


def _json_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    """Yield the items of a list, of the list in an object under a key of `ROW_KEYS`, or the lines."""
    content = stream.read()
    check_encoding(content[:4], file)
    text = decoded(content, file)
    start = skip_space(text, 0)
    if text.startswith("[", start):
        yield from _items(text, start + 1, file)
    elif start < len(text):
        value, end = _value(text, start, file)
        if skip_space(text, end) < len(text):
            yield from _line_rows(cast(BinaryIO, io.BytesIO(content)), file)
        elif isinstance(value, dict):
            yield from _rows_of_object(cast(dict[str, Any], value), file)
        elif isinstance(value, BadRow):
            raise InputError(f"{file}: {value.message}")
        else:
            raise InputError(f"{file}: contains {_kind(value)} alone; a list of rows, or one in each line, is needed")


def _items(text: str, place: int, file: Path) -> Iterator[Any]:
    """Yield the items of a list one by one; one that is ambiguous is a `BadRow`. Its bracket is before `place`."""
    place = skip_space(text, place)
    while not text.startswith("]", place):
        value, end = _value(text, place, file)
        yield value
        place = skip_space(text, end)
        if text.startswith(",", place):
            place = skip_space(text, place + 1)
            if text.startswith("]", place):
                raise _not_json("Expecting value", text, place, file)
        elif not text.startswith("]", place):
            raise _not_json("Expecting ',' delimiter", text, place, file)
    if skip_space(text, place + 1) < len(text):
        raise _not_json("Extra data", text, skip_space(text, place + 1), file)


def _value(text: str, place: int, file: Path) -> tuple[Any, int]:
    """Return the JSON value at `place`, or a `BadRow` if it is ambiguous, and where it ends."""
    try:
        try:
            return parse_json_at(text, place)
        except InputError as error:
            return BadRow(one_line(error)), json.JSONDecoder().raw_decode(text, place)[1]
    except json.JSONDecodeError as error:
        raise _not_json(error.msg, text, error.pos, file) from error


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "a string"
    return json.dumps(value) if value is None or isinstance(value, bool) else "a number"


def _rows_of_object(value: dict[str, Any], file: Path) -> list[Any]:
    """Return the list in a JSON object under a key of `ROW_KEYS`, or the object as the only row."""
    lists = {key: value[key] for key in ROW_KEYS if isinstance(value.get(key), list)}
    filled = [key for key, rows in lists.items() if rows]
    if len(filled) > 1:
        raise InputError(f"{file}: contains several lists of rows, {' and '.join(filled)}; keep one of them")
    if filled:
        return lists[filled[0]]
    return [] if lists else [value]


def _not_json(problem: str, text: str, place: int, file: Path) -> InputError:
    error = json.JSONDecodeError(problem, text, place)
    return InputError(f"{file}: line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})")


def _csv_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # a dialogue can exceed the default of 128 KiB
    check_encoding(stream.read(4), file)
    stream.seek(0)
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            rows = csv.DictReader(text, strict=True)
            if _is_mmlu(rows.fieldnames or ()):
                yield from _mmlu_rows(rows, file)
                return
            repeated = [name for name, times in Counter(rows.fieldnames or ()).items() if times > 1]
            if repeated:
                raise InputError(f"{file}: the header names the column {repeated[0]!r} more than once")
            for row in rows:
                if None in row or None in row.values():
                    raise csv.Error("the next row has more or fewer fields than the header")
                yield row
    except UnicodeDecodeError as error:  # its place is that in a part of the file
        raise not_utf8(error, file) from error


def _is_mmlu(first: Sequence[str]) -> bool:
    """Return whether the first line of a CSV file is a question of MMLU: these files have no header.

    A header whose last names are A, B, C and D is none.
    """
    letters = MMLU_COLUMNS[1:-1]
    if len(first) != len(MMLU_COLUMNS) or first[-1] not in letters:
        return False
    return first[-2] not in letters[: letters.index(first[-1])][-1:]


def _mmlu_rows(rows: csv.DictReader[str], file: Path) -> Iterator[dict[str, Any]]:
    """Yield all lines of an original file of MMLU, with the subject that is in its name, as in `anatomy_test.csv`."""
    subject = re.sub(r"_(test|val|dev)$", "", file.name.removesuffix(".gz").removesuffix(".csv"))
    first = rows.fieldnames or ()
    rows.fieldnames = MMLU_COLUMNS
    for row in (dict(zip(MMLU_COLUMNS, first, strict=True)), *rows):
        if None in row or None in row.values():
            raise csv.Error("the next row has more or fewer fields than the first")
        yield {**row, "subject": subject}


def _parquet_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    for batch in parquet.ParquetFile(_seekable(stream, file)).iter_batches():
        yield from map(from_columns, batch.to_pylist())


def _arrow_rows(stream: BinaryIO, file: Path) -> Iterator[Any]:
    content = _seekable(stream, file)
    is_file = content.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    content.seek(0)
    opened: Any = ipc.open_file(content) if is_file else ipc.open_stream(content)
    for batch in map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened:
        yield from map(from_columns, batch.to_pylist())


def _seekable(stream: BinaryIO, file: Path) -> BinaryIO:
    """Return a stream whose parts can be read in any order: the content in memory of a gzipped file."""
    return io.BytesIO(stream.read()) if file.suffix == ".gz" else stream


OPENERS: dict[str, Opener] = {
    ".json": _json_rows,
    ".jsonl": _line_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
