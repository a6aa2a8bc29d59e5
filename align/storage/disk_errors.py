"""Errors of the disk in one line: full, unreadable, or a path that cannot be used."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from align.errors import InputError, RunError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
REFUSED = (*UNREADABLE, errno.EROFS, errno.EFBIG)
MISPLACED = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)  # a folder is missing, or a file is in its place
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of an error of Rust
MIN_FREE_BYTES = 1 << 20  # with less free space than this a failed write is reported as a full disk


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn disk errors in this block into a `RunError` that names the path.

    Covers a full disk, missing permissions and an unusable location of `path`; other errors pass through unchanged.
    Some libraries hide a full disk (torch reports "unexpected pos 576"), so the free space is checked as well.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except BaseException as error:
        if _is_full(error, path):
            raise RunError(f"{path}: no space left on the disk") from error
        code = error_code(error)
        if code in REFUSED or (isinstance(error, OSError) and _is_misplaced(error, path)):
            failed = _failed_path(error, path)
            raise RunError(f"{path if _is_temporary(failed, path) else failed}: {os.strerror(code or 0)}") from error
        raise


def error_code(error: BaseException) -> int | None:
    """Return the system's number of an error, which libraries in Rust give in the text alone; None if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = OS_ERROR.search(str(error))
    return int(found[1]) if found else None


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn a failure to read a file in this block into a `RunError` that names it, `path` by default."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{_failed_path(error, path)}: cannot be read: {error.strerror or one_line(error)}") from error


def _failed_path(error: BaseException, path: Path) -> Path:
    return Path(os.fsdecode(getattr(error, "filename", None) or path))


def _is_temporary(failed: Path, path: Path) -> bool:
    """Return whether `failed` is a temporary file or folder of `path`."""
    return failed.parent == path.parent and failed.name.startswith(f".{path.name}.partial-")


def _is_misplaced(error: OSError, path: Path) -> bool:
    """Return whether the location of `path` is at fault, not another file that the block opened."""
    failed, target = _failed_path(error, path).absolute(), path.absolute()
    return error.errno in MISPLACED and (target.is_relative_to(failed) or failed.parent == target.parent)


def _is_full(error: BaseException, path: Path) -> bool:
    if error_code(error) in FULL or "No space left" in str(error):
        return True
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(existing).free < MIN_FREE_BYTES
