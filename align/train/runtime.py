"""What surrounds the loop: the processes it runs in, who is told of its progress, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from align.config import InputError, RunError
from align.train.settings import TrainSettings


class Reporter(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None:
        """One thing worth saying."""
        ...

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """A new stretch of work of `total` units begins."""
        ...

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Units of the current stretch are done."""
        ...


class Silence:
    """A reporter that says nothing: for library use and tests."""

    def note(self, text: str) -> None:
        """Nothing."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Nothing."""

    def advance(self, units: int, metrics: dict[str, float] | None = None) -> None:
        """Nothing."""


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """Join accelerate in one process or DDP; on a CPU with gloo, which a bare Accelerator would silently not join."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError("the launch file asks for DeepSpeed; this version trains in one process or under DDP")
    options: dict[str, Any] = {}
    if not torch.cuda.is_available():
        options["cpu"] = True
        if "RANK" in os.environ:
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if settings.precision == "bf16" else "no",
            step_scheduler_with_optimizer=False,
            log_with=list(settings.trackers) or None,
            project_dir=str(folder),
            **options,
        )
    except ValueError as error:
        raise InputError(f"train.trackers {settings.trackers}: {error}") from error
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world or (world > 1 and accelerator.distributed_type == DistributedType.NO):
        raise RunError(f"{world} processes were launched and accelerate joined {accelerator.num_processes}")
    return accelerator


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, of the device's memory on a GPU and of main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
