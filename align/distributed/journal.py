"""An append-only file of finished items, one per line, so that an interrupted command does not repeat them."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar, cast

from align.distributed.work_split import WorkShard
from align.errors import InputError, RunError
from align.redaction import as_written
from align.storage.disk_errors import disk_errors

if TYPE_CHECKING:  # imports torch
    from align.distributed.processes import Processes

MADE_WITH = "made_with"  # the only key of the first line
FIRST_BYTES = b'{"made_with": '  # a file that starts with anything else is not a journal
CHECKSUM_BYTES = len(', "01234567"]')
MAX_SHOWN = 60  # characters of a value in an error message

T = TypeVar("T")


class Journal:
    """Finished items by key, in a JSON-lines file; `done` holds those of this call and of earlier ones.

    The first line records what the items were made with (settings, policies, data); a file made with anything else is
    rejected. A kill loses at most the line being written, and each line carries a checksum.

    When several processes split the items, each appends to its own file: `path` for the main process, `path` followed
    by the rank for the others. Each reads all files, so a later call may use any number of processes.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], shard: WorkShard = WorkShard()) -> None:  # noqa: B008 - frozen
        self.path = _file_of(path, shard.index)
        self.done: dict[str, Any] = {}
        self._paths = [_file_of(path, rank) for rank in range(shard.num_shards)]  # of all processes of this call
        self._header = json.loads(json.dumps({MADE_WITH: as_written(made_with)}))
        with disk_errors(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(self.path.open("a+b"))
            _lock(self._file, self.path, fcntl.LOCK_EX)  # two writers would each repeat the other's items
            self._read_own_file()
            self._merge(_files(path))
            stack.pop_all()  # keep it open

    def add(self, key: str, value: object) -> None:
        """Append a finished item; when read back, its value has been through JSON."""
        assert key not in self.done, f"{key} is already in the journal"
        self._append([key, value], checked=True)
        self.done[key] = value

    def read_others(self) -> None:
        """Add to `done` what the other processes of this call have finished so far."""
        if missing := [path for path in self._paths if not path.exists()]:
            raise RunError(f"{missing[0]}: the file of another process is missing; do all nodes share the folder?")
        with disk_errors(self.path):
            self._merge(self._paths)

    def sync(self) -> None:
        """Flush the file to disk, where other processes can read it."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush the file to disk and close it."""
        with disk_errors(self.path), self._file:
            self.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read_own_file(self) -> None:
        lines, num_partial = self._lines(self._file, self.path)
        if num_partial:
            self._file.truncate(self._file.tell() - num_partial)
        if not lines:
            self._append(self._header)
        self.done = self._items(lines, self.path)

    def _merge(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path == self.path:
                continue
            with path.open("rb") as file:
                if path not in self._paths:  # of an earlier call with more processes, which must have ended
                    _lock(file, path, fcntl.LOCK_SH)
                lines, _ = self._lines(file, path)
            self.done = {**self._items(lines, path), **self.done}

    def _lines(self, file: BinaryIO, path: Path) -> tuple[list[bytes], int]:
        """Return the complete lines of a file, and the number of bytes of a partial line at its end."""
        file.seek(0)
        content = file.read()
        if content[: len(FIRST_BYTES)] != FIRST_BYTES[: len(content)]:
            raise InputError(
                f"{path}: exists and was not written by this command; choose another file, or move it away"
            )
        *lines, partial = content.split(b"\n")
        return lines, len(partial)

    def _items(self, lines: Sequence[bytes], path: Path) -> dict[str, Any]:
        """Return the items of the lines; raise `InputError` if they were made with something else."""
        if not lines:
            return {}
        then = as_written(_parse(lines[0], path, 1)[MADE_WITH])
        if difference := _difference(then, self._header[MADE_WITH], ""):
            raise InputError(f"{path} was started with {difference}; finish it unchanged, or choose another file")
        return dict(_item(line, path, number) for number, line in enumerate(lines[1:], start=2))

    def _append(self, value: object, *, checked: bool = False) -> None:
        line = json.dumps(value, ensure_ascii=False).encode()
        with disk_errors(self.path):
            self._file.write((line[:-1] + _checksum(line) if checked else line) + b"\n")
            self._file.flush()


def run_with_journal(journal: Journal, processes: Processes, work: Callable[[], T], activity: str) -> T:
    """Run each process's part of the work and return its result; then `journal.done` holds the items of all."""

    def work_and_sync() -> T:
        result = work()
        journal.sync()
        return result

    result = processes.run_on_all(work_and_sync, activity)
    if processes.world_size > 1:
        journal.read_others()
    return result


def remove_journal(path: Path) -> None:
    """Remove the journal files of all processes."""
    for file in _files(path):
        file.unlink(missing_ok=True)


def _file_of(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}-{rank}") if rank else path


def _files(path: Path) -> list[Path]:
    """Return the existing files of all processes, the main process's first."""
    others = [file for file in path.parent.glob(f"{escape(path.name)}-*") if file.name.rpartition("-")[2].isdigit()]
    return [*([path] if path.exists() else []), *sorted(others)]


def _lock(file: BinaryIO, path: Path, mode: int) -> None:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{path}: another process is writing to it") from error


def _checksum(item: bytes) -> bytes:
    """Return the end of an item's line: its CRC-32 as a third element."""
    return f', "{zlib.crc32(item):08x}"]'.encode()


def _item(line: bytes, path: Path, number: int) -> tuple[str, Any]:
    """Return key and value of a line; raise `InputError` if it is damaged. Older versions wrote no checksum."""
    key, value, *checksum = _parse(line, path, number)
    if checksum and line[-CHECKSUM_BYTES:] != _checksum(line[:-CHECKSUM_BYTES] + b"]"):
        raise InputError(f"{path}: line {number} is damaged: {line[:40]!r}; delete the line")
    return key, value


def _parse(line: bytes, path: Path, number: int) -> Any:  # noqa: ANN401 - JSON holds any type
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is not valid JSON: {line[:40]!r}; delete the line") from error


def _difference(then: Any, now: Any, place: str) -> str | None:  # noqa: ANN401 - JSON holds any type
    """Return the first key whose values differ, with both values; None if all are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        before, after = cast("dict[str, Any]", then), cast("dict[str, Any]", now)
        differences = (
            _difference(before.get(key), after.get(key), f"{place}.{key}".lstrip("."))
            for key in sorted(before.keys() | after.keys())
        )
        return next((difference for difference in differences if difference), None)
    return None if then == now else f"{place} {_short(then)}, but this call has {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
