"""Verification of a run: every file of its steps, checkpoints and reference cache against the recorded checksums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from align.artifacts import MANIFEST, recorded_files, removal_of
from align.errors import InputError
from align.stages.base import REFERENCES
from align.storage.checksums import DAMAGED, FileRecords, content_problems
from align.storage.disk_errors import reading
from align.train.checkpoint import saved_records
from align.train.references.cache import is_damaged


@dataclass(frozen=True, slots=True)
class Verified:
    """The files of a folder: how many were compared with their checksums, and what is wrong with them."""

    name: str
    num_files: int
    num_bytes: int
    problems: list[str] = field(default_factory=list[str])
    num_unverified: int = 0  # files, or folders of unknown files, that were written without checksums
    removed: str = ""  # what was removed on purpose, and why


def verify_run(folder: Path) -> Iterator[Verified]:
    """Yield each part of a run, or of one step, once all of its files have been read.

    The parts are the finished steps, the checkpoints of unfinished steps, and the reference cache. Raises `InputError`
    for a folder that is neither a run's nor a step's.
    """
    steps = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not steps:
        raise InputError(f"{folder}: neither a run folder nor the folder of a step: there is no {MANIFEST}")
    for step in steps:
        if step.suffix == ".partial":
            for path, records in saved_records(step).items():
                yield _verified(f"{step.name}/{path.name}", path, records)
        elif not step.name.startswith("."):
            removal = removal_of(step)
            part = _verified(step.name, step, recorded_files(step))
            yield part if removal is None else replace(part, removed=str(removal))
    for cache in sorted(path for path in (folder / REFERENCES).glob("*") if path.is_dir()):
        yield _verified_cache(cache)


def _verified(name: str, folder: Path, records: FileRecords | None) -> Verified:
    if records is None:
        return Verified(name, 0, 0, num_unverified=1)
    num_bytes = sum(int(record["bytes"]) for record in records.values())
    return Verified(name, len(records), num_bytes, content_problems(folder, records))


def _verified_cache(folder: Path) -> Verified:
    """Return the files of a reference cache, which are named by their SHA-256."""
    num_bytes = 0
    num_unverified = 0
    problems = list[str]()
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    for file in files:
        with reading(file):
            content = file.read_bytes()
        num_bytes += len(content)
        damaged = is_damaged(file, content)
        num_unverified += damaged is None
        problems += [f"{file}: {DAMAGED}"] if damaged else []
    return Verified(f"{REFERENCES}/{folder.name}", len(files) - num_unverified, num_bytes, problems, num_unverified)
