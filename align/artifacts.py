"""Files and folders that appear whole or not at all, and the manifest that says what made them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from align.errors import InputError, RunError, one_line

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
UNHASHED_FILES = (MANIFEST, METRICS)  # when and how fast, not what: no part of a fingerprint

PACKAGES = ("align", "torch", "transformers", "tokenizers", "trl", "accelerate", "peft", "deepspeed", "datasets")

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
MISPLACED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # a folder that is missing, or one that is a file
SPARE_BYTES = 1 << 20  # a disk with less than this left is full, whatever a library calls the failure


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """A block in which a disk that is full or closed to us, or a wrong place, becomes one line that names a path.

    Libraries put a full disk in their own words (torch: "unexpected pos 576"), so the disk is asked too.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except BaseException as error:
        if _is_full(error, path):
            raise RunError(f"{path}: no space left on the disk") from error
        if isinstance(error, OSError) and (error.errno in REFUSED or _is_misplaced(error, path)):
            raise RunError(f"{error.filename or path}: {error.strerror}") from error
        raise


def _is_misplaced(error: OSError, path: Path) -> bool:
    """Whether the place of `path` is wrong, and not that of something else which the block looks for."""
    found = Path(os.fsdecode(error.filename or path)).absolute()
    return error.errno in MISPLACED and (
        path.absolute().is_relative_to(found) or found.parent == path.absolute().parent
    )


def _is_full(error: BaseException, path: Path) -> bool:
    if getattr(error, "errno", None) in FULL or "No space left" in str(error):
        return True
    there = next(folder for folder in path.absolute().parents if folder.exists())
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(there).free < SPARE_BYTES


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON holds any type
    """What the JSON file holds."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {one_line(error)}") from error


def write_json(path: Path, value: object, *, sort_keys: bool = True) -> None:
    """Write `value` so that a reader sees all of it, or what was there before."""
    partial = _beside(path, "partial")
    with disk_errors(path):
        try:
            partial.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", "utf-8")
            _sync(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def append_line(path: Path, value: object) -> None:
    """Add `value` to a JSONL file in one write."""
    with disk_errors(path), path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """A folder to write into, which takes the name `target` (and the place of an older one) when the block succeeds.

    When the block fails nothing of it stays. The name is missing for a moment while an older folder gives way;
    it never names a folder that is not whole.
    """
    partial = _beside(target, "partial")
    try:
        with disk_errors(target):
            partial.mkdir(parents=True)
            yield partial
            _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def working_folder(target: Path) -> Path:
    """Where a step writes while it runs; a kill leaves it as it is, to be continued."""
    return target.with_name(target.name + ".partial")


def complete(
    working: Path, target: Path, *, manifest: Mapping[str, Any], cleanup: Callable[[Path], None] = lambda folder: None
) -> None:
    """Turn a step's working folder into `target`, its manifest last, without what kills have left in it.

    `cleanup(working)` removes state that only resuming needs, after the manifest has been written.
    """
    with disk_errors(target):
        remove_leftovers(working)
        _sync_below(working)
        write_json(working / MANIFEST, dict(manifest))
        cleanup(working)
        _rename(working, target)
        remove_leftovers(target.parent, of=target.name)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where there is none."""
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's files by relative name and content; a run's journal is left out."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in UNHASHED_FILES)
    lines = [f"{fingerprint(file)} {file.relative_to(path).as_posix()}\n" for file in files]
    return fingerprint_bytes("".join(lines).encode())


def fingerprint_bytes(content: bytes) -> str:
    """SHA-256 of `content`, the same as of a file that holds it."""
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """The version of Python and of each package that numbers depend on, where installed; imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _beside(path: Path, what: str) -> Path:
    """A fresh hidden name in the same folder; `remove_leftovers` knows it again."""
    return path.with_name(f".{path.name}.{what}-{uuid4().hex[:8]}")


def _rename(folder: Path, target: Path) -> None:
    """Give `folder`, once all of it is on the disk, the name `target`."""
    _sync_below(folder)
    _sync(folder)
    if target.exists():
        older = _beside(target, "older")
        os.rename(target, older)
        os.rename(folder, target)
        shutil.rmtree(older)
    else:
        os.rename(folder, target)
    _sync(target.parent)


def _sync_below(folder: Path) -> None:
    """Wait until everything in the folder is on the disk."""
    for file in folder.rglob("*"):
        _sync(file)


def _sync(path: Path) -> None:
    """Wait until `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, *, of: str = "*") -> None:
    """Remove what a kill left half-written below `folder`, or in it of one target."""
    search = folder.rglob if of == "*" else folder.glob
    for what in ("partial", "older"):
        for leftover in list(search(f".{of}.{what}-????????")):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            leftover.unlink(missing_ok=True)
