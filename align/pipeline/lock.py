"""The lock of a run folder."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from align.errors import RunError
from align.storage.disk_errors import disk_errors

LOCK_FILE = ".lock"
MAX_HOLDER = 300  # bytes of a lock file that are read
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the file system has no file locks


@contextmanager
def locked(root: Path, log: Callable[[str], None], *, lock: str = LOCK_FILE) -> Generator[None]:
    """Hold the lock of a run folder during the block, so that no other process writes to it.

    The lock file names its holder's PID and host. The operating system releases the lock when the holder ends, however
    it ends; a name that a killed holder left behind is logged and replaced. Raises `RunError` with the holder's name
    when another process holds the lock. A file system without locks is logged, and the block runs without one.
    """
    path = root / lock
    with disk_errors(path):
        root.mkdir(parents=True, exist_ok=True)
        stale = _holder(path)
    # Without the fallback, the lock file is never filelock's own marker, and may hold the name
    file_lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        with disk_errors(path):
            file_lock.acquire()
    except Timeout as error:
        holder = _holder(path) or "another process"
        raise RunError(f"{root}: in use by {holder}; wait until it ends or choose another name (run=NAME)") from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log(f"{root}: this file system has no file locks; make sure that no other process writes to this folder")
    try:
        if stale:
            log(f"{root}: replaced the stale lock of {stale}, which no longer runs")
        with disk_errors(path):
            path.write_text(f"PID {os.getpid()} on {platform.node()}\n", "utf-8")
        yield
    finally:
        with suppress(OSError):
            os.truncate(path, 0)
        file_lock.release()


def _holder(path: Path) -> str:
    """Return the holder that a lock file names, or '' when it names none."""
    if not path.is_file():
        return ""
    text = path.read_bytes()[:MAX_HOLDER].decode("utf-8", "replace")
    return "".join(letter for letter in text if letter.isprintable()).strip()
