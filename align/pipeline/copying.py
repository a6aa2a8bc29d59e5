"""Copies of a finished step's folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from align import artifacts

# Keys of a manifest about the execution of its own step: `_provenance` of the runner, the files, and which were removed
PROVENANCE = ("step", "key", "inputs", "fingerprint", "build_id", "input_build_ids", artifacts.FILES, artifacts.REMOVED)


def copied(source: Path, working: Path) -> dict[str, Any]:
    """Fill a working folder with links to the files of a finished step; return what its manifest says of them.

    Files are copied where the file system has no hard links.
    """

    def link(path: str, target: str) -> None:
        Path(target).unlink(missing_ok=True)  # of an interrupted attempt
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)

    def own(folder: str, names: list[str]) -> set[str]:
        return set(artifacts.UNRECORDED_FILES) if Path(folder) == source else set()

    shutil.copytree(source, working, ignore=own, copy_function=link, dirs_exist_ok=True)
    manifest = artifacts.read_manifest(source) or {}
    return {**{name: each for name, each in manifest.items() if name not in PROVENANCE}, "copy_of": source.name}
