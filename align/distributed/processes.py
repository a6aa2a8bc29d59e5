"""The processes of a launch outside of an optimizer step: collectives, and errors that name the failing process."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError

from align.distributed.heartbeat import get_heartbeat, stop_heartbeats
from align.distributed.launch import (
    COLLECTIVE_TIMEOUT,
    NO_SHARDING,
    SHARDED_LAUNCHES,
    check_world_size,
    is_launched,
    launched_with,
)
from align.errors import InputError, RunError, Stopped, one_line

T = TypeVar("T")

MAX_SHOWN = 100  # characters of an error message of the communication library


class Processes:
    """The processes of a launch; without an accelerator or a state, this process alone."""

    def __init__(self, joined: Accelerator | PartialState | None = None) -> None:
        self.rank, self.world_size = (0, 1) if joined is None else (joined.process_index, joined.num_processes)
        self._heartbeat = get_heartbeat(self.rank, self.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes shared files."""
        return self.rank == 0

    @contextmanager
    def activity(self, name: str) -> Generator[None]:
        """Name the work of a block for error messages of other processes; report lost processes as `RunError`."""
        self._heartbeat.activity = name
        try:
            yield
        except RuntimeError as error:
            is_communication = isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "NCCL"))
            if self.world_size == 1 or isinstance(error, RunError) or not is_communication:
                raise
            dead = self._heartbeat.dead_processes()
            who = f"process {dead[0]} has died" if dead else "another process does not respond"
            reason = one_line(error).rpartition("] ")[2][:MAX_SHOWN]
            raise RunError(f"process {self.rank} of {self.world_size}: {name}: {who} ({reason})") from error

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes in the order of their ranks."""
        return [value] if self.world_size == 1 else cast("list[T]", gather_object([value]))

    def run_on_all(self, work: Callable[[], T], activity: str) -> T:
        """Run the work on every process and return this process's result once all have finished.

        If it raises `InputError` or `RunError` on any process, every process raises `RunError` with the first one's
        rank and message. `Stopped` is raised at once; the launcher then ends the other processes.
        """
        if self.world_size == 1:
            return work()
        result: T | None = None
        error: RunError | InputError | None = None
        try:
            result = work()
        except Stopped:
            raise
        except (RunError, InputError) as raised:
            error = raised
        with self.activity(activity):
            messages = gather_object([None if error is None else str(error)])
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if failed:
            rank, message = failed[0]
            raise RunError(f"{activity}: process {rank} of {self.world_size}: {message}") from error
        return cast(T, result)

    def run_on_main(self, work: Callable[[], T], activity: str) -> T:
        """Run the work on the main process and return its result on every process."""
        result = self.run_on_all(lambda: work() if self.is_main else None, activity)
        return cast(T, result if self.world_size == 1 else broadcast_object_list([result])[0])


def init_processes() -> Processes:
    """Join the processes of this launch for work without training; only this process if nothing was launched.

    Each process uses one GPU; without GPUs they communicate over gloo. Raises `InputError` for a launch file that
    shards the model.
    """
    for plugin in SHARDED_LAUNCHES:
        if launched_with(plugin):
            raise InputError(f"the launch file enables {plugin}, but {NO_SHARDING}")
    if not is_launched():
        return Processes()
    has_gpu = torch.cuda.is_available()
    state = PartialState(cpu=not has_gpu, backend=None if has_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT)
    joined = Processes(state)
    check_world_size(joined.world_size)
    joined.all_gather_object(None)  # wait until the main process has prepared and locked the folder that all write to
    return joined


def shutdown_processes() -> None:
    """Wait for all processes, then destroy the process group.

    A launcher terminates the other processes when one exits with an error, so none may exit before the main process
    has written its files.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        stop_heartbeats()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
