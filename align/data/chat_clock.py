"""The time that chat templates write, pinned for a whole step: a resumed step renders what it rendered before."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from align.errors import InputError
from align.storage.disk_errors import disk_errors

BEGAN = ".began"  # file in a working folder: the local time at which its step began
_PINNED: ContextVar[datetime | None] = ContextVar("template_time", default=None)


def template_time() -> datetime:
    """Return the local time that `strftime_now` of a chat template writes: the pinned one, else the current time."""
    return _PINNED.get() or datetime.now()


@contextmanager
def pinned_time(moment: datetime) -> Generator[None]:
    """Let chat templates write this time within the block.

    >>> with pinned_time(datetime(2026, 7, 1)):
    ...     template_time().strftime("%d %b %Y")
    '01 Jul 2026'
    """
    token = _PINNED.set(moment)
    try:
        yield
    finally:
        _PINNED.reset(token)


def began_at(folder: Path) -> datetime:
    """Return when the work in `folder` began: what its first attempt wrote there, else the current time.

    The current time is written for later attempts and for other processes. Raise `InputError` for a file that holds no
    time.
    """
    path = folder / BEGAN
    now = datetime.now().replace(microsecond=0)
    if not path.exists():
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{BEGAN}.partial-{uuid4().hex[:8]}")  # as `remove_leftovers` recognizes it
            partial.write_text(now.isoformat(), "utf-8")
            try:
                os.link(partial, path)  # fails if another process was first
                partial.unlink()
            except FileExistsError:
                partial.unlink()
            except OSError:  # a file system without hard links
                os.replace(partial, path)
    try:
        return datetime.fromisoformat(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a valid time; delete the file and rerun") from error
