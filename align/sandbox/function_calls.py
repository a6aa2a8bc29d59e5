"""Run many small programs, a few hundred per second: each is a text that defines a function `f` of one argument.

A program is isolated by the same layers as in `align.rewards.unit_tests`, in a separate process that holds no expected
value and no other program. It is faster, because many programs share one sandbox (`calls_worker`), and narrower:
arguments are literals, answers are compared as `repr` writes them, and there is no folder to write to.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from align.errors import RunError
from align.sandbox import framing
from align.sandbox.calls_worker import ERROR, MAX_ANSWERS
from align.sandbox.process import CALLS_WORKER, GRACE_S, NUM_CORES, Limits, Sandbox

MAX_PROGRAMS = 64  # of one sandbox
LIMITS = Limits(cpu_s=2, wall_s=20.0, memory_mb=256)  # the CPU time of each program, and of all forks together


class Program(NamedTuple):
    """A text that defines `f`, and the arguments to call it with."""

    source: str
    inputs: tuple[str, ...]  # literals, one line each


def run_programs(
    programs: Sequence[Program], *, limits: Limits = LIMITS, num_workers: int = NUM_CORES
) -> dict[Program, list[str]]:
    """Return the answers of each distinct program, as `repr` writes them; one that starts with `!` is an error.

    Errors are the name of the exception, `!no answer` where the program stopped early, and `!killed` where it was
    killed or exceeded a limit.
    """
    distinct = list(dict.fromkeys(programs))
    size = min(MAX_PROGRAMS, -(-len(distinct) // num_workers)) or 1
    parts = [distinct[start : start + size] for start in range(0, len(distinct), size)]
    found: dict[Program, list[str]] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        for part in pool.map(partial(_run, limits=limits), parts):
            found |= part
    return found


def _run(programs: Sequence[Program], *, limits: Limits) -> Mapping[Program, list[str]]:
    """Return the answers of programs that share a sandbox, one after the other."""
    request = {"num_programs": len(programs), "wall_s": limits.wall_s}
    with ExitStack() as stack:
        requests_reader, requests = framing.pipe(stack)
        results, results_writer = framing.pipe(stack)
        descriptors = [requests_reader.fileno(), results_writer.fileno()]
        sandbox = stack.enter_context(Sandbox(CALLS_WORKER, request, descriptors=descriptors, limits=limits))
        requests_reader.close()  # so that each process sees when the other ends
        results_writer.close()
        found: dict[Program, list[str]] = {}
        for program in programs:
            deadline = time.monotonic() + limits.wall_s + GRACE_S
            try:
                for text in (program.source, "\n".join(program.inputs)):
                    framing.write(requests.fileno(), framing.pack(text.encode(errors="replace")))
                message = framing.read_frame(results.fileno(), deadline=deadline, max_bytes=1 + MAX_ANSWERS)
            except (EOFError, BrokenPipeError, TimeoutError, framing.InvalidFrame) as error:
                raise RunError(f"a sandbox for many programs {sandbox.wait(deadline).why}") from error
            found[program] = _answers(message, num=len(program.inputs))
    return found


def _answers(message: bytes, *, num: int) -> list[str]:
    """Return `num` answers of a program; errors take the place of missing ones."""
    completed = bool(message[0])
    lines = message[1:].decode(errors="replace").split("\n")[:-1]
    missing = ERROR + ("no answer" if completed else "killed")
    return (lines + [missing] * num)[:num]
