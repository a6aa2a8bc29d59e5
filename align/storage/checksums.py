"""Sizes and SHA-256 of files, recorded when a folder is complete and checked before it is used again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

FileRecords = Mapping[str, Mapping[str, Any]]  # name relative to the folder -> {"bytes": size, "sha256": hex digits}
CHUNK = 1 << 20  # bytes read at a time
DAMAGED = "damaged: its content has changed since it was written"


def sha256_of(file: Path, length: int | None = None) -> str:
    """Return the SHA-256 of a file's content, or of its first `length` bytes, read in one pass."""
    digest = hashlib.sha256()
    left = length
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK if left is None else min(CHUNK, left)):
            digest.update(chunk)
            left = None if left is None else left - len(chunk)
    return digest.hexdigest()


def sha256_of_each(files: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file; several are read at the same time."""
    known = list(files)
    with ThreadPoolExecutor() as pool:
        return dict(zip(known, pool.map(sha256_of, known), strict=True))


def file_records(folder: Path, *, exclude: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below `folder`, except those with an excluded name."""
    excluded = set(exclude)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in excluded)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in sha256_of_each(files).items()
    }


def as_records(value: object) -> FileRecords | None:
    """Return a value read from JSON as file records; None if it is not a mapping of such."""
    if not isinstance(value, Mapping):
        return None
    entries = cast("Mapping[str, Any]", value)
    is_valid = all(isinstance(each, Mapping) and {"bytes", "sha256"} <= each.keys() for each in entries.values())
    return entries if is_valid else None


def size_problems(folder: Path, records: FileRecords) -> list[str]:
    """Return a line for each recorded file that is missing or has another size."""
    return [problem for name, record in records.items() if (problem := _size_problem(folder / name, record))]


def content_problems(folder: Path, records: FileRecords) -> list[str]:
    """Return a line for each recorded file that is missing, cannot be read or has another content."""

    def problem(name: str) -> str | None:
        file = folder / name
        record = records[name]
        try:
            return _size_problem(file, record) or _digest_problem(file, record)
        except OSError as error:
            return f"{file}: cannot be read: {error.strerror}"

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(problem, records) if found]


def _size_problem(file: Path, record: Mapping[str, Any]) -> str | None:
    if not file.is_file():
        return f"{file}: missing"
    size = file.stat().st_size
    return None if size == record["bytes"] else f"{file}: damaged: it has {size:,} bytes, not {record['bytes']:,}"


def _digest_problem(file: Path, record: Mapping[str, Any]) -> str | None:
    if sha256_of(file) == record["sha256"]:
        return None
    return f"{file}: {DAMAGED}"
