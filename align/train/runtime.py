"""What surrounds the loop: the processes it runs in, who is told of its progress, and what it has used."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch.distributed import DistError
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.config import InputError, RunError, nearest, one_line
from align.train.heartbeat import heartbeat
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


T = TypeVar("T")

STATUS, KIB = Path("/proc/self/status"), 1024
# How long a process waits in a collective for the others before it gives up. Long, for the first process may write or
# read for a while alone; a process that is gone is noticed by its silence (`align.train.heartbeat`).
PATIENCE = timedelta(minutes=60)


def asks_for(way: str) -> bool:
    """Whether the launch file asks accelerate for a way to shard: DEEPSPEED, FSDP or MEGATRON_LM."""
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """Join accelerate in one process, DDP, DeepSpeed's ZeRO or FSDP2, or stop where it joins anything else.

    On a CPU that is over gloo, which a bare Accelerator would silently not join.
    """
    if asks_for("MEGATRON_LM"):
        raise InputError("the launch file asks for MEGATRON_LM; there are one process, DDP, DeepSpeed and FSDP2")
    for way in ("DEEPSPEED", "FSDP"):
        if asks_for(way) and "RANK" not in os.environ:
            raise InputError(f"the launch file asks for {way}, and this is no process of an accelerate launch: no RANK")
    check_trackers(settings)
    if asks_for("DEEPSPEED"):
        _ready_deepspeed()
    options: dict[str, Any] = {}
    if "RANK" in os.environ:
        backend = None if torch.cuda.is_available() else "gloo"
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=PATIENCE)]
    if not torch.cuda.is_available() and not (asks_for("DEEPSPEED") or asks_for("FSDP")):
        options["cpu"] = True  # with DeepSpeed accelerate would turn into plain DDP and not say so
    # The steps of a recipe share a process, and each has its own precision, which accelerate keeps in a global.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage] - there is no public way
    accelerator = Accelerator(
        mixed_precision="no",  # `autocast` is ours: the same over every way of lying
        # The loop accumulates by itself; left out, a number in the launch file would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
        **options,
    )
    _check_joined(accelerator)
    unset_hf_deepspeed_config()  # by which transformers shares out whatever it makes; `read_in_shares` says what
    return accelerator


def check_trackers(settings: TrainSettings) -> None:
    """Raise for a tracker that is not installed here."""
    known = [str(name) for name in get_available_trackers()]
    missing = [name for name in settings.trackers if name not in known]
    if missing:
        raise InputError(f"train.trackers: no tracker called {missing[0]!r} is installed; {nearest(missing[0], known)}")


@contextmanager
def read_in_shares(accelerator: Accelerator) -> Generator[None]:
    """A block in which a model that is read from a folder is shared out as it is read, where ZeRO-3 is to do so."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    if plugin is None or not plugin.is_zero3_init_enabled():
        yield
        return
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def _ready_deepspeed() -> None:
    """Let DeepSpeed run where there is no compiler: what it would build on a CPU, no training uses."""
    try:
        from deepspeed import ops  # noqa: PLC0415 - optional, and seconds to import
    except ImportError as error:
        raise InputError(
            "the launch file asks for DeepSpeed, which is not installed: pip install align[deepspeed]"
        ) from error
    # DeepSpeed 0.19 calls what torch 2.13 would call otherwise, some forty times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        getattr(ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _check_joined(accelerator: Accelerator) -> None:
    """Stop unless accelerate has joined what was launched."""
    kind = accelerator.distributed_type
    check_world(1 if kind == DistributedType.NO else accelerator.num_processes)  # without a type nothing is in step
    for way, expected in (("DEEPSPEED", DistributedType.DEEPSPEED), ("FSDP", DistributedType.FSDP)):
        if asks_for(way) and kind != expected:
            raise RunError(
                f"the launch file asks for {way} and accelerate joined {kind.value}: nothing would be sharded"
            )


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
