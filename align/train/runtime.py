"""What surrounds the loop: the processes it runs in, who is told of its progress, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from align.config import InputError, RunError, nearest
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


STATUS, KIB = Path("/proc/self/status"), 1024
OTHER_WAYS = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # of accelerate, to shard a model over processes


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """Join accelerate in one process or DDP; on a CPU with gloo, which a bare Accelerator would silently not join."""
    asked = [name for name in OTHER_WAYS if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if asked:
        raise InputError(f"the launch file asks for {asked[0]}; this version trains in one process or under DDP")
    known = [str(name) for name in get_available_trackers()]
    missing = [name for name in settings.trackers if name not in known]
    if missing:
        raise InputError(f"train.trackers: no tracker called {missing[0]!r} is installed; {nearest(missing[0], known)}")
    options: dict[str, Any] = {}
    if not torch.cuda.is_available():
        options["cpu"] = True
        if "RANK" in os.environ:
            options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    # The steps of a recipe share a process, and each has its own precision, which accelerate keeps in a global.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage] - there is no public way
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        # The loop accumulates by itself; left out, a number in the launch file would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
        **options,
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world or (world > 1 and accelerator.distributed_type == DistributedType.NO):
        raise RunError(f"{world} processes were launched and accelerate joined {accelerator.num_processes}")
    return accelerator


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, of the device's memory on a GPU and of main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # which can begin anew, as `ru_maxrss` cannot
        peak = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) * KIB
    unit = 1 if sys.platform == "darwin" else KIB  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
