"""Write records in their native form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import date, time
from decimal import Decimal
from pathlib import Path

from align.artifacts import atomic_file
from align.data.readers.native import native_row
from align.errors import InputError, one_line
from align.records import Record


def write(path: Path | str, records: Iterable[Record]) -> None:
    """Write the records to a .jsonl file in the native form, one JSON object per line, atomically.

    `read` returns the same records. Dates and decimals in the metadata are written as text. Raise `InputError` for
    another suffix, and for metadata that JSON cannot represent.

    >>> import tempfile
    >>> from align.data.reading import read
    >>> from align.records import Message, Prompt
    >>> prompt = Prompt((Message("user", "Hello"),), {"id": 1})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/prompts.jsonl", [prompt])
    ...     read(f"{folder}/prompts.jsonl").records == [prompt]
    True
    """
    target = Path(path)
    if target.suffix != ".jsonl":
        raise InputError(f"{target}: records are written as .jsonl, not as {target.suffix or 'a file without suffix'}")
    with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(native_line(record, target))


def native_line(record: Record, target: Path) -> str:
    """Return the line of a record in the native form; `target` is the file that errors name."""
    try:
        return json.dumps(native_row(record), allow_nan=False, default=_as_text) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{target}: cannot be written: {one_line(error)}") from error


def _as_text(value: object) -> str:
    if not isinstance(value, date | time | Decimal):
        raise TypeError(f"metadata contains a value of type {type(value).__name__}, which JSON cannot represent")
    return str(value)
