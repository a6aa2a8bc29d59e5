"""`align verify`: compare the files of a run with their recorded checksums."""

from __future__ import annotations

from pathlib import Path

from align.errors import RunError
from align.workflow.verification import Verified, verify_run

MIB = 2**20


def verify(folder: Path) -> None:
    """Print one line for each part of a run, and one for each problem; raise `RunError` if there is any."""
    num_files, num_problems = 0, 0
    for part in verify_run(folder):
        print(f"{part.name}: {_result(part)}{f'; {part.removed}' if part.removed else ''}")
        for problem in part.problems:
            print(f"  {problem}")
        num_files += part.num_files
        num_problems += len(part.problems)
    if num_problems:
        raise RunError(f"{folder}: {num_problems} of {num_files} files are missing or damaged")


def _result(part: Verified) -> str:
    files = f"{part.num_files:,} files, {part.num_bytes / MIB:,.1f} MiB"
    if part.problems:
        return f"{files}: {len(part.problems)} missing or damaged"
    if part.num_unverified:
        verified = f"{files} as written; the others " if part.num_files else ""
        return f"{verified}not verified: written by a version without checksums"
    return f"{files}, as written"
