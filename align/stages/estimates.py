"""What is estimated of a step before it runs."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from align.accounting.formulas import Sharding
from align.data.batching import Balance

# Of what is in use, the most that training on a CPU was seen to hold: glibc cannot use an aligned hole of less than
# 32 MiB again (its bug 14581) before this version, unless large blocks are mapped one by one.
HOLES, MENDED, THRESHOLD = 1.6, (2, 38), "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step will take; of what is made on the way the most that it can be."""

    name: str
    stage: str
    rows: int  # that it trains on, answers or judges
    tokens: int = 0  # computed (in one epoch, where it trains), each distinct (prefix, token) of a group once
    flops: float = 0.0  # of the whole step, reference pass included
    seconds: float = 0.0
    disk: int = 0  # bytes that it leaves behind
    spare: int = 0  # bytes of its checkpoints, while it runs
    bound: bool = False  # whether rows and tokens are the most that an earlier step can make
    training: Training | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is known of a training step whose rows are there."""

    counts: dict[str, int]
    format: str
    optimizer_steps: int
    longest: int  # tokens of the longest sequence
    unshared: int  # tokens of an epoch if responses did not share their prompt
    memory: Footprint
    balances: list[Balance]  # of the first optimizer steps, for numbers of ranks that have a group each


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of memory that each process of a training step takes at its peak, on a CPU with the process itself."""

    sharding: Sharding  # as the step's launch file says
    peak: int
    many: int  # processes of another launch
    by_stage: list[int]  # the peak in each of those: under DDP, ZeRO-1, 2 and 3

    def told(self) -> str:
        """In words: of the launch, and of the other ways to spread the step over many processes."""
        ways, gib = self.sharding, 2**30
        name = f"under ZeRO-{ways.stage}" if ways.stage else "under DDP"
        where = f"in each of {ways.processes} processes {name}" if ways.processes > 1 else "in one process"
        base = ", the process itself included" if ways.cpu else ""
        whole, *others = (f"{peak / gib:.1f}" for peak in self.by_stage)
        shared = ", ".join(f"ZeRO-{stage} {size}" for stage, size in enumerate(others, start=1))
        return (
            f"{self.peak / gib:.1f} GiB at the peak {where}{base}, estimated{holes() if ways.cpu else ''}; "
            f"in each of {self.many}: DDP {whole}, {shared}"
        )


def holes() -> str:
    """What the memory allocator adds to what is in use, in words, where it is known to."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) >= MENDED or THRESHOLD in os.environ:
        return ""
    return f", and up to {HOLES:g} times that as glibc {version} keeps holes ({THRESHOLD}=1048576 ends it)"
