"""Removal of files that later steps no longer read; a kill at any moment leaves a consistent run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align import artifacts
from align.pipeline.planning import build_id, finished_steps
from align.pipeline.steps import Step
from align.storage.checksums import FileRecords, as_records
from align.storage.disk_errors import disk_errors
from align.storage.removal import Removal, own_files, unlink_own

LOG = ".log"  # suffix of the output of a step's processes

# Manifests of the finished steps, and the names of those that no unfinished step reads -> what is removed of each
Unneeded = Callable[[Mapping[str, Mapping[str, Any]], Sequence[str]], Mapping[str, Removal]]


class Cleanup(NamedTuple):
    """What is removed from the folders of steps on the way."""

    working: Callable[[Path], None] = lambda folder: None  # what only resuming needs, from a step's working folder
    unneeded: Unneeded = lambda finished, unread: {}


def finish_removals(steps: Sequence[Step], root: Path) -> None:
    """Delete files that manifests list as removed but that a killed run has left."""
    for step in steps:
        if (removal := artifacts.removal_of(root / step.name)) is not None:
            with disk_errors(root / step.name):
                unlink_own(root / step.name, removal.files)


def remove_unneeded(
    steps: Sequence[Step], root: Path, unneeded: Unneeded, *, waiting: Collection[str], log: Callable[[str], None]
) -> None:
    """Remove what `unneeded` names of the finished steps that no unfinished step reads.

    The steps in `waiting` are to run in this call and count as unfinished. Files behind a link are kept.
    """
    finished = finished_steps(steps, root)
    is_open = {step.name for step in steps if step.name not in finished or step.name in waiting}
    read = {name for step in steps if step.name in is_open for name in step.inputs}
    kept = is_open | read | {name for name, manifest in finished.items() if artifacts.REMOVED in manifest}
    unread = [step.name for step in steps if step.name not in kept]
    for name, removal in unneeded(finished, unread).items():
        if files := own_files(root / name, removal.files):
            artifacts.remove_files(root / name, removal._replace(files=tuple(files)))
            log(f"{name}: its {removal}")


def same_build(target: Path, fingerprint: str, records: FileRecords) -> dict[str, str]:
    """Return the build ID of a folder of which files were removed, if it had exactly the files in `records`.

    Steps that were made from it are then as if they were made from the new files. Returns nothing otherwise.
    """
    older = artifacts.read_manifest(target) or {}
    if artifacts.REMOVED not in older or older.get("fingerprint") != fingerprint:
        return {}
    is_same = _content(as_records(older.get(artifacts.FILES)) or {}) == _content(records)
    return {"build_id": build_id(target)} if is_same else {}


def _content(records: FileRecords) -> dict[str, str]:
    """Return the SHA-256 of each file that later steps may read; metrics and logs hold times."""
    paths = {name: Path(name) for name in records}
    names = [name for name, path in paths.items() if path.name not in artifacts.UNHASHED_FILES and path.suffix != LOG]
    return {name: str(records[name]["sha256"]) for name in names}
