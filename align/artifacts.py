"""Atomic files and folders, manifests and content fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from align.errors import InputError, RunError, one_line
from align.storage.checksums import (
    DAMAGED,
    FileRecords,
    as_records,
    content_problems,
    file_records,
    sha256_of,
    sha256_of_each,
)
from align.storage.disk_errors import UNREADABLE, disk_errors, error_code, reading
from align.storage.removal import REMOVED, Removal, as_removal, unlink_own

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
MEASURES = "measures.json"  # of made data, for the report
STATE = "state.json"  # of a checkpoint: what was trained, and the checksum of the metrics
SPENT = "spent-{}.json"  # in a working folder: what one attempt of a step has used so far
# Times, speeds and descriptions are not part of a fingerprint, and are no rows
UNHASHED_FILES = (MANIFEST, METRICS, MEASURES, STATE, "README.md")
UNRECORDED_FILES = (MANIFEST, "README.md")  # written after the records of a finished step's files
FILES = "files"  # key of a manifest: size and SHA-256 of every file

# Packages whose versions a manifest records
PACKAGES = ("align", "torch", "transformers", "tokenizers", "trl", "accelerate", "peft", "deepspeed", "datasets")
# What to do about a finished step's file that is missing or damaged
RESTORE = "restore it, or make the step again; to use an edited folder, copy it without its manifest.json"


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON holds any type
    """Return the content of a JSON file; raise `InputError` where it is missing or malformed.

    Raises `RunError` if it exists and cannot be read.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        if error_code(error) in UNREADABLE:
            raise RunError(f"{path}: cannot be read: {one_line(error)}") from error
        raise InputError(f"{path}: cannot be read as JSON: {one_line(error)}") from error


