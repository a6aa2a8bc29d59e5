"""A file of finished items, one a line: what a kill leaves in it is not done again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar, cast

from align.artifacts import disk_errors
from align.errors import InputError, RunError

MADE_WITH = "made_with"  # the one key of the first line
BEGINNING = b'{"made_with": '  # of the first line; a file that begins otherwise is somebody else's

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """Which items are one process's own, of several processes that do them together."""

    number: int = 0
    count: int = 1

    def of(self, items: Sequence[T]) -> list[T]:
        """Its items, which are dealt in turn."""
        return [item for place, item in enumerate(items) if self.has(place)]

    def has(self, place: int) -> bool:
        """Whether the item at this place is one of them."""
        return place % self.count == self.number


class Journal:
    """Finished items by key, in an append-only JSONL file; `done` holds those of this and of earlier calls.

    The first line says what the items were made with (settings, policies, data), and a file that was made with
    something else is refused. A kill at any byte costs at most the line that was being written.

    Of several processes that share out the items each writes to a file of its own, `path` with its number behind it
    for all but the first. Each reads them all, so that what any has finished, in however many processes, is known.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], share: Share = Share()) -> None:  # noqa: B008 - frozen
        self.path = _file_of(path, share.number)
        self.done: dict[str, Any] = {}
        self._paths = [_file_of(path, number) for number in range(share.count)]  # of all processes of this call
        self._header = json.loads(json.dumps({MADE_WITH: made_with}))
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path, fcntl.LOCK_EX)  # two writers would each do the other's items again
            self._read_own()
            self._take_in(_files(path))
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, value: object) -> None:
        """Write down that the item is finished; its value comes back as JSON gives it."""
        assert key not in self.done, f"{key} was done before"
        self._append([key, value])
        self.done[key] = value

    def look_around(self) -> None:
        """Take in what the other processes of this call have finished by now."""
        if missing := [path for path in self._paths if not path.exists()]:
            raise RunError(f"{missing[0]}: another process writes to it and it is not there; do all machines share it?")
        self._take_in(self._paths)

    def sync(self) -> None:
        """Wait until all of it is on the disk, where other processes find it."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Wait until all of it is on the disk."""
        self.sync()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read_own(self) -> None:
        lines, torn = self._lines(self._file, self.path)
        if torn:
            with disk_errors(self.path):
                self._file.truncate(self._file.tell() - torn)
        if not lines:
            self._append(self._header)
        self.done = self._items(lines, self.path)

    def _take_in(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path == self.path:
                continue
            with path.open("rb") as file:
                if path not in self._paths:  # of an earlier call, which had more processes: they must be gone
                    _lock(file, path, fcntl.LOCK_SH)
                lines, _ = self._lines(file, path)
            self.done = {**self._items(lines, path), **self.done}

    def _lines(self, file: BinaryIO, path: Path) -> tuple[list[bytes], int]:
        """The file's whole lines, and how many bytes stand after them: a kill came in the middle of a line."""
        file.seek(0)
        content = file.read()
        if content[: len(BEGINNING)] != BEGINNING[: len(content)]:
            raise InputError(f"{path}: not a file of finished items; name another, or move it away")
        *lines, torn = content.split(b"\n")
        return lines, len(torn)

    def _items(self, lines: Sequence[bytes], path: Path) -> dict[str, Any]:
        """What the lines say is finished; raises where it was made with something else."""
        if not lines:
            return {}
        if difference := _difference(_parse(lines[0], path, 1)[MADE_WITH], self._header[MADE_WITH], ""):
            raise InputError(f"{path} was begun with {difference}; finish it so, or name another file")
        return dict(_parse(line, path, number) for number, line in enumerate(lines[1:], start=2))

    def _append(self, value: object) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


def remove_journal(path: Path) -> None:
    """Remove the finished items of all processes."""
    for file in _files(path):
        file.unlink(missing_ok=True)


def _file_of(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number}") if number else path


def _files(path: Path) -> list[Path]:
    """The files that processes have written, the first one's first."""
    others = [file for file in path.parent.glob(f"{escape(path.name)}-*") if file.name.rpartition("-")[2].isdigit()]
    return [*([path] if path.exists() else []), *sorted(others)]


def _lock(file: BinaryIO, path: Path, how: int) -> None:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path}: another process is writing to it") from error


def _parse(line: bytes, path: Path, number: int) -> Any:  # noqa: ANN401 - JSON holds any type
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not whole: {line[:40]!r}; delete the line") from error


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
