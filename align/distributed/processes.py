"""What surrounds the loop: the processes it runs in, who is told of its progress, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)
from torch.distributed import DistError

from align.distributed.heartbeat import heartbeat
from align.errors import InputError, RunError, one_line

T = TypeVar("T")

STATUS, KIB = Path("/proc/self/status"), 1024
# How long a process waits in a collective for the others before it gives up. Long, for the first process may write or
# read for a while alone; a process that is gone is noticed by its silence (`align.distributed.heartbeat`).
PATIENCE = timedelta(minutes=60)


def asks_for(way: str) -> bool:
    """Whether the launch file asks accelerate for a way to shard: DEEPSPEED, FSDP or MEGATRON_LM."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"


def check_world(joined: int) -> None:
    """Stop unless so many processes were launched."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if joined != world:
        raise RunError(f"{world} processes were launched and accelerate joined {joined}")


class Processes:
    """The processes of a launch, as far as they wait for each other outside of a step."""

    def __init__(self, joined: Accelerator | PartialState | None = None) -> None:
        self.number, self.count = (0, 1) if joined is None else (joined.process_index, joined.num_processes)
        self._heart = heartbeat(self.number, self.count)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what there is once."""
        return self.number == 0

    @contextmanager
    def at(self, place: str) -> Generator[None]:
        """A block that is known as `place` to whoever misses this process, and in which this one may miss another."""
        self._heart.place = place
        try:
            yield
        except RuntimeError as error:
            of_others = isinstance(error, DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
            if self.count == 1 or isinstance(error, RunError) or not of_others:
                raise
            gone = self._heart.gone()
            who = f"process {gone[0]} is gone" if gone else "another process does not answer"
            said = one_line(error).rpartition("] ")[2][:100]
            raise RunError(f"process {self.number} of {self.count}: {place}: {who} ({said})") from error

    def each(self, value: T) -> list[T]:
        """The values of all processes, by their number."""
        return [value] if self.count == 1 else cast("list[T]", gather_object([value]))

    def all(self, work: Callable[[], T], doing: str) -> T:
        """What the work gives here, when all have done theirs; what goes wrong on one stops all, and is named."""
        if self.count == 1:
            return work()
        result: T | None = None
        error: RunError | InputError | None = None
        try:
            result = work()
        except (RunError, InputError) as raised:
            error = raised
        with self.at(doing):
            said = gather_object([None if error is None else str(error)])
        wrong = [(rank, text) for rank, text in enumerate(said) if text is not None]
        if wrong:
            rank, text = wrong[0]
            raise RunError(f"{doing}: process {rank} of {self.count}: {text}") from error
        return cast(T, result)

    def first(self, work: Callable[[], T], doing: str) -> T:
        """What the work gives on the first process, on all of them."""
        found = self.all(lambda: work() if self.is_first else None, doing)
        return cast(T, found if self.count == 1 else broadcast_object_list([found])[0])


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