@contextmanager
def atomic_file(target: Path) -> Generator[Path]:
    """Yield a temporary path beside `target`, which is renamed to `target` when the block succeeds.

    The file is flushed to disk before the rename: a reader sees the old content or the new, never a part of it. When
    the block fails, the temporary file is removed and an existing `target` stays unchanged. The folder must exist.
    """
    partial = _temporary_name(target, "partial")
    with disk_errors(target):
        try:
            yield partial
            _sync(partial)
            os.replace(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write `text` in UTF-8 atomically; `errors` handles characters that UTF-8 cannot encode."""
    with atomic_file(path) as partial:
        partial.write_text(text, "utf-8", errors)


def write_json(path: Path, value: object, *, sort_keys: bool = True) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def append_line(path: Path, value: object) -> None:
    """Append `value` to a JSONL file in one write."""
    with disk_errors(path), path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(value) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Generator[Path]:
    """Yield a temporary folder, which replaces `target` when the block succeeds.

    When the block fails, the temporary folder is removed. Replacing an existing folder takes two renames, between
    which `target` does not exist; it never is an incomplete folder.
    """
    partial = _temporary_name(target, "partial")
    try:
        with disk_errors(target):
            partial.mkdir(parents=True)
            yield partial
            _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def working_folder(target: Path) -> Path:
    """Return the folder that a step writes to while it runs; it survives an interruption and is resumed from."""
    return target.with_name(target.name + ".partial")


def discard_attempt(working: Path) -> None:
    """Remove what an earlier attempt left in a working folder, of a step that starts from the beginning.

    A kill may have left a part of a file, which libraries would read. What each attempt has used is kept.
    """
    with disk_errors(working):
        for path in {*working.iterdir()} - {working / MANIFEST, *working.glob(SPENT.format("*"))}:
            _remove(path)


def complete(
    working: Path,
    target: Path,
    *,
    manifest: Mapping[str, Any],
    cleanup: Callable[[Path], None] = lambda folder: None,
    amend: Callable[[FileRecords], Mapping[str, Any]] = lambda records: {},
) -> None:
    """Write the manifest of a finished step and rename its working folder to `target`.

    Temporary files of interrupted attempts are removed. `cleanup(working)` removes state that only resuming needs,
    after the manifest has been written. Then size and SHA-256 of all remaining files are added to the manifest, and
    what `amend` returns for them.
    """
    with disk_errors(target):
        remove_leftovers(working)
        _sync_below(working)
        write_json(working / MANIFEST, dict(manifest))
        cleanup(working)
        records = file_records(working, exclude=UNRECORDED_FILES)
        write_json(working / MANIFEST, {**manifest, **amend(records), FILES: records})
        _rename(working, target)
        remove_leftovers(target.parent, of=target.name)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it has none."""
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def recorded_files(folder: Path) -> FileRecords | None:
    """Return size and SHA-256 of a finished step's files, without those that were removed on purpose.

    None for other folders and for steps of older versions.
    """
    manifest = _own_manifest(folder)
    records, removal = as_records(manifest.get(FILES)), as_removal(manifest)
    if records is None or removal is None:
        return records
    return {name: record for name, record in records.items() if name not in removal.files}


def removal_of(folder: Path) -> Removal | None:
    """Return which files of a finished step were removed on purpose; None if none were."""
    return as_removal(_own_manifest(folder))


def _own_manifest(folder: Path) -> Mapping[str, Any]:
    """Return the manifest of a folder; an empty one for other folders, and for another program's file of this name."""
    with suppress(InputError):
        manifest = read_json(folder / MANIFEST) if os.path.isfile(folder / MANIFEST) else None
        return manifest if isinstance(manifest, dict) else {}
    return {}


def check_not_removed(folder: Path | str) -> None:
    """Raise `InputError` for the folder of a finished step of which files were removed on purpose."""
    if (removal := removal_of(Path(folder))) is not None:
        raise InputError(f"{folder}: its {removal}; {removal.restore}")


def remove_files(folder: Path, removal: Removal) -> None:
    """Delete files of a finished step, after its manifest lists them as removed: a kill never leaves it wrong."""
    with disk_errors(folder):
        write_json(folder / MANIFEST, {**(read_manifest(folder) or {}), REMOVED: removal._asdict()})
        _sync(folder)
        unlink_own(folder, removal.files)


def check_content(folder: Path) -> None:
    """Raise if a file of a finished step is missing or damaged (`RunError`), or was removed (`InputError`)."""
    check_not_removed(folder)
    if problems := content_problems(folder, recorded_files(folder) or {}):
        raise RunError(f"{problems[0]}; {RESTORE}")


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of a folder's relative file names and contents.

    Manifests and metrics are left out, because they hold times. Raises `RunError` if a file cannot be read, or is
    not as the finished step wrote it; `InputError` for the folder of a step of which files were removed on purpose.
    """
    with reading(path):
        if path.is_file():
            digest = sha256_of(path)
            _check_recorded(path.parent, {path.name: digest}, [path.name])
            return digest
        if not path.is_dir():
            raise InputError(f"{path}: no such file or folder")
        check_not_removed(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in UNHASHED_FILES)
        digests = {file.relative_to(path).as_posix(): each for file, each in sha256_of_each(files).items()}
    _check_recorded(path, digests, recorded_files(path) or ())
    return fingerprint_bytes("".join(f"{digest} {name}\n" for name, digest in digests.items()).encode())


def _check_recorded(folder: Path, digests: Mapping[str, str], names: Iterable[str]) -> None:
    """Raise `RunError` for the first of the names whose digest is not the one that the folder's manifest records."""
    records = recorded_files(folder) or {}
    for name in names:
        if name in records and Path(name).name not in UNHASHED_FILES and digests.get(name) != records[name]["sha256"]:
            state = DAMAGED if name in digests else "missing"
            raise RunError(f"{folder / name}: {state}; {RESTORE}")


def fingerprint_bytes(content: bytes) -> str:
    """Return the SHA-256 of `content`, equal to the fingerprint of a file with this content."""
    return hashlib.sha256(content).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect results, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _temporary_name(path: Path, what: str) -> Path:
    """Return an unused hidden name in the same folder, which `remove_leftovers` recognizes."""
    return path.with_name(f".{path.name}.{what}-{uuid4().hex[:8]}")


def _rename(folder: Path, target: Path) -> None:
    """Flush `folder` to disk and rename it to `target`, replacing an older folder."""
    _sync_below(folder)
    _sync(folder)
    if target.exists():
        older = _temporary_name(target, "older")
        os.rename(target, older)
        os.rename(folder, target)
        _remove(older)
    else:
        os.rename(folder, target)
    _sync(target.parent)


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link to a folder without what it links to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _sync_below(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk.

    Files get the permissions that the folder has: some libraries write private ones, whatever the umask.
    """
    permissions = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        mode = file.stat().st_mode
        if file.is_file() and mode | permissions != mode:
            file.chmod(mode | permissions)
        _sync(file)


def _sync(path: Path) -> None:
    """Flush `path` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, *, of: str = "*") -> None:
    """Remove temporary files and folders of interrupted writes below `folder`, or those of one target in it."""
    search = folder.rglob if of == "*" else folder.glob
    found = [leftover for what in ("partial", "older") for leftover in search(f".{of}.{what}-????????")]
    if of == "*":
        found += [file for file in search(".tmp??????") if file.is_file()]  # of safetensors
    for leftover in found:
        _remove(leftover)
