"""Rows on disk, read by number: the texts of a large source do not fit in memory."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

from align.data.readers.native import native_record
from align.records import Record


class Spool:
    """A temporary file of native rows; removed at the end of the `with` block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("Q")
        self._end = 0
        self._file = path.open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink()

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, line: str) -> None:
        """Append a row, a line of JSON. No row is added after the first one is read."""
        self._offsets.append(self._end)
        self._end += self._file.write(line.encode())

    def line(self, row: int) -> str:
        """Return the line of a row."""
        self._file.seek(self._offsets[row])
        return self._file.readline().decode()

    def record(self, row: int) -> Record:
        """Return a row as it was read."""
        return native_record(json.loads(self.line(row)))
