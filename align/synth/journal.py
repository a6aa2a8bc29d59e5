"""A file of finished items, one a line: what a kill leaves in it is not done again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from align.artifacts import writing
from align.config import InputError, RunError

MADE_WITH = "made_with"  # the one key of the first line
BEGINNING = b'{"made_with": '  # of the first line; a file that begins otherwise is somebody else's


class Journal:
    """Finished items by key, in an append-only JSONL file; `done` holds those of this and of earlier calls.

    The first line says what the items were made with (settings, policies, data), and a file that was made with
    something else is refused. A kill at any byte costs at most the line that was being written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        header = json.loads(json.dumps({MADE_WITH: made_with}))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, value: object) -> None:
        """Write down that the item is finished; its value comes back as JSON gives it."""
        assert key not in self.done, f"{key} was done before"
        self._append([key, value])
        self.done[key] = value

    def close(self) -> None:
        """Wait until all of it is on the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        """Two writers would each do the other's items again."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{self.path}: another process is writing to it") from error

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        if content[: len(BEGINNING)] != BEGINNING[: len(content)]:
            raise InputError(f"{self.path}: not a file of finished items; name another, or move it away")
        *lines, torn = content.split(b"\n")
        if torn:  # a kill came in the middle of this line
            with writing(self.path):
                self._file.truncate(len(content) - len(torn))
        if not lines:
            self._append(header)
            return
        if difference := _difference(self._parse(lines[0], 1)[MADE_WITH], header[MADE_WITH], ""):
            raise InputError(f"{self.path} was begun with {difference}; finish it so, or name another file")
        for number, line in enumerate(lines[1:], start=2):
            key, value = self._parse(line, number)
            self.done[key] = value

    def _parse(self, line: bytes, number: int) -> Any:  # noqa: ANN401 - JSON holds any type
        try:
            return json.loads(line)
        except ValueError as error:
            raise InputError(f"{self.path}: line {number} is not whole: {line[:40]!r}; delete the line") from error

    def _append(self, value: object) -> None:
        with writing(self.path):
            self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


def _difference(then: Any, now: Any, place: str) -> str | None:  # noqa: ANN401 - JSON holds any type
    """The first place in which the two differ, with both values; None where they are the same."""
    if isinstance(then, dict) and isinstance(now, dict):
        before, after = cast("dict[str, Any]", then), cast("dict[str, Any]", now)
        found = (
            _difference(before.get(key), after.get(key), f"{place}.{key}".lstrip("."))
            for key in sorted(before.keys() | after.keys())
        )
        return next((each for each in found if each), None)
    return None if then == now else f"{place} {_short(then)}, and this call has {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
