"""Checkpoints of a finished step from which another step continues the training, bit-identically."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from align.artifacts import METRICS, atomic_file, atomic_folder, read_manifest
from align.errors import InputError
from align.storage.disk_errors import disk_errors
from align.train.checkpoint import BEST, CHECKPOINT, has_checkpoint, latest_checkpoint

KEPT = "resume"  # in the folder of a finished step that stopped at `until_step`


def keep_checkpoint(folder: Path) -> None:
    """Copy the latest checkpoint and the best weights to `resume`, which a finished step keeps."""
    kept = [folder / f"{CHECKPOINT}{latest_checkpoint(folder)}", *folder.glob(f"{BEST}*")]
    with atomic_folder(folder / KEPT) as partial:
        for path in kept:
            shutil.copytree(path, partial / path.name, copy_function=_link)


def adopt_checkpoint(earlier: Path, folder: Path) -> int:
    """Copy the checkpoint of an earlier step into `folder`, to be resumed; return its number of optimizer steps.

    Does nothing where the folder has a checkpoint. Metrics and best weights come first, so that after a kill there is
    no checkpoint without them.
    """
    step = latest_checkpoint(earlier / KEPT)
    if not step:
        if (reason := (read_manifest(earlier) or {}).get("diverged")) is not None:
            raise InputError(
                f"{earlier}: its training diverged in its first optimizer step, so there is nothing to resume "
                f"({reason}); lower its train.learning_rate or raise its train.warmup_steps",
                ("resume",),
            )
        raise InputError(f"{earlier}: has no checkpoint to resume; set train.until_step of that step", ("resume",))
    if not has_checkpoint(folder):
        with atomic_file(folder / METRICS) as partial:
            shutil.copyfile(earlier / METRICS, partial)
        for path in sorted((earlier / KEPT).iterdir()):  # best weights before the checkpoint
            with atomic_folder(folder / path.name) as copy:
                shutil.copytree(path, copy, copy_function=_link, dirs_exist_ok=True)
    return step


def _link(source: str, target: str) -> None:
    """Link a file that is never changed again, or copy it where the file system has no links."""
    with disk_errors(Path(target)):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
