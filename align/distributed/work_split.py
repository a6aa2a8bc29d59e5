"""What the processes of a launch do that trains nothing: each holds whole models and does its share of the items."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.state import PartialState

from align.config import read_recipe
from align.distributed.heartbeat import rest
from align.distributed.journal import Journal, Share
from align.distributed.processes import PATIENCE, Processes, asks_for, check_world
from align.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")  # accelerate's names of the launches that cut models, not the work
WHY = "sampling, judging and evaluation share out the items, not the weights; take one such as launch/ddp-8gpu.yaml"


def check_launch(launch: str | None) -> None:
    """Raise for a launch file under which a process would not hold whole models; whether it is there is asked later."""
    if launch is not None and Path(launch).is_file():
        kind = str(read_recipe(Path(launch)).get("distributed_type"))
        if kind in SHARDING:
            raise InputError(f"launch: {launch} asks for {kind}; {WHY}")


def join() -> Processes:
    """The processes of this launch, which wait for each other here; one where nothing was launched.

    Each is given a GPU of its own where there are any; over CPUs they talk by gloo.
    """
    for way in SHARDING:
        if asks_for(way):
            raise InputError(f"the launch file asks for {way}; {WHY}")
    if "RANK" not in os.environ:
        return Processes()
    has_gpu = torch.cuda.is_available()
    joined = Processes(PartialState(cpu=not has_gpu, backend=None if has_gpu else "gloo", timeout=PATIENCE))
    check_world(joined.count)
    joined.each(None)  # until the first has cleared and locked what they all will write to
    return joined


def leave() -> None:
    """Let no process end before the first has written: a launcher that sees one end badly ends the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rest()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def share_of(processes: Processes) -> Share:
    """What is this process's own."""
    return Share(processes.number, processes.count)


def finish(journal: Journal, processes: Processes, work: Callable[[], T], doing: str) -> T:
    """What this process's share of the work gives; the journal, which keeps it, then holds the shares of all."""

    def own() -> T:
        done = work()
        journal.sync()
        return done

    found = processes.all(own, doing)
    if processes.count > 1:
        journal.look_around()
    return found


def dealt(
    items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]], *, processes: Processes, doing: str
) -> list[R]:
    """What the work gives for each item, in their order, on every process; each does its share of them."""
    share = share_of(processes)
    mine = processes.all(lambda: list(work(share.of(items))), doing)
    parts = [iter(part) for part in processes.each(mine)]
    return [next(parts[place % processes.count]) for place in range(len(items))]
