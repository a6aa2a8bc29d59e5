"""What many small programs answer, a few hundred a second: each a text that defines a function `f` of one argument.

As safe as `code_tests`: a program is locked up by the same layers, in a process of its own that holds no expected
value and no other program. Faster, because one sandbox is built for many (`calls_side`), and narrower: arguments are
literals, answers are compared as Python writes them, and there is no folder to write to.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from align.errors import RunError
from align.sandbox.calls_worker import ERROR, LENGTH, REPORT
from align.sandbox.pipes import NUM_CORES, pipe
from align.sandbox.process import GRACE_S, Limits, Sandbox

CALLS = "align.sandbox.calls_worker"
MOST_PROGRAMS = 64  # of one sandbox
LIMITS = Limits(cpu_s=2, wall_s=20.0, memory_mb=256)  # the CPU time is that of one program, and of all forks together


class Program(NamedTuple):
    """A text that defines `f`, and what it is to be called with."""

    source: str
    inputs: tuple[str, ...]  # literals, one line each


def answers(
    programs: Sequence[Program], *, limits: Limits = LIMITS, num_workers: int = NUM_CORES
) -> dict[Program, list[str]]:
    """The answers of each different program, as Python writes them; an answer that starts with `!` is an error."""
    wanted = list(dict.fromkeys(programs))
    size = min(MOST_PROGRAMS, -(-len(wanted) // num_workers)) or 1
    parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
    found: dict[Program, list[str]] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        for part in pool.map(partial(_run, limits=limits), parts):
            found |= part
    return found


def _run(programs: Sequence[Program], *, limits: Limits) -> Mapping[Program, list[str]]:
    """The answers of programs that share a sandbox, one after the other."""
    order = {"num_programs": len(programs), "wall_s": limits.wall_s}
    with ExitStack() as stack:
        asked, ask = pipe(stack)
        results, result = pipe(stack)
        ends = [asked.fileno(), result.fileno()]
        sandbox = stack.enter_context(Sandbox(CALLS, order, descriptors=ends, limits=limits))
        asked.close()  # so that each process sees when the other ends
        result.close()
        found: dict[Program, list[str]] = {}
        for program in programs:
            deadline = time.monotonic() + limits.wall_s + GRACE_S
            try:
                _send(ask.fileno(), program)
                found[program] = _answers(results.fileno(), deadline, num=len(program.inputs))
            except (EOFError, BrokenPipeError, TimeoutError) as error:
                raise RunError(f"a sandbox for many programs {sandbox.ended(deadline).why}") from error
    return found


def _send(file: int, program: Program) -> None:
    for text in (program.source, "\n".join(program.inputs)):
        data = text.encode(errors="replace")
        data = LENGTH.pack(len(data)) + data
        while data:
            data = data[os.write(file, data) :]


def _answers(file: int, deadline: float, *, num: int) -> list[str]:
    """One program's answers; where it did not come to its end, an error stands for each that is missing."""
    sound, size = REPORT.unpack(_read(file, REPORT.size, deadline))
    lines = _read(file, size, deadline).decode(errors="replace").split("\n")[:-1]
    missing = ERROR + ("nothing more" if sound else "was ended")
    return (lines + [missing] * num)[:num]


def _read(file: int, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        more = os.read(file, size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
