"""Pipes between this process and sandboxed workers."""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack
from typing import IO

# That a process may use: those of the machine, less what the other processes of a launch take of them
NUM_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
MOST_RESULTS = 4 << 20  # bytes that the tests may say of themselves


def pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """A pipe's ends to read from and to write to, closed with the stack."""
    reads, writes = os.pipe()
    return stack.enter_context(open(reads, "rb", buffering=0)), stack.enter_context(open(writes, "wb", buffering=0))


def read_lines(file: IO[bytes], deadline: float) -> list[bytes]:
    """The whole lines that are written to a pipe until it is closed, or the deadline."""
    data, poll = b"", select.poll()
    poll.register(file, select.POLLIN)
    while len(data) < MOST_RESULTS and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        more = os.read(file.fileno(), 1 << 16)
        if not more:
            break
        data += more
    return data.split(b"\n")[:-1]
