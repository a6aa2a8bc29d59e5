"""Files of a finished folder that were removed on purpose: the mark in its manifest, and their deletion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

REMOVED = "removed"  # key of a manifest


class Removal(NamedTuple):
    """Which files of a folder were removed, and why; the content of the mark."""

    what: str  # the files together, in the plural, as messages name them
    reason: str
    restore: str  # how to get them back
    files: tuple[str, ...]  # relative to the folder

    def __str__(self) -> str:
        return f"{self.what} were removed ({self.reason})"


def as_removal(manifest: Mapping[str, Any]) -> Removal | None:
    """Return the mark in a manifest; None if it has none."""
    value = manifest.get(REMOVED)
    if not isinstance(value, Mapping):
        return None
    mark = cast("Mapping[str, Any]", value)
    return Removal(str(mark["what"]), str(mark["reason"]), str(mark["restore"]), tuple(map(str, mark["files"])))


def unlink_own(folder: Path, names: Iterable[str]) -> None:
    """Delete the named files of a folder that still exist. Links, and what is reached through one, are kept."""
    for name in own_files(folder, names):
        (folder / name).unlink(missing_ok=True)


def own_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names of files that lie in the folder itself and not behind a link; none of a folder that is one."""
    if folder.is_symlink():
        return []
    whole = folder.resolve()
    return [name for name in names if (folder / name).is_file() and (folder / name).resolve() == whole / name]
